"""Evaluation by lm-evaluation-harness: our tasks in its format, and its tasks on our models."""
