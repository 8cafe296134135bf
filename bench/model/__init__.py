"""The model that walks a schedule, known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from bench.model.language_model import CycleConfig, CycleForCausalLM, CycleOutput

AutoConfig.register(CycleConfig.model_type, CycleConfig, exist_ok=True)
AutoModelForCausalLM.register(CycleConfig, CycleForCausalLM, exist_ok=True)

__all__ = ["CycleConfig", "CycleForCausalLM", "CycleOutput"]
