"""The model that walks a schedule, what a variant may attach to it, and what it costs."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Checkpoints that version 0.1 has saved load themselves by these names."""
    if name in ("CycleConfig", "CycleForCausalLM"):
        from bench.model import language_model  # start-up: transformers

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
