"""Benchmarks: what takes turns in one run is compared, medians, never timed asserts in tests."""
