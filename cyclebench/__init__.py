"""cyclebench: does reusing a transformer's parameters buy accuracy for the compute it costs?

These names are promised to stay; notebooks, plug-ins and saved checkpoints import nothing else. Each is loaded when it
is first used, so that importing the package takes no time.

    import cyclebench
    results = cyclebench.run("quick", set=["seeds=3"])
    results.frame()[["variant", "task", "seed", "test_accuracy"]]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cyclebench._house import settle

settle()

if TYPE_CHECKING:
    from bench.api import Results as Results
    from bench.api import load_results as load_results
    from bench.api import open_study as load_study
    from bench.api import run as run
    from bench.config import ModelConfig as ModelConfig
    from bench.config import Objective as Objective
    from bench.config import Strict as Options
    from bench.data.generated import Generated as Generated
    from bench.data.generated import distinct as distinct
    from bench.data.task import Metric as Metric
    from bench.data.task import Sample as Sample
    from bench.data.task import Task as Task
    from bench.data.task import TaskSize as TaskSize
    from bench.data.task import get_task as get_task
    from bench.data.task import make_data as make_data
    from bench.data.task import register as register_task
    from bench.data.task import task_class as task_class
    from bench.data.text import TextOptions as TextOptions
    from bench.data.text import text_data as text_data
    from bench.errors import UserError as UserError
    from bench.evaluate.loops import loop_points as loop_points
    from bench.evaluate.rules import Rule as Rule
    from bench.evaluate.rules import View as View
    from bench.evaluate.rules import register as register_rule
    from bench.exits.generation import EarlyExit as EarlyExit
    from bench.form import Form as Form
    from bench.model.configuration import CycleConfig as CycleConfig
    from bench.model.flops import Flops as Flops
    from bench.model.gates import register as register_gate
    from bench.model.language_model import CycleForCausalLM as CycleForCausalLM
    from bench.model.language_model import CycleForClassification as CycleForClassification
    from bench.model.parts import Adapter as Adapter
    from bench.model.parts import AttentionPrefix as AttentionPrefix
    from bench.model.parts import Gate as Gate
    from bench.model.parts import Recurrence as Recurrence
    from bench.model.parts import StepTable as StepTable
    from bench.model.schedule import Schedule as Schedule
    from bench.model.schedule import Step as Step
    from bench.model.schedule import build as build_schedule
    from bench.model.schedule import middle_cycle as middle_cycle
    from bench.model.schedule import middle_sequence as middle_sequence
    from bench.model.schedule import stack as stack
    from bench.model.variant import Variant as Variant
    from bench.model.variant import get_variant as get_variant
    from bench.model.variant import register as register_variant
    from bench.model.variant import variant_class as variant_class
    from bench.model.walk import Walk as Walk
    from bench.store.loops import divergence as divergence
    from bench.store.tracker import Tracker as Tracker
    from bench.store.tracker import register as register_tracker
    from bench.study.profile import profile as profile
    from reports.drawing import register as register_figure

_PLACES = {
    "Adapter": ("bench.model.parts", "Adapter"),
    "AttentionPrefix": ("bench.model.parts", "AttentionPrefix"),
    "CycleConfig": ("bench.model.configuration", "CycleConfig"),
    "CycleForCausalLM": ("bench.model.language_model", "CycleForCausalLM"),
    "CycleForClassification": ("bench.model.language_model", "CycleForClassification"),
    "EarlyExit": ("bench.exits.generation", "EarlyExit"),
    "Flops": ("bench.model.flops", "Flops"),
    "Form": ("bench.form", "Form"),
    "Gate": ("bench.model.parts", "Gate"),
    "Generated": ("bench.data.generated", "Generated"),
    "Metric": ("bench.data.task", "Metric"),
    "ModelConfig": ("bench.config", "ModelConfig"),
    "Objective": ("bench.config", "Objective"),
    "Options": ("bench.config", "Strict"),
    "Recurrence": ("bench.model.parts", "Recurrence"),
    "Results": ("bench.api", "Results"),
    "Rule": ("bench.evaluate.rules", "Rule"),
    "Sample": ("bench.data.task", "Sample"),
    "Schedule": ("bench.model.schedule", "Schedule"),
    "Step": ("bench.model.schedule", "Step"),
    "StepTable": ("bench.model.parts", "StepTable"),
    "Task": ("bench.data.task", "Task"),
    "TaskSize": ("bench.data.task", "TaskSize"),
    "TextOptions": ("bench.data.text", "TextOptions"),
    "Tracker": ("bench.store.tracker", "Tracker"),
    "UserError": ("bench.errors", "UserError"),
    "Variant": ("bench.model.variant", "Variant"),
    "View": ("bench.evaluate.rules", "View"),
    "Walk": ("bench.model.walk", "Walk"),
    "build_schedule": ("bench.model.schedule", "build"),
    "distinct": ("bench.data.generated", "distinct"),
    "divergence": ("bench.store.loops", "divergence"),
    "get_task": ("bench.data.task", "get_task"),
    "get_variant": ("bench.model.variant", "get_variant"),
    "load_results": ("bench.api", "load_results"),
    "load_study": ("bench.api", "open_study"),
    "loop_points": ("bench.evaluate.loops", "loop_points"),
    "make_data": ("bench.data.task", "make_data"),
    "middle_cycle": ("bench.model.schedule", "middle_cycle"),
    "middle_sequence": ("bench.model.schedule", "middle_sequence"),
    "profile": ("bench.study.profile", "profile"),
    "register_figure": ("reports.drawing", "register"),
    "register_gate": ("bench.model.gates", "register"),
    "register_rule": ("bench.evaluate.rules", "register"),
    "register_task": ("bench.data.task", "register"),
    "register_tracker": ("bench.store.tracker", "register"),
    "register_variant": ("bench.model.variant", "register"),
    "run": ("bench.api", "run"),
    "stack": ("bench.model.schedule", "stack"),
    "task_class": ("bench.data.task", "task_class"),
    "text_data": ("bench.data.text", "text_data"),
    "variant_class": ("bench.model.variant", "variant_class"),
}

__all__ = [
    "Adapter",
    "AttentionPrefix",
    "CycleConfig",
    "CycleForCausalLM",
    "CycleForClassification",
    "EarlyExit",
    "Flops",
    "Form",
    "Gate",
    "Generated",
    "Metric",
    "ModelConfig",
    "Objective",
    "Options",
    "Recurrence",
    "Results",
    "Rule",
    "Sample",
    "Schedule",
    "Step",
    "StepTable",
    "Task",
    "TaskSize",
    "TextOptions",
    "Tracker",
    "UserError",
    "Variant",
    "View",
    "Walk",
    "build_schedule",
    "distinct",
    "divergence",
    "get_task",
    "get_variant",
    "load_results",
    "load_study",
    "loop_points",
    "make_data",
    "middle_cycle",
    "middle_sequence",
    "profile",
    "register_figure",
    "register_gate",
    "register_rule",
    "register_task",
    "register_tracker",
    "register_variant",
    "run",
    "stack",
    "task_class",
    "text_data",
    "variant_class",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # start-up

        return version("cyclebench")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
