"""The figures that come with the suite, in the order in which they stand on the page."""

from __future__ import annotations

from bench.store.records import Record
from reports import exit_figures, figures, loops, pictures, targets
from reports.drawing import register


def _zero_attention(record: Record) -> bool:
    return bool(record.zero_attention)


def _exits(record: Record) -> bool:
    return bool(record.exits)


def _examples(record: Record) -> bool:
    return record.exits is not None and bool(record.exits.examples)


def _cycles(record: Record) -> bool:
    return len(record.cycles) > 1


def _loops(record: Record) -> bool:
    return bool(record.loops)


register("accuracy_vs_flops", "Quality against executed compute", bars=True)(figures.accuracy_vs_flops)
register("accuracy_vs_params", "Quality against parameters", bars=True)(figures.accuracy_vs_params)
register("learning_curves", "Learning curves", bars=True)(figures.learning_curves)
register("cost_to_score", "What reaching a score costs")(targets.cost_to_score)
register("zero_attention", "Attention to the zero tokens", needs=_zero_attention)(figures.zero_attention)
register("exit_curves", "Exit rules: quality against executed compute", needs=_exits)(exit_figures.exit_curves)
register("exit_area", "What each exit rule is worth", needs=_exits, bars=True)(exit_figures.exit_area)
register("exit_signal", "Do the signals know whether more cycles help?", needs=_exits, bars=True)(
    exit_figures.exit_signal
)
register("exit_depth", "Where sequences leave", needs=_exits)(exit_figures.exit_depth)
register("exit_examples", "Which pictures leave early?", needs=_examples)(pictures.exit_examples)
register("exit_calibration", "Is the confidence at an exit point to be trusted?", needs=_exits)(
    exit_figures.exit_calibration
)
register("cycles", "Quality against the number of cycles at test time", needs=_cycles, bars=True)(
    exit_figures.cycles_at_test
)
register("loops", "Do the loops converge?", needs=_loops)(loops.state_by_cycle)
register("performance_profile", "Performance profile", over_tasks=True, bars=True)(figures.performance_profile)
