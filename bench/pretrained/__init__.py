"""Pretrained models: where they come from, how they become a variant, and how the result is shared."""
