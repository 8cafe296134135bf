"""The builders against the sharing maps stated on their own: for step i of L, R repeats, b blocks to share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.costs import pass_flops
from bench.model.flops import Flops
from bench.model.gates import gates
from bench.model.network import Network
from bench.model.schedule import Schedule, Step, build, cycle, middle_cycle, middle_sequence, sequence, stack
from bench.model.variant import get_variant

SIZES = st.integers(1, 12)
ENDS = st.integers(0, 3)


def blocks(schedule: Schedule) -> list[int]:
    return [step.block for step in schedule.steps]


@given(SIZES)
def test_stack_runs_every_block_once(n: int) -> None:
    schedule = stack(n)
    assert blocks(schedule) == list(range(n))
    assert schedule.exits == (n,)


@given(SIZES, SIZES)
def test_cycle_map(b: int, repeats: int) -> None:
    assert blocks(cycle(b, repeats)) == [i % b for i in range(b * repeats)]


@given(SIZES, SIZES)
def test_sequence_map(b: int, repeats: int) -> None:
    assert blocks(sequence(b, repeats)) == [i // repeats for i in range(b * repeats)]


@given(SIZES, SIZES)
def test_middle_cycle_map(b: int, repeats: int) -> None:
    depth = b * repeats + 2
    expected = [0, *(1 + (i - 1) % b for i in range(1, depth - 1)), b + 1]
    assert blocks(middle_cycle(b + 2, repeats)) == expected


@given(SIZES, SIZES)
def test_middle_sequence_map(b: int, repeats: int) -> None:
    depth = b * repeats + 2
    expected = [0, *(1 + (i - 1) // repeats for i in range(1, depth - 1)), b + 1]
    assert blocks(middle_sequence(b + 2, repeats)) == expected


@given(SIZES, SIZES, ENDS, ENDS)
def test_parts_partition_the_schedule(b: int, repeats: int, prelude: int, coda: int) -> None:
    for make in (middle_cycle, middle_sequence):
        schedule = make(b + prelude + coda, repeats, prelude, coda)
        assert schedule.prelude + schedule.recurrent + schedule.coda == schedule.steps
        assert sum(schedule.cycles, ()) == schedule.recurrent
        assert [step.depth for step in schedule.steps] == list(range(schedule.depth))
        assert schedule.n_blocks == b + prelude + coda
        assert schedule.depth == prelude + b * repeats + coda


@given(SIZES, SIZES, ENDS, ENDS)
def test_cycles_are_equal_passes_and_number_the_uses(b: int, repeats: int, prelude: int, coda: int) -> None:
    schedule = middle_cycle(b + prelude + coda, repeats, prelude, coda)
    assert schedule.n_cycles == repeats
    for number, steps in enumerate(schedule.cycles):
        assert [step.block for step in steps] == list(range(prelude, prelude + b))
        assert {step.cycle for step in steps} == {number}
    assert all(step.cycle == 0 for step in schedule.prelude + schedule.coda)


def test_too_few_blocks_are_refused_not_dropped() -> None:
    with pytest.raises(UserError, match=r"model\.n_blocks: 2 leaves no block to cycle .*at least 3"):
        middle_cycle(2, 3)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("gap in the blocks", {"blocks": [0, 2]}),
        ("no steps", {"blocks": []}),
        ("prelude and coda overlap", {"blocks": [0, 1], "n_prelude": 2, "n_coda": 1}),
        ("exits do not end at the coda", {"blocks": [0, 1, 1], "n_prelude": 1, "exits": [2]}),
        ("exits go back", {"blocks": [0, 0, 0], "exits": [2, 1, 3]}),
    ],
)
def test_impossible_schedules_are_refused(kind: str, arguments: dict[str, list[int]]) -> None:
    with pytest.raises(UserError, match=r"^schedule: .+"):
        build(**arguments)


def test_step_says_which_use_of_the_block_it_is() -> None:
    assert build([0, 1, 0, 1]).steps[2:] == (Step(0, 1, 2), Step(1, 1, 3))


def test_which_schedule_goes_on_from_another() -> None:
    short, long = middle_cycle(4, 2), middle_cycle(4, 5)
    assert long.goes_on(short) and short.goes_on(short) and not short.goes_on(long)
    assert not sequence(3, 5).goes_on(sequence(3, 2)) and stack(3).goes_on(stack(3))
    assert not middle_cycle(4, 5, 1, 2).goes_on(short)
    # The coda uses a cycled block: once more than before, however many cycles that is.
    ends = [build([0, *[1] * n, 1, 2], 1, 2, exits=range(2, n + 2)) for n in (2, 3)]
    assert not ends[1].goes_on(ends[0])


def test_a_gate_is_asked_at_its_own_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's example halves the updates of the cycled steps, those of untrained cycles too, and of no others."""
    page = (Path(__file__).parents[1] / "docs" / "howto" / "gate.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "half"}
    monkeypatch.setattr(gates, "_found", dict(gates.items()))
    exec(page.partition('title="half.py"\n')[2].partition("```")[0], names)
    half, asked, counted = names["Half"], [], []
    merge = half.merge
    monkeypatch.setattr(half, "merge", lambda self, step, *rest: asked.append(step.depth) or merge(self, step, *rest))
    monkeypatch.setattr(half, "heads", lambda self, step, hidden: asked.append(step.depth))
    monkeypatch.setattr(half, "flops", lambda self, step, length: counted.append(step.depth) or Flops())
    lm = Network(
        get_variant("ztt", {"gating": "half"}), ModelConfig(d_model=8, n_heads=2, n_blocks=4, n_cycles=2), 5, 6
    )
    lm.reset_parameters(0)
    for n_cycles in (None, 4):
        asked.clear(), counted.clear()
        lm(torch.arange(5).view(1, 5), n_cycles=n_cycles)
        pass_flops(lm, 5, n_cycles)
        steps = [step.depth for step in lm.schedule_at(n_cycles).recurrent]
        assert steps == list(range(1, 1 + 2 * (n_cycles or 2)))
        assert sorted(asked) == sorted(3 * steps) and sorted(counted) == steps
