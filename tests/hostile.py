"""What a hostile, or only a careless, user writes, as strategies of hypothesis; and a limit to how long it may take."""

from __future__ import annotations

import copy
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel
from test_runner import RAW

from bench.config import EvalConfig, ModelConfig, RopeScaling, TrainConfig
from bench.data.generated import Generated
from bench.data.task import tasks
from bench.model.variant import variants

GENERATED = [name for name, kind in sorted(tasks.items().items()) if issubclass(kind, Generated)]
SECONDS = 20  # that no input may take, whatever becomes of it


@contextmanager
def in_time() -> Iterator[None]:
    """Ends what goes on for longer than it may."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
    st.sampled_from(["../x", "/etc/passwd", "htc", "ztt", "p_hop", "a/b", "", "nan", "1e400", "~", "x" * 300]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in inner for path in paths(item, (*here, key)))]


PATHS = [path for path in paths(RAW) if path]
LAUGHS = [f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)]
HOSTILE = [  # what YAML makes of a text, in one version or another, and what no file holds
    *["!!int abc", "!!float x", "!!bool maybe", "!!null 0", "!!int [1]", "!!timestamp 2026-13-45", "!!binary x"],
    *["!!set {a}", "!!python/object/apply:os.abort []", "!mine 1", "! 1", "--- 1", "%YAML 1.1", "|\n  text"],
    *["2026-13-45", "2026-01-31", "0001-01-01 25:61:61", "12:30:00", "1:2:3.4", "yes", "on", "Off", "y", "=", "<<"],
    *["{<<: {a: 1}}", "{<<: 1}", "{<<: [1]}", "*nothing", "&a [*a]", "&a {b: *a}", f"[&a [1, 1], {', '.join(LAUGHS)}]"],
    *["{? [a] : b}", "{1: 2}", "{a: 1, a: 2}", "012", "0o17", "0x" + "f" * 5000, "9" * 5000, "-" + "9" * 400],
    *["1_000", "1e400", "-1e400", "1e-400", ".inf", "-.INF", ".nan", "inf", "nan", "Infinity", "none", "~", "true"],
    *["'true'", "[true]", "[.nan]", "{a: .inf}", "9223372036854775808", "1" * 19, '"\\ud800"', '"\\0"', "0" * 5000],
    *["[" * 3000 + "]" * 3000, "{a: " * 100 + "}" * 100, "[" * 50 + "]" * 50],
]


@st.composite
def hostile(draw: Any) -> bytes:
    """The tiny study, written down, with one to three of its values, or new ones, replaced by hostile texts."""
    raw, texts = copy.deepcopy(RAW), draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3))
    for number in range(len(texts)):
        *parents, last = draw(st.sampled_from(PATHS))
        here: Any = raw
        with suppress(KeyError, IndexError, TypeError):
            for part in parents:
                here = here[part]
            here[draw(st.sampled_from([last, "new"])) if isinstance(here, dict) else last] = f"@{number}@"
    written = yaml.dump(raw)
    for number, text in enumerate(texts):
        written = written.replace(f"'@{number}@'", text)
    return written.encode()


nonsense = st.one_of(
    st.sampled_from([0, -1, 1 << 63, 10**30, 10**5000, 0.5, 1e30, 1e300, 1e-300, math.inf, -math.inf, math.nan]),
    st.sampled_from([True, None, "none", "1e999", []]),
    st.floats(),
)
sizes = st.one_of(st.integers(1, 9), st.integers(1, 600), st.integers(0, 62).map(lambda power: 1 << power))


@st.composite
def numbers(draw: Any) -> Any:
    """Sizes of every magnitude most often, alone or in a list, and now and then what is none."""
    kind = draw(st.sampled_from([*[sizes] * 7, st.lists(sizes, min_size=1, max_size=3), nonsense, st.lists(nonsense)]))
    return draw(kind)


PARTS: dict[str, type[BaseModel]] = {"model": ModelConfig, "train": TrainConfig, "evaluation": EvalConfig}


def numeric(kind: type[BaseModel]) -> list[str]:
    """The fields that hold numbers, alone or in lists."""
    return [name for name, field in kind.model_fields.items() if re.search(r"\b(int|float)\b", str(field.annotation))]


@st.composite
def oversized(draw: Any) -> Any:
    """A study of one variant on one generated task, of which one to four numbers are any."""
    task, variant = draw(st.sampled_from(GENERATED)), draw(st.sampled_from(variants.names()))
    raw: Any = {key: RAW[key] for key in ("name", "question")}
    raw |= {"model": dict(RAW["model"]), "train": dict(RAW["train"]), "evaluation": {}, "seeds": 1}
    raw["tasks"] = [{"name": task, "options": {"n_train": 40, "n_valid": 10, "n_test": 10}}]
    raw["variants"] = [{"name": variant, "options": {}}]
    kinds = {**PARTS, "tasks": tasks.get(task).Options, "variants": variants.get(variant).Options}
    for _ in range(draw(st.integers(1, 4))):
        part = draw(st.sampled_from([*kinds, "tasks", "seeds", "ranges", "rope_scaling"]))
        value = draw(numbers())
        if part == "seeds":
            raw["seeds"] = value
        elif part == "ranges":
            ends = dict(zip(("low", "high", "step"), draw(st.lists(numbers(), min_size=2, max_size=3)), strict=False))
            raw["sweep"] = {"budgets": {"ranges": {"train.steps": ends | {"log": draw(st.booleans())}}}}
        elif part == "rope_scaling":
            kind = draw(st.sampled_from(["linear", "llama3", "yarn"]))
            given = draw(st.dictionaries(st.sampled_from(numeric(RopeScaling)), st.floats(1e-7, 1e7) | sizes))
            needed = {"factor": 8, "original_max_position_embeddings": 8, "low_freq_factor": 1, "high_freq_factor": 4}
            raw["model"] |= {"family": "llama", part: {"rope_type": kind, **needed, **given}}
        elif fields := numeric(kinds[part]):
            fields_of = raw[part] if part in PARTS else raw[part][0]["options"]
            fields_of[draw(st.sampled_from(fields))] = value
    return raw
