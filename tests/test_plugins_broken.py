"""Plug-ins that are wrong: each is told in one line that names it, and costs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import llama
from matplotlib.figure import Figure
from records import MANIFEST, RESULTS
from test_hypotheses import TINY

from bench.config import IGNORED, ModelConfig
from bench.data.generated import Generated
from bench.data.task import Metric, Sample, Task, make_data, register, task_data, tasks
from bench.errors import UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.rules import Rule, get_rule, rules
from bench.evaluate.rules import register as register_rule
from bench.model.gates import gates
from bench.model.gates import register as register_gate
from bench.model.network import Network
from bench.model.parts import Gate
from bench.model.variant import get_variant, variant_class
from bench.model.variant import register as register_variant
from bench.pretrained.convert import convert
from bench.pretrained.sources import load, outline
from bench.registry import Registry
from bench.store.store import Store
from bench.store.tracker import Tracker, trackers
from bench.study.load import study_from
from bench.study.plan import make_plan
from bench.study.profile import profile
from reports.drawing import figures
from reports.drawing import register as register_figure
from reports.look import STYLE
from reports.page import write_report
from reports.pool import MANY, renderers
from reports.render import rendered


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What a test registers is gone after it."""
    kinds: list[Registry[Any]] = [tasks, rules, gates, figures]
    before = [dict(kind.items()) for kind in kinds]
    yield
    for kind, known in zip(kinds, before, strict=True):
        kind._found = known
    task_data.__globals__["_build"].cache_clear()


def returning(made: Callable[[Any, Any], Any]) -> type[Gate]:
    class Broken(Gate):
        """What a step gives is what ``made`` makes of the stream and the update."""

        def merge(self, step: Any, branch: Any, hidden: Any, update: Any, zero_attention: Any) -> Any:
            return made(hidden, update)

    return Broken


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda hidden, update: None,
            "TypeError: gate 'broken': merge() returns None (allowed: the new stream, a tensor (",
        ),
        (
            lambda hidden, update: (hidden + update)[:, :-1],
            "TypeError: gate 'broken': merge() returns a tensor (1, 1",
        ),
        (lambda hidden, update: 1 / 0, "ZeroDivisionError: division by zero (test_plugins_broken.py, line "),
    ],
)
def test_a_gate_that_does_not_fit_is_refused_before_anything_runs(made: Any, told: str) -> None:
    register_gate("broken")(returning(made))
    raw: dict[str, Any] = {"name": "s", "question": "why", "tasks": [{"name": "p_hop", "options": TINY}], "seeds": 1}
    raw |= {"variants": ["htc", {"name": "ztt", "options": {"gating": "broken"}}]}
    raw |= {"model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2}}  # so small that it may be stacked
    for where, ask in (
        ("ztt on p_hop", lambda: make_plan(study_from(raw, (), "s"), "cmd", None)),
        ("ztt", lambda: profile(["ztt"], ["variants.ztt.options.gating=broken"], 16, 8)),
    ):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value).startswith(f"{where}: {told}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "targets", "told"),
    [
        (8, 4, "split 'train' has the token 7 (allowed: 0 to 3)"),
        (4, 8, "split 'train' has the token 7 (allowed: 0 to 3)"),
        (4, IGNORED, f"split 'train' has no target that is scored: all are {IGNORED}"),
        (4, -7, "split 'train' has the token -7 (allowed: 0 to 3)"),
        (4, None, "ZeroDivisionError: integer division or modulo by zero (test_plugins_broken.py, line "),
    ],
)
def test_data_that_no_model_can_be_trained_on_are_one_line(ids: int, targets: int | None, told: str) -> None:
    @register("broken")
    class Broken(Generated):
        """Sequences of ``ids`` different tokens; targets of so many, or one below zero."""

        vocab_size = 4  # type: ignore[assignment]

        def sample(self, count: int, rng: np.random.Generator) -> Sample:
            drawn = rng.integers(ids, size=(count, 12))
            if targets is None:
                return Sample(drawn, drawn * (1 // 0))
            last = np.full_like(drawn, targets) if targets < 0 else rng.integers(targets, size=drawn.shape)
            if targets == -7:
                last[:, 1:] = 0
            return Sample(drawn, last)

    with pytest.raises(UserError) as error:
        task_data("broken", {"n_train": 50, "n_valid": 10, "n_test": 20})
    assert str(error.value).startswith("task 'broken': its data cannot be made: ") and told in str(error.value)


def test_a_task_without_data_says_what_it_lacks() -> None:
    def pair(self: Any, count: int, rng: np.random.Generator) -> Any:
        return rng.integers(4, size=(count, 12)), np.zeros((count, 12), np.int64)

    for base, body, told in (
        (Task, {}, "NotImplementedError: Own has no build()"),
        (Generated, {"vocab_size": 4}, "NotImplementedError: Own has no sample()"),
        (Generated, {"vocab_size": 4, "sample": pair}, "TypeError: sample() returns (array("),
    ):
        tasks._found.pop("own", None)  # type: ignore[attr-defined]
        register("own")(type("Own", (base,), body))
        with pytest.raises(UserError) as error:
            task_data("own", {})
        assert str(error.value).startswith(f"task 'own': its data cannot be made: {told}")


@pytest.mark.parametrize(
    ("signal", "told"),
    [
        (lambda view: view.hidden.mean(), r"its signal has the shape \(\) \(allowed: \(4, 6\), \[B, T\]\)"),
        (lambda view: view.hidden, r"its signal has the shape \(4, 6, 8\)"),
        (lambda view: 0.5, r"its signal has the shape \(\)"),
        (lambda view: view.hidden[..., 0] / 0 * 0, "its signal is NaN for 4 of 4 sequences"),
        (lambda view: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_rule_whose_signal_is_none_is_named(signal: Any, told: str) -> None:
    @register_rule("broken")
    class Broken(Rule):
        """Reads what it likes."""

        leave = "above"

        def signal(self, view: Any, previous: Any) -> Any:
            return signal(view)

    torch.manual_seed(0)
    lm = Network(get_variant("htc", {}), ModelConfig(d_model=8, n_heads=2, n_blocks=3, n_cycles=2), 5, 6)
    ids = np.arange(24).reshape(4, 6) % 5
    with pytest.raises((ValueError, RuntimeError), match=f"exit rule 'broken': .*{told}"):
        evaluate(lm, ids, ids, rules=[get_rule("broken")])


class Fitting(Rule):
    """Leaves by the number of cycles."""

    leave = "above"

    def signal(self, view: Any, previous: Any) -> Any:
        return torch.full(view.hidden.shape[:2], float(view.number))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"signal": lambda self, view, previous: view.hidden}, r"ValueError: its signal has the shape \(1, 2, 8\)"),
        ({"signal": lambda self, view, previous: view.hidden[..., 0] * torch.nan}, "ValueError: its signal is NaN"),
        ({"usable": lambda self, view: 1 / 0}, "ZeroDivisionError"),
        ({"pool": lambda self, signal, real=None: signal}, r"ValueError: it pools .* into the shape \(1, 2\)"),
        ({"leaves": lambda self, signal, threshold: 1 / 0}, "ZeroDivisionError"),
        (
            {"signal": lambda self, view, previous: view.now.entropy},
            r".*without reads_logits and reads_zero_attention = True",
        ),
        (
            {"signal": lambda self, view, previous: view.zero_attention[0, :, 0]},
            r".*'NoneType' object is not subscriptable .*=",
        ),
        ({"signal": lambda self, view, previous: view.now.entropy, "reads_logits": True}, ""),
        ({}, ""),
    ],
)
def test_a_rule_that_does_not_work_is_refused_before_anything_runs(wrong: dict[str, Any], told: str) -> None:
    """Whether or not the study names it: every cell reads all rules."""
    register_rule("broken")(type("Broken", (Fitting,), wrong))
    raw: dict[str, Any] = {"name": "s", "question": "why", "tasks": [{"name": "p_hop", "options": TINY}], "seeds": 1}
    made = study_from({**raw, "variants": ["ztt"], "model": {"d_model": 16, "n_heads": 4}}, (), "s")
    if not told:
        assert len(make_plan(made, "cmd", None).cells) == 1
        return
    with pytest.raises(UserError, match=rf"ztt on p_hop: RuntimeError: exit rule 'broken': {told}"):
        make_plan(made, "cmd", None)


@pytest.mark.parametrize("aggregates", [(), "last", ("median",), ["mean"], None])
def test_a_rule_pools_in_ways_that_there_are(aggregates: Any) -> None:
    with pytest.raises(UserError, match=r"exit rule 'odd': aggregates = .* \(allowed: a tuple of mean, last, max\)"):
        register_rule("odd")(type("Odd", (Fitting,), {"aggregates": aggregates}))
    with pytest.raises(UserError, match="exit rule name 'oracle' is that of a bound"):
        register_rule("oracle")(Fitting)


def test_a_task_that_gives_nothing_is_one_line() -> None:
    @register("nothing")
    class Nothing(Task):
        """No data."""

        def build(self) -> Any:
            return None

    @register("drawing")
    class Drawn(Generated):
        """Its length is seen by drawing one, before the data are made."""

        vocab_size = 4  # type: ignore[assignment]

        def sample(self, count: int, rng: np.random.Generator) -> Sample:
            raise FileNotFoundError("words.txt")

    raw: dict[str, Any] = {"name": "s", "question": "why", "variants": ["htc"], "seeds": 1}
    for name, told in (
        ("nothing", "task 'nothing': its data cannot be made: TypeError: build() returns None, which is no TaskData"),
        ("drawing", "task 'drawing': FileNotFoundError: words.txt (test_plugins_broken.py, line "),
    ):
        with pytest.raises(UserError) as error:
            make_plan(study_from({**raw, "tasks": [name]}, (), "s"), "cmd", None)
        assert str(error.value).startswith(told)


def test_a_rule_says_on_which_side_it_leaves() -> None:
    with pytest.raises(UserError, match=r"exit rule 'aside': leave = 'sideways' \(allowed: above, below\)"):
        register_rule("aside")(type("Aside", (Rule,), {"leave": "sideways"}))
    with pytest.raises(UserError, match=r"exit rule 'silent': leave = None"):
        register_rule("silent")(type("Silent", (Rule,), {}))


@pytest.mark.parametrize("name", ["", "my rule", "kl.mean", "a/b", "ü", "a\nb", "-a", 3])
def test_names_that_files_and_trackers_cannot_hold_are_refused(name: Any) -> None:
    with pytest.raises(UserError, match=r"gate name .* \(allowed: letters, digits, - and _\)"):
        register_gate(name)(returning(lambda hidden, update: hidden))


def unreadable(*_: Any) -> Figure:
    figure = Figure()
    figure.text(0, 0, r"$\frac{1}$")
    return figure


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *_: 5, "TypeError: it returns 5, which is no matplotlib Figure, and not None"),
        (unreadable, "ValueError:"),
    ],
)
def test_a_figure_that_cannot_be_drawn_costs_only_itself(
    draw: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_found", {"accuracy_vs_flops": figures.get("accuracy_vs_flops")})
    register_figure("broken", "Broken")(draw)
    paths = write_report(MANIFEST, RESULTS, tmp_path)
    said = "figure 'broken' of p_hop could not be drawn: "
    assert f"warning: {said}{told}" in capsys.readouterr().err
    for name in ("report.md", "report.html"):
        assert said.replace("'", "&#39;") in (text := (tmp_path / name).read_text()) or said in text, name
    assert "accuracy_vs_flops_p_hop.png" in {path.name for path in paths}


def test_a_figure_that_cannot_be_sent_is_rendered_here() -> None:
    """A formatter that is a function of its own cannot be pickled; the reports of small studies need not send it."""
    figure = Figure()
    figure.subplots().xaxis.set_major_formatter(lambda value, _: f"{value:g}!")
    with renderers(MANY) as pool:
        assert pool is not None
        (files,) = rendered([(figure, "cells")], ("png",), STYLE, pool)
    assert isinstance(files, dict) and files["png"].startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"figure 'untitled': title = ' ' \(allowed: a text\)"):
        register_figure("untitled", " ")(lambda *_: None)


def test_a_tracker_that_fails_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Tracker):
        """Keeps nothing."""

        name = "broken"
        seen = 0

        def log(self, record: Any, place: Any) -> None:
            type(self).seen += 1
            raise RuntimeError("no room")

    tracker = Broken("nowhere", Store(tmp_path))
    tracker.begin(MANIFEST)
    for cell in MANIFEST.cells[:3]:
        tracker.add(RESULTS[MANIFEST.cells[0].id], cell)
    assert tracker.broken and Broken.seen == 1 and not tracker.known
    said = "warning: tracker 'broken' has failed, results are kept in the store, and a later command adds them: "
    assert capsys.readouterr().err == f"{said}RuntimeError: no room\n"


def test_a_gate_is_tested_as_it_was_trained() -> None:
    """It sees the zero attention where it says that it reads it, not where a rule happens to look on."""
    seen = []

    class Asking(Gate):
        """Keeps what it is given."""

        def merge(self, step: Any, branch: Any, hidden: Any, update: Any, zero_attention: Any) -> Any:
            seen.append(zero_attention is not None)
            return hidden + update

    shape, ids = ModelConfig(d_model=8, n_heads=2, n_blocks=3, n_cycles=2), np.arange(24).reshape(4, 6) % 5
    for reads in (False, True):
        kind = register_gate("asking")(type("Asking", (Asking,), {"reads_zero_attention": reads}))
        lm = Network(get_variant("ztt", {"gating": "asking"}), shape, 5, 6)
        lm.reset_parameters(0)
        assert isinstance(lm.gate, kind)
        for watching in ([], [get_rule("confidence"), get_rule("zero_attention")]):
            seen.clear()
            evaluate(lm, ids, ids, rules=watching)
            assert set(seen) == {reads}
        del gates._found["asking"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (register, "task 'x': {} is no Task (allowed: a subclass of cyclebench.Task)"),
        (register_rule, "exit rule 'x': {} is no Rule (allowed: a subclass of cyclebench.Rule)"),
        (register_gate, "gate 'x': {} is no Gate (allowed: a subclass of cyclebench.Gate)"),
        (register_variant, "variant 'x': {} is no Variant (allowed: a subclass of cyclebench.Variant)"),
        (trackers.register, "tracker 'x': {} is no Tracker (allowed: a subclass of cyclebench.Tracker)"),
    ],
)
def test_what_has_another_base_is_refused_when_it_is_registered(kind: Any, told: str) -> None:
    for thing, called in ((type("R", (), {}), "R"), (returning, "returning"), (7, "7")):
        with pytest.raises(UserError) as error:
            kind("x")(thing)
        assert str(error.value) == told.format(called)


def test_names_that_mean_something_else_are_refused() -> None:
    with pytest.raises(UserError, match="gate name 'none' stands for no gate"):
        register_gate("none")(returning(lambda hidden, update: hidden))
    with pytest.raises(UserError, match=r"the metric 'f1' is not scored \(allowed: accuracy, loss\)"):
        ids = np.zeros((3, 4), dtype=np.int64)
        make_data({name: (ids, ids) for name in ("train", "valid", "test")}, 2, Metric("f1", True, {}))
    with pytest.raises(UserError, match="variant name 'ouro' is the name of a published configuration"):
        register_variant("ouro")(type("Ouro", (variant_class("htc"),), {}))


def test_a_part_that_does_not_set_its_parameters_is_refused(tmp_path: Path) -> None:
    """What memory happens to hold would be where it should start from."""
    source = llama(tmp_path / "llama")

    class Scaling(Gate):
        """An update times a vector."""

        def __init__(self, model: Any, steps: Any) -> None:
            super().__init__(model, steps)
            self.scale = torch.nn.Parameter(torch.ones(model.d_model))

        def merge(self, step: Any, branch: Any, hidden: Any, update: Any, zero_attention: Any) -> Any:
            return hidden + self.scale * update

    register_gate("scaling")(Scaling)
    model = outline(source).shape.model_copy(update={"n_cycles": 2})
    variant = get_variant("ztt", {"gating": "scaling"}, pretrained=True)
    raw: dict[str, Any] = {"name": "s", "question": "why", "tasks": [{"name": "p_hop", "options": TINY}], "seeds": 1}
    raw |= {"variants": [{"name": "ztt", "options": {"gating": "scaling"}}]}
    study = study_from({**raw, "model": {"d_model": 16, "n_heads": 2, "n_blocks": 3, "n_cycles": 2}}, (), "s")
    for begin in (lambda: convert(load(source), variant, model), lambda: make_plan(study, "cmd", None)):
        with pytest.raises(UserError, match=r"variant 'ztt': gate\.scale is not set by reset_parameters\(\)"):
            begin()
    Scaling.reset_parameters = lambda self: torch.nn.init.ones_(self.scale)  # type: ignore[method-assign,assign,attr-defined]
    assert (convert(load(source), variant, model).gate.scale == 1).all()
    assert make_plan(study, "cmd", None).cells
