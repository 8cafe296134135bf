"""Evaluation: scores, slices, exit rules, the exit trace, and what is stored of them."""
