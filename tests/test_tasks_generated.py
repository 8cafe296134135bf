"""Every generated task against a solver that reads tokens only, and what all of them promise."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from test_p_hop import oracle as hop_oracle

from bench.config import IGNORED
from bench.data.addition import PAD
from bench.data.batches import arrays
from bench.data.generated import Generated
from bench.data.task import COLUMNS, Metric, Sample, TaskData, get_task, make_data, sequences_as_values, tasks
from bench.errors import UserError

Row, Options = list[int], dict[str, Any]
Solved = tuple[Row, dict[str, int]]  # targets and slice labels of a sequence

SETTINGS: dict[str, tuple[str, Options]] = {
    "p_hop": ("p_hop", {"hops": [1, 3], "length": 24}),
    "addition": ("addition", {"test_numbers": [3, 12]}),
    "addition-2-digits": ("addition", {"digits": 2, "min_numbers": 3, "max_numbers": 9, "test_numbers": [4]}),
    "modular_chain": ("modular_chain", {"test_variables": [4, 9]}),
    "modular_chain-shuffled": ("modular_chain", {"order": "shuffled", "queries": 1, "variables": 8, "modulus": 5}),
    "mqar": ("mqar", {"test_shapes": [[80, 16], [128, 4]]}),
    "mqar-zero": ("mqar", {"pairs": [2, 8], "filler": "zero", "power": 1.0}),
    "recall": ("recall", {"length": 32, "test_lengths": [16, 64]}),
    "recall-noisy": ("recall", {"noise": 0.8, "length": 32, "alphabet": 8}),
    "selective_copy": ("selective_copy", {"test_lengths": [20, 96]}),
    "memorisation": ("memorisation", {}),
    "state_tracking": ("state_tracking", {"length": 12, "test_lengths": [5, 40]}),
    "state_tracking-parity": ("state_tracking", {"group": "parity", "length": 20}),
}


@cache
def build(setting: str, **changes: Any) -> TaskData:
    name, options = SETTINGS[setting]
    return get_task(name, {"n_train": 300, "n_valid": 50, "n_test": 150, **options, **changes}).build()


def solve_p_hop(row: Row, options: Options) -> Solved:
    hops = options["hops"][row[0] - 4]
    return [IGNORED, *(hop_oracle(row[1:], t, hops) for t in range(len(row) - 1))], {"hops": hops}


def solve_addition(row: Row, options: Options) -> Solved:
    text = "".join("0123456789+=."[token] for token in row)
    assert re.fullmatch(r"\d+(\+\d+)+=\d+\.*", text)
    question, _ = text.split("=")
    numbers = [int(number) for number in question.split("+")]
    most = max(options.get("max_numbers", 4), *options["test_numbers"])
    answer = f"{sum(numbers):0{len(str(most * int('9' * options.get('digits', 3))))}d}"
    assert (question + "=" + answer)[: len(text)] == text[: len(question) + 1 + len(answer)]
    targets = [IGNORED] * len(row)
    targets[len(question) : len(question) + len(answer)] = map(int, answer)
    return targets, {"numbers": len(numbers)}


def solve_modular_chain(row: Row, options: Options) -> Solved:
    modulus, mark = options.get("modulus", 7), row.index(max(row))
    line = {row[at]: row[at + 1 : at + 3] for at in range(0, mark, 3)}

    def value(token: int) -> int:
        return token if token < modulus else sum(map(value, line[token])) % modulus

    def depth(token: int) -> int:
        return 0 if token < modulus else 1 + max(map(depth, line[token]))

    assert len(line) == mark // 3 and len(set(row[mark + 1 :])) == len(row) - mark - 1
    names = list(line)
    in_order = all(term < modulus or term in names[:at] for at, name in enumerate(names) for term in line[name])
    assert in_order or options.get("order") == "shuffled"
    queries = row[mark + 1 :]
    return [IGNORED] * (mark + 1) + [value(token) for token in queries], {"depth": max(map(depth, queries))}


def solve_mqar(row: Row, options: Options) -> Solved:
    """K is known by the length; or, among zeros, seen: a random filler could look like one more pair."""
    if options.get("filler") == "zero":
        k = next(k for k in range(len(row)) if row[2 * k + 1] < 128)
    else:
        k = {64: 4, **dict(options["test_shapes"])}[len(row)]
    assert sorted(token for token in row[2 * k :] if token in row[0 : 2 * k : 2]) == sorted(row[0 : 2 * k : 2])
    value = dict(zip(row[0 : 2 * k : 2], row[1 : 2 * k : 2], strict=True))
    assert len(value) == len(set(value.values())) == k and 0 < min(value) <= max(value) < 128 <= min(value.values())
    targets = [value.get(token, IGNORED) if at >= 2 * k and at % 2 == 0 else IGNORED for at, token in enumerate(row)]
    if options.get("filler") == "zero":
        assert all(token == 0 for at, token in enumerate(row) if at >= 2 * k and targets[at] == IGNORED)
    return targets, {"pairs": k}


def solve_recall(row: Row, options: Options) -> Solved:
    alphabet, known, targets = options.get("alphabet", 16), {}, []
    for key, value in zip(row[::2], row[1::2], strict=True):
        assert (key < alphabet // 2 <= value < alphabet) or min(key, value) >= alphabet
        assert known.get(key, value) == value or key >= alphabet
        targets += [known.get(key, IGNORED), IGNORED]
        if key < alphabet:
            known[key] = value
    assert targets[-2] != IGNORED
    return targets, {}


def solve_selective_copy(row: Row, options: Options) -> Solved:
    assert row.count(15) == 1 and set(row[row.index(15) + 1 :]) == {14}
    symbols = [token for token in row if token < 14]
    return [IGNORED] * (len(row) - len(symbols)) + symbols, {}


def solve_memorisation(row: Row, options: Options) -> Solved:
    known = {}  # from the train split alone
    for ids, labels in zip(*arrays(build("memorisation").train), strict=True):
        known.update(zip(ids[::2].tolist(), labels[1::2].tolist(), strict=True))
    assert sorted(known) == list(range(127)) and sorted(known.values()) == list(range(127, 254))
    assert set(row[1::2]) == {255}
    return [known[row[at - 1]] if at % 2 else IGNORED for at in range(len(row))], {}


def solve_state_tracking(row: Row, options: Options) -> Solved:
    if options.get("group") == "parity":
        return [sum(row[: t + 1]) % 2 for t in range(len(row))], {}
    moves = list(permutations(range(5)))
    things, states = list(range(5)), []
    for token in row:
        things = [moves[token][thing] for thing in things]
        states.append(moves.index(tuple(things)))
    return states, {}


SOLVERS: dict[str, Callable[[Row, Options], Solved]] = {
    name.removeprefix("solve_"): solver for name, solver in globals().items() if name.startswith("solve_")
}
METRIC = Metric("accuracy", True, {})
every = pytest.mark.parametrize("setting", SETTINGS)


def test_every_generated_task_has_a_setting_and_a_solver() -> None:
    names = {name for name in tasks.names() if issubclass(tasks.get(name), Generated)}
    assert names == set(SOLVERS) == {name for name, _ in SETTINGS.values()} and len(names) == 8


@every
def test_the_solver_agrees_with_every_label_and_slice(setting: str) -> None:
    name, options = SETTINGS[setting]
    data = build(setting)
    for split_name, split in data.splits.items():
        sliced = {axis: split[axis] for axis in split.column_names if axis not in COLUMNS}
        for at, (row, targets) in enumerate(zip(*(column.tolist() for column in arrays(split)), strict=True)):
            if at == 100:
                break
            expected, labels = SOLVERS[name](row, options)
            assert targets == expected, (split_name, row)
            if split_name not in ("train", "valid"):
                assert {axis: found[at] for axis, found in sliced.items()} == {k: str(v) for k, v in labels.items()}


@every
def test_columns_and_tokens(setting: str) -> None:
    data = build(setting)
    used = set()
    for name, split in data.splits.items():
        assert split.column_names[:2] == ["input_ids", "targets"]
        if name in ("train", "valid"):
            assert len(split.column_names) == 2
        ids, targets = arrays(split)
        assert len(ids) == {"train": 300, "valid": 50}.get(name, 150) and ids.shape == targets.shape
        assert ids.shape[1] == data.length or name in data.tests
        scored = targets != IGNORED
        assert scored.any(1).all() and targets[~scored].min(initial=IGNORED) == IGNORED
        assert ids.min() >= 0 and max(ids.max(), targets.max()) < data.vocab_size and targets[scored].min() >= 0
        used |= set(ids.ravel().tolist()) | set(targets[scored].tolist())
    assert max(used) >= data.vocab_size - 2  # no token too many (the last value of memorisation may have no key)
    assert data.max_length == max(arrays(split)[0].shape[1] for split in data.splits.values())


@every
def test_no_sequence_is_in_two_splits_or_twice_in_one(setting: str) -> None:
    by_length: dict[int, list[Any]] = defaultdict(list)
    for split in build(setting).splits.values():
        ids = arrays(split)[0]
        by_length[ids.shape[1]].append(sequences_as_values(ids))
    for parts in by_length.values():
        whole = np.concatenate(parts)
        assert len(np.unique(whole)) == len(whole)


def test_further_tests_of_fewer_numbers_repeat_no_training_problem() -> None:
    """Where train pads them: without it two sequences of one problem look different."""
    sizes = {"n_train": 3000, "n_valid": 100, "n_test": 300}
    data = get_task("addition", {"digits": 2, "max_numbers": 4, "test_numbers": [2, 3], **sizes}).build()
    problems = [
        {tuple(token for token in row if token != PAD) for row in arrays(split)[0].tolist()}
        for split in data.splits.values()
    ]
    assert len(set.union(*problems)) == sum(map(len, problems)) == 3000 + 100 + 3 * 300


@every
def test_data_are_a_function_of_the_options_and_the_seed(setting: str) -> None:
    name, options = SETTINGS[setting]
    again = get_task(name, {"n_train": 300, "n_valid": 50, "n_test": 150, **options}).build()
    assert again.fingerprint == build(setting).fingerprint != build(setting, seed=1).fingerprint
    larger = build(setting, n_train=500)
    for split_name in ("test", "valid"):
        np.testing.assert_array_equal(arrays(again.splits[split_name])[0], arrays(larger.splits[split_name])[0])


@pytest.mark.parametrize("setting", [s for s, (_, options) in SETTINGS.items() if any("test_" in o for o in options)])
def test_the_fingerprint_covers_further_tests(setting: str) -> None:
    field = next(field for field in SETTINGS[setting][1] if field.startswith("test_"))
    with_them, without = build(setting), build(setting, **{field: ()})
    assert with_them.tests and not without.tests and with_them.fingerprint != without.fingerprint


def test_the_fingerprint_covers_the_slices() -> None:
    one = np.zeros((1, 2), dtype=np.int64)

    def fingerprint(**slices: Any) -> str:
        test = Sample(one, one, {axis: np.array([label]) for axis, label in slices.items()})
        return make_data({"train": (one, one), "valid": (one, one), "test": test}, 2, METRIC).fingerprint

    assert len({fingerprint(), fingerprint(n="1"), fingerprint(n="2"), fingerprint(k="1")}) == 4


@every
def test_chance_is_the_best_guess_without_context(setting: str) -> None:
    """Counted again, one label after the other."""
    data = build(setting)
    first = setting == "p_hop"  # the number of hops is told in the first token
    labels: dict[Any, Counter[int]] = defaultdict(Counter)
    overall: Counter[int] = Counter()
    for row, targets in zip(*(column.tolist() for column in arrays(data.train)), strict=True):
        for at, (token, label) in enumerate(zip(row, targets, strict=True)):
            if label != IGNORED:
                labels[at, token, row[0] if first else 0][label] += 1
                overall[label] += 1

    def best(counts: Counter[int]) -> int:
        return min(counts, key=lambda label: (-counts[label], label))

    right = []
    for row, targets in zip(*(column.tolist() for column in arrays(data.test)), strict=True):
        for at, (token, label) in enumerate(zip(row, targets, strict=True)):
            if label != IGNORED:
                seen = labels.get((at, token, row[0] if first else 0), overall)
                right.append(best(seen) == label)
    assert data.metric.levels == {"chance": pytest.approx(np.mean(right), abs=1e-12)}


@pytest.mark.parametrize(
    ("setting", "law"),
    [
        ("mqar", 1 / 128),
        ("recall", 1 / 8),
        ("recall-noisy", 1 / 4),
        ("selective_copy", 1 / 14),
        ("memorisation", 1 / 127),
        ("state_tracking", (1 + 11 / 120) / 12),  # the first label is the first token
        ("state_tracking-parity", (1 + 19 / 2) / 20),
        ("modular_chain", 1 / 7),
        ("modular_chain-shuffled", 1 / 5),
    ],
)
def test_position_and_token_give_nothing_away(setting: str, law: float) -> None:
    data = build(setting, n_train=4000, n_test=2000)
    scored = (arrays(data.test)[1] != IGNORED).sum()
    # Labels of a sequence may hang together: errors are counted as if a sequence had but one of its own.
    error = np.sqrt(law * (1 - law) / min(scored, 2000))
    assert abs(data.metric.levels["chance"] - law) < 4 * error


def test_queries_of_mqar_come_soon_after_the_pairs_unless_the_power_is_one() -> None:
    near, even = (arrays(build("mqar", power=power, n_test=1000).test)[1] != IGNORED for power in (0.01, 1.0))
    place = np.arange(64)
    assert (near * place).sum() / near.sum() < 25 and 33 < (even * place).sum() / even.sum() < 37  # middle of 8..62
    # Of two draws with weights 1/g, the first place is taken by the law of the first draw at least.
    weights = 1 / np.arange(1, 29) ** 0.99
    single = arrays(get_task("mqar", {"pairs": 1, "length": 58, "n_train": 1, "n_test": 4000}).build().test)[1]
    share = (single[:, 2::2] != IGNORED).mean(0)
    assert np.abs(share - weights / weights.sum()).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_noise_takes_its_share() -> None:
    ids = arrays(build("recall-noisy", n_test=2000).test)[0]
    assert abs((ids[:, ::2] >= 8)[:, :-1].mean() - 0.8 * 14 / 15) < 0.01  # of 15 pairs one is never noise


def test_shuffled_chains_use_variables_before_they_are_assigned() -> None:
    ids, _ = arrays(build("modular_chain-shuffled").test)
    lines = ids[:, :-2].reshape(len(ids), -1, 3)
    early = [any(term >= 5 and term not in row[:at, 0] for at in range(8) for term in row[at, 1:]) for row in lines]
    assert np.mean(early) > 0.9
    assert len(build("modular_chain-shuffled").test.unique("depth")) > 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("addition", {"min_numbers": 5}, r"min_numbers = 5 must not exceed max_numbers = 4"),
        ("addition", {"test_numbers": [8, 8]}, r"addition\.options\.test_numbers: must be different"),
        ("addition", {"digits": 1, "max_numbers": 2}, r"n_train = 20000.*too few different.*allowed: fewer examples"),
        ("modular_chain", {"queries": 7}, r"queries = 7 must not exceed variables"),
        ("modular_chain", {"order": "random"}, r"order.*'topological' or 'shuffled'.*'random'"),
        ("mqar", {"pairs": 17}, r"pairs = 17 .*at least 4 pairs"),
        ("mqar", {"length": 256}, r"length = 256.*below vocabulary = 256"),
        ("mqar", {"test_shapes": [[64, 16], [62, 16]]}, r"length = 62 and pairs = 16"),
        ("mqar", {"pairs": []}, r"at least 1, or a list"),
        ("recall", {"length": 31}, r"recall\.options\.length.*multiple of 2"),
        ("recall", {"noise": 1.0}, r"noise.*less than 1"),
        ("selective_copy", {"test_lengths": [16]}, r"length = 16 must be at least 2 symbols \+ 1 = 17"),
        ("memorisation", {"vocabulary": 8192, "n_train": 200}, r"show 3200 keys, fewer than the 4095"),
        ("state_tracking", {"group": "parity", "length": 8}, r"too few different sequences.*fewer or longer"),
        ("state_tracking", {"group": "s4"}, r"'s5' or 'parity'"),
    ],
)
def test_bad_options_are_one_clear_line(name: str, options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        get_task(name, options).build()
    assert "\n" not in str(error.value)
