"""What ``python -m bench.perf.gpu`` does, the most valuable first: tests, measurements, a study for what time is left.

What is measured is what ``cyclebench bench`` measures, at sizes of a GPU and in bfloat16. Not in ``bench.perf.gpu``
itself, as the processes of the sections do not know the script that runs.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.errors import first_line, typed_line
from bench.house import HOUSE
from bench.model.variant import variants
from bench.perf import exits, forms, packing, training, waits, zero_tokens
from bench.perf.clock import Emit, Section
from bench.perf.timing import Precision, Row
from bench.run.runner import Running, run_study
from bench.run.upgrade import open_store
from bench.store.environment import git_revision
from bench.store.records import Outcome
from bench.study.load import load_study
from bench.study.plan import Plan, Planned, make_plan
from bench.train.checkpoints import Every

STUDY, PRESET = "from_scratch", "h100"
STOCK = (training.GPT2, training.LLAMA)
PRECISION: Precision = "bfloat16"
STACK, CELL = "d 256", ("ztt", "p_hop")  # the cell of the preset that stacks are measured with besides the quick one
MARK = "pytest.mark.cuda"


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        rounds: turns of every comparison.
        widths: of the models trained beside others', and of zero tokens.
        blocks: of those models.
        families: of those models.
        batch: sequences of a step.
        length: tokens of each.
        compiled: widths and families that are compiled, in this order.
        variants: whose steps are watched for waits; None: all.
        gatings: of zero tokens; as CUDA graphs, each of which holds its memory, the first two.
        seeds: in a stack.
        exits: width, batch, rounds and policies of generation.
        study: overrides of the preset.
        least: seconds without which a section is not begun.
    """

    rounds: int = 12
    widths: tuple[int, ...] = (768, 256)
    blocks: int = 12
    families: tuple[Any, ...] = ("gpt2", "llama")
    batch: int = 32
    length: int = 512
    compiled: tuple[tuple[int, Any], ...] = ((768, "gpt2"), (256, "gpt2"), (768, "llama"), (256, "llama"))
    variants: tuple[str, ...] | None = None
    gatings: tuple[str, ...] = ("attention", "none", "scalar", "head", "channel", "token", "tanh")
    seeds: tuple[int, ...] = (8, 1, 2, 4, 16)
    exits: tuple[tuple[int, int, int, tuple[Any, ...]], ...] = (
        (256, 1, 12, exits.POLICIES),
        (256, 32, 4, exits.POLICIES),
    )
    study: tuple[str, ...] = ()
    least: float = 15.0


TINY_STUDY = (
    *("name=from_scratch-tiny", "model.d_model=16", "model.n_heads=2", "model.n_blocks=4", "seeds=2"),
    *("tasks.p_hop.options.length=16", "tasks.p_hop.options.n_train=200", "tasks.p_hop.options.n_test=20"),
    *("tasks.p_hop.train.steps=4", "tasks.kjv.options.length=16", "tasks.kjv.options.n_train=200"),
    *("tasks.kjv.options.n_valid=10", "tasks.kjv.options.n_test=10", "tasks.kjv.train.steps=4"),
    *("train.batch_size=4", "tasks.kjv.train.batch_size=4", "train.eval_sequences=8"),
    *("variants=[htc, ztt]", "hypotheses=[]", "tasks.p_hop.options.n_valid=20"),
)
SIZES = {
    "full": Size(),
    "tiny": Size(
        rounds=2,
        widths=(32,),
        blocks=1,
        families=("gpt2",),
        batch=2,
        length=16,
        compiled=((32, "gpt2"),),
        variants=("vanilla", "ztt"),
        gatings=("attention", "none"),
        seeds=(1, 2),
        exits=((32, 1, 2, ("recompute",)), (32, 2, 2, ("recompute",))),
        study=TINY_STUDY,
        least=2.0,
    ),
}


@dataclass(frozen=True)
class Setting:
    """Where, how large, and into which folder of results."""

    device: str
    size: str
    runs: Path

    @property
    def sizes(self) -> Size:
        """The size of that name."""
        return SIZES[self.size]

    @property
    def place(self) -> torch.device:
        """The device itself."""
        return torch.device(self.device)


Part = tuple[Row, Callable[[], Iterable[Row]]]
"""What names a part of a section, and what makes its rows."""


def _each(parts: Iterable[Part], emit: Emit) -> None:
    """Tell the rows of all parts. One that fails has a row that says so; raises its error when all have been tried."""
    errors = []
    for about, part in parts:
        try:
            for row in part():
                emit(row)
        except Exception as error:  # whatever a first run on a device may bring
            traceback.print_exc()
            emit(about | {"note": typed_line(error)})
            errors.append(error.with_traceback(None))  # which would keep the part's tensors
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # while a graph is recorded, memory that is kept for reuse cannot be given back
    if errors:
        raise errors[0]


def tests(setting: Setting, emit: Emit) -> None:
    """The tests that need a GPU, one row each."""
    import pytest  # optional: of the tests

    folder = HOUSE / "tests"
    files = sorted(str(path) for path in folder.glob("test_*.py") if MARK in path.read_text())
    if not files:
        emit({"test": "all", "note": f"there are no tests in {folder}"})
        return

    class Told:
        """Makes a row of what pytest reports."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.outcome == "passed":
                return  # what is before and after a test is told of only where it fails or the test is skipped
            row = {"test": report.nodeid.split("/")[-1], "outcome": report.outcome, "seconds": report.duration}
            crash = getattr(report.longrepr, "reprcrash", None)
            emit(row | ({"note": first_line(crash.message)} if crash is not None else {}))

    how = ["-m", "cuda", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(HOUSE)]
    pytest.main([*how, "-c", str(HOUSE / "pyproject.toml"), *files], plugins=[Told()])


def host_waits(setting: Setting, emit: Emit) -> None:
    """What ``bench.perf.waits`` tells."""
    names = setting.sizes.variants or variants.names()
    _each([({"variant": name}, partial(waits.rows, setting.place, name)) for name in names], emit)


def _training(setting: Setting, emit: Emit, mode: str, shapes: Iterable[tuple[int, Any]], rivals: Any) -> None:
    size, parts = setting.sizes, list[Part]()
    how: dict[str, Any] = {"batch": size.batch, "length": size.length, "precision": PRECISION}
    how |= {"loops": (), "kept": (), **rivals}
    for width, family in shapes:
        given: dict[str, Any] = {"eager": (), "compiled": ()} | {mode: [training.shape(width, family, size.blocks)]}
        about = {"model": "all", "family": family, "d_model": width, "mode": mode}
        parts.append((about, partial(training.rows, setting.place, size.rounds, **given, **how)))
    _each(parts, emit)


def eager(setting: Setting, emit: Emit) -> None:
    """Single steps beside other libraries' models, and ours as CUDA graphs."""
    shapes = [(width, family) for family in setting.sizes.families for width in setting.sizes.widths]
    _training(setting, emit, "eager", shapes, {})


def compiled(setting: Setting, emit: Emit) -> None:
    """The same, compiled. A model of others takes most of a minute to compile: they are transformers' alone."""
    _training(setting, emit, "compiled", setting.sizes.compiled, {"rivals": STOCK})


def stacks(setting: Setting, emit: Emit) -> None:
    """Seeds in a stack: of the quick study's cell, and of the preset's."""
    size, parts = setting.sizes, list[Part]()
    wide = next(planned.cell for planned in preset(setting).cells if (planned.variant, planned.task) == CELL)
    cells = {"quick study": packing.cells_of(setting.place)["quick study"], STACK: wide}

    def row(label: str, number: int) -> list[Row]:
        return [packing.measured(label, cells[label], number, setting.place, max(1, size.rounds // 2))]

    for label in cells:
        parts += [({"model": label, "seeds": number}, partial(row, label, number)) for number in size.seeds]
    _each(parts, emit)


def zero_token_forms(setting: Setting, emit: Emit) -> None:
    """Forms of attention with a zero token."""
    size, parts = setting.sizes, list[Part]()
    precision = PRECISION if setting.device == "cuda" else "float32"  # a CPU's kernels are not exact in the other
    for width in size.widths:
        heads = max(1, width // forms.HEAD_DIM)
        made = partial(forms.rows, setting.place, size.rounds, heads, size.batch, size.length, precision)
        parts.append(({"form": "all", "d_model": width}, made))
    _each(parts, emit)


def gates(setting: Setting, emit: Emit) -> None:
    """What the zero token and its gates add to a step, launched kernel by kernel and as CUDA graphs."""
    size, parts = setting.sizes, list[Part]()
    for graph in (False, True) if setting.device == "cuda" else (False,):
        for width in size.widths:
            how: dict[str, Any] = {"batch": size.batch, "length": size.length, "precision": PRECISION, "graph": graph}
            how["gatings"] = size.gatings[: 2 if graph else None]
            made = partial(zero_tokens.rows, setting.place, size.rounds, (width,), **how)
            parts.append(({"gating": "all", "d_model": width, "mode": "graph" if graph else "eager"}, made))
    _each(parts, emit)


def generation(setting: Setting, emit: Emit) -> None:
    """Exits in generation."""
    parts = list[Part]()
    for width, batch, rounds, policies in setting.sizes.exits:
        for policy in policies:
            about = {"policy": policy, "d_model": width, "batch": batch}
            parts.append((about, partial(exits.rows, setting.place, rounds, ((width, batch),), (policy,))))
    _each(parts, emit)


def preset(setting: Setting) -> Plan:
    """The study that what is left of the time is for."""
    changes = [f"train.device={setting.device}", *setting.sizes.study]
    return make_plan(load_study(STUDY, changes, PRESET), f"cyclebench run {STUDY} --preset {PRESET}", git_revision())


def study(setting: Setting, emit: Emit) -> None:
    """The study's cells, a row each as it ends. What is done already is not run again, and what is cut off goes on from
    its checkpoint.
    """
    plan = preset(setting)
    store = open_store(setting.runs, begin=True)
    ids = {planned.cell.id for planned in plan.cells}
    done = sum(map(store.done, ids))
    emit({"cells": f"{done} of {len(ids)} done before"})

    def take(record: Outcome, planned: Planned) -> None:
        nonlocal done
        row: Row = {"variant": planned.variant, "task": planned.task, "seed": planned.cell.seed}
        if record.status == "failed":
            emit(row | {"note": record.reason})
            return
        done += 1
        timing, costs = record.timing, record.costs
        row |= {"cells": f"{done} of {len(ids)}", "stacked": "yes" if record.stacked else "no"}
        row |= {"steps": planned.cell.train.steps, "accuracy": record.test("accuracy")}
        row |= {"train_seconds": timing.train_seconds, "tests_seconds": timing.seconds - timing.train_seconds}
        row |= {"tokens_per_second": timing.tokens_per_second}
        emit(row | {"flops_per_second": costs.train_flops / max(timing.train_seconds, 1e-9)})

    run_study(plan, store, Running(every=Every(30.0)), take)


def sections(size: Size) -> list[Section]:
    """All of them in their order; shares are of the time that is left when a section begins."""

    def one(name: str, title: str, run: Callable[[Any, Emit], None], share: float) -> Section:
        return Section(name, title, run, share, size.least)

    return [
        one("tests", "the tests that need a GPU", tests, 14),
        one("waits", waits.TITLE, host_waits, 10),
        one("training", training.TITLE.replace("float32", PRECISION), eager, 20),
        one("compiled", training.TITLE.replace("float32", PRECISION), compiled, 24),
        one("packing", packing.TITLE, stacks, 12),
        one("forms", forms.TITLE, zero_token_forms, 6),
        one("gates", zero_tokens.TITLE, gates, 8),
        one("exits", exits.TITLE, generation, 8),
        one("study", f"cells of {STUDY} at its preset {PRESET}, as they end", study, 18),
    ]
