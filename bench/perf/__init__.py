"""Benchmarks: what is compared takes turns in one run, and the median of the ratios is told; no test asserts a time."""
