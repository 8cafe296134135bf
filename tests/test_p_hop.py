"""p-hop data against a brute-force oracle that knows only the definition."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config import IGNORED
from bench.data.batches import arrays
from bench.data.p_hop import hop_targets
from bench.data.task import TaskData, get_task, sequences_as_values
from bench.errors import UserError

SMALL = {"length": 24, "n_train": 600, "n_valid": 100, "n_test": 200}


def oracle(symbols: list[int], position: int, hops: int) -> int:
    for _ in range(hops):
        earlier = [j for j in range(position) if symbols[j] == symbols[position]]
        if not earlier:
            return IGNORED
        position = earlier[-1] + 1
    return symbols[position]


def make(**options: object) -> TaskData:
    return get_task("p_hop", {**SMALL, **options}).build()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(3, 6), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_targets_equal_the_definition(length: int, alphabet: int, hops: int, seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(alphabet, size=(3, length))
    found = hop_targets(symbols, np.full(3, hops), alphabet)
    assert found.tolist() == [[oracle(list(row), t, hops) for t in range(length)] for row in symbols]


@pytest.mark.parametrize("hops", [1, 3])
def test_every_dense_label_is_right_and_none_is_left_out(hops: int) -> None:
    ids, targets = arrays(make(hops=hops).test)
    for row, labels in zip(ids.tolist(), targets.tolist(), strict=True):
        assert labels == [oracle(row, t, hops) for t in range(len(row))]
        assert all(a != b for a, b in pairwise(row))


def test_sparse_form_scores_the_last_position_only() -> None:
    ids, targets = arrays(make(hops=4, dense=False).test)
    assert (targets[:, :-1] == IGNORED).all()
    assert targets[:, -1].tolist() == [oracle(row, len(row) - 1, 4) for row in ids.tolist()]


def test_hops_drawn_for_each_sequence_are_told_in_its_first_token() -> None:
    data = make(hops=[0, 2, 3])
    ids, targets = arrays(data.test)
    assert data.vocab_size == 4 + 3 and data.length == SMALL["length"] + 1
    for row, labels in zip(ids.tolist(), targets.tolist(), strict=True):
        hops = [0, 2, 3][row[0] - 4]
        assert labels[0] == IGNORED
        assert labels[1:] == [oracle(row[1:], t, hops) for t in range(len(row) - 1)]
    assert set(ids[:, 0]) == {4, 5, 6}


@pytest.mark.parametrize("dense", [True, False])
def test_splits_do_not_overlap_and_nothing_repeats(dense: bool) -> None:
    data = make(length=8, dense=dense, hops=1)  # a space small enough for chance to repeat sequences
    every = np.concatenate([sequences_as_values(arrays(split)[0]) for split in (data.train, data.valid, data.test)])
    assert len(every) == 900 and len(np.unique(every)) == 900


def test_position_and_symbol_frequency_do_not_give_the_answer_away() -> None:
    """In the sparse form: the best constant answer, fitted on train, stays at 1 / alphabet on test."""
    data = make(hops=4, dense=False, length=48, n_train=8000, n_test=8000)
    train, test = arrays(data.train)[1][:, -1], arrays(data.test)[1][:, -1]
    best = np.bincount(train).argmax()
    error = np.sqrt(0.25 * 0.75 / len(test))
    assert abs((test == best).mean() - 0.25) < 4 * error
    for position in (0, 20, 46):  # no place of the sequence holds the answer more often than its neighbours' law allows
        share = (arrays(data.test)[0][:, position] == test).mean()
        assert share < 0.40, position


def test_chance_is_what_a_predictor_without_context_reaches() -> None:
    data = make(hops=1, n_train=5000, n_test=2000)
    ids, targets = arrays(data.test)
    guesses = (ids + 1) % 4  # a symbol is never its own successor: one of the three others
    scored = targets != IGNORED
    assert data.metric.levels["chance"] == pytest.approx((guesses == targets)[scored].mean(), abs=0.04)
    assert 1 / 3 - 0.03 < data.metric.levels["chance"] < 0.42


def test_fingerprint_follows_the_content() -> None:
    same, other = make(), make(seed=1)
    assert make().fingerprint == same.fingerprint != other.fingerprint


def test_the_test_split_does_not_depend_on_the_size_of_the_others() -> None:
    np.testing.assert_array_equal(arrays(make().test)[0], arrays(make(n_train=50).test)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": -1}, r"p_hop\.options\.hops.*greater than or equal to 0.*-1"),
        ({"hops": [1, 1]}, r"different"),
        ({"hopps": 2}, r"unknown key .*'hopps'; did you mean 'hops'"),
        ({"length": 4, "alphabet": 3, "hops": 1}, r"length = 4.*too few different sequences"),
        ({"hops": 50, "dense": False}, r"hops = 50.*allowed: fewer hops"),
        ({"alphabet": 2}, r"alphabet.*greater than or equal to 3.*2"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)
