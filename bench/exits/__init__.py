"""Leaving the cycle early: signals, rules and what they buy."""
