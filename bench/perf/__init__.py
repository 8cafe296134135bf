"""Benchmarks: paired ratios in one run, medians, never timed asserts in tests."""
