"""Sweeps with Optuna: over the thresholds of exit rules, read from stored traces, and over training budgets."""
