"""Broken studies, overrides, checkpoints and stores: one clear line, or a damaged file set aside; never anything else.

``CYCLEBENCH_FUZZ=4000`` sets the number of examples of each kind; they are the same every time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import gpt2
from hostile import HOSTILE, PATHS, hostile, in_time, oversized, scalars, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import MANIFEST, RESULTS
from test_runner import RAW

from bench import limits
from bench.cli import main
from bench.data.task import TaskData, get_task
from bench.errors import UserError
from bench.model.variant import get_variant
from bench.run.lease import LeaseWatch, read_lease
from bench.run.status import status
from bench.store.digests import write_sealed
from bench.store.manifest import CellRow
from bench.store.store import Store
from bench.study.conversion import convert_to
from bench.study.load import load_study, study_from
from bench.study.plan import make_plan
from bench.study.schema import Study
from bench.sweep.budgets import space
from bench.train.checkpoints import Checkpoints, Every, Position

EXAMPLES = int(os.environ.get("CYCLEBENCH_FUZZ", "60"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def broken(draw: Any) -> Any:
    """The tiny study with one to three places put in, changed or taken out."""
    raw = copy.deepcopy(RAW)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(PATHS))
        here: Any = raw
        try:
            for part in parents:
                here = here[part]
            match draw(st.sampled_from(["change", "add", "remove"])):
                case "change":
                    here[last] = draw(values)
                case "add" if isinstance(here, dict):
                    here[draw(st.one_of(st.text(max_size=8), st.integers()))] = draw(values)
                case _:
                    del here[last]
        except (KeyError, IndexError, TypeError):
            pass
    return raw


def check_parts(study: Study) -> None:
    for entry in study.variants:
        get_variant(entry.name, entry.options)
    for task in study.tasks:
        get_task(task.name, task.options)


def outcome(make: Any) -> Study | None:
    """A study whose parts are valid too, or a complaint of one line."""
    try:
        with in_time():
            study: Study = make()
            check_parts(study)
        return study
    except UserError as error:
        assert str(error) and "\n" not in str(error) and "\r" not in str(error)
        return None


@many
@given(broken())
def test_broken_studies(raw: Any) -> None:
    study = outcome(lambda: study_from(raw, [], "fuzz"))
    assert study is None or (Path("/runs/studies") / study.name).resolve().parent == Path("/runs/studies")


files = st.one_of(
    hostile(),
    st.binary(max_size=200),
    broken().map(lambda raw: yaml.dump(raw).encode()[:-7]),
    st.text().map(str.encode),
)


@many
@given(files)
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    outcome(lambda: load_study(str(tmp_path / "x.yaml")))


overrides = st.lists(st.one_of(
    st.text(max_size=30),
    st.tuples(st.sampled_from(PATHS), scalars).map(lambda pair: f"{'.'.join(map(str, pair[0]))}={pair[1]}"),
    st.tuples(st.sampled_from(PATHS), st.sampled_from(HOSTILE)).map(
        lambda pair: f"{'.'.join(map(str, pair[0]))}={pair[1]}"
    ),
    st.tuples(st.sampled_from(["name", "variants.ztt", "variants.ztt.options.gating", "tasks.p_hop.options.hops"]),
              st.text(max_size=9)).map("=".join),
), max_size=3)  # fmt: skip


@many
@given(overrides)
def test_broken_overrides(overrides: list[str]) -> None:
    outcome(lambda: study_from(copy.deepcopy(RAW), overrides, "fuzz"))


@settings(parent=many, max_examples=max(25, EXAMPLES // 2))
@given(oversized())
def test_sizes_that_no_machine_holds(monkeypatch: pytest.MonkeyPatch, raw: Any) -> None:
    """A plan, or one line, soon; on a small machine, so that data that it holds are made in no time."""
    monkeypatch.setenv(limits.MEMORY, "0.25")
    monkeypatch.setattr(limits, "LONGEST", 1.0)
    try:
        with in_time():
            study = study_from(raw, [], "fuzz")
            assert make_plan(study, "", None).cells
            if study.sweep is not None and study.sweep.budgets is not None:
                space(study.variants[0], study.sweep.budgets)
    except UserError as error:
        assert str(error) and len(str(error)) < 2000 and len(str(error).splitlines()) == 1


class ParsedError(Exception):
    """The command has got as far as a study whose parts are valid."""


def parsed(study: Study, *_: Any) -> None:
    check_parts(study)
    raise ParsedError


whole = yaml.dump(RAW).encode()
given_to_run = st.one_of(
    st.tuples(st.one_of(files, broken().map(lambda raw: yaml.dump(raw).encode())), st.just([])),
    st.tuples(st.just(whole), overrides),
)


@settings(parent=many, max_examples=max(15, EXAMPLES // 4))
@given(given_to_run)
def test_broken_input_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_to_run: tuple[bytes, list[str]]
) -> None:
    """One line and exit status 2, and nothing is written: what is planned and run after that is replaced."""
    content, overrides = given_to_run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.sweep.tune.tuned_plan", parsed)
    (tmp_path / "x.yaml").write_bytes(content)
    arguments = [argument for override in overrides for argument in ("--set", override)]
    monkeypatch.setattr("sys.argv", ["cyclebench", "run", "x.yaml", *arguments])
    out, err = StringIO(), StringIO()
    with in_time(), suppress(ParsedError), redirect_stdout(out), redirect_stderr(err):
        with pytest.raises(SystemExit) as ended:
            main()
        told = err.getvalue()
        assert ended.value.code == 2 and told.startswith("error: ") and len(told.splitlines()) == 1, told
    assert not out.getvalue() and [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(gpt2(tmp_path_factory.mktemp("source"), n_layer=1))


@settings(parent=many, max_examples=max(9, EXAMPLES // 4))
@given(st.data())
def test_broken_pretrained_models(tmp_path: Path, source: Path, data: Any) -> None:
    """A field of the configuration changed or taken out, or bytes of a file flipped, cut or replaced."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    match data.draw(st.sampled_from(["change", "remove", "bytes", "none"])):
        case "change":
            config[data.draw(st.sampled_from(sorted(config)))] = data.draw(values)
            (folder / "config.json").write_text(json.dumps(config, default=str))
        case "remove":
            del config[data.draw(st.sampled_from(sorted(config)))]
            (folder / "config.json").write_text(json.dumps(config))
        case "bytes":
            path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
            content = bytearray(path.read_bytes())
            position = data.draw(st.integers(0, len(content) - 1))
            if data.draw(st.booleans()):
                content[position] ^= data.draw(st.integers(1, 255))
            else:
                content = content[:position]
            path.write_bytes(content)
    out = folder / "out"
    try:
        convert_to(str(folder), "htc", ["options.n_prelude=0", "options.n_coda=0"], 0, out)
    except UserError as error:
        assert str(error) and "\n" not in str(error) and not out.exists()
    else:
        assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_weights_are_neither_made_up_nor_dropped(tmp_path: Path, source: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    weights = load_file(path)
    name = "transformer.h.0.mlp.c_fc.weight"
    if what == "missing":
        del weights[name]
    else:
        weights["a"] = weights[name].clone()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{what} keys, .* the first of"):
        convert_to(str(tmp_path / "source"), "bc", [], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "a: &a [*a]", "? {a: b}\n: c", "- [" * 3000]
)
def test_yaml_is_data_and_nothing_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert outcome(lambda: load_study(str(tmp_path / "x.yaml"))) is None


@many
@given(st.data())
def test_broken_checkpoints(tmp_path: Path, data: Any) -> None:
    import torch

    for path in tmp_path.iterdir():
        path.unlink()
    lm = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(lm.parameters())
    Checkpoints(tmp_path, "a", Every()).save(Position(3, 1.0, [{"loss": 1.0}], [1.0]), lm, optimizer)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "random"])):
        case "flip":
            content[position] ^= data.draw(st.integers(1, 255))
        case "cut":
            content = content[:position]
        case _:
            content = bytearray(data.draw(st.binary(max_size=100)))
    path.write_bytes(content)
    before = [parameter.clone() for parameter in lm.parameters()]
    at = Checkpoints(tmp_path, "a", Every()).load(lm, optimizer)
    assert at == Position() or (at.step, at.history, at.losses) == (3, [{"loss": 1.0}], [1.0])
    assert all(torch.equal(one, two) for one, two in zip(before, lm.parameters(), strict=True))


@st.composite
def partial(draw: Any) -> Any:
    """A record with one or two of its parts changed or taken out."""
    found = draw(st.sampled_from(list(RESULTS.values()))).dump()
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(found)))
        found.pop(key)
        if draw(st.booleans()):
            found[key] = draw(values)
    return found


@many
@given(
    st.one_of(st.binary(max_size=60), st.one_of(values, partial()).map(lambda v: json.dumps(v, default=str).encode()))
)
def test_broken_stores(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    cell = CellRow(variant="htc", task="p_hop", seed=0, id="a" * 64)
    folder = store.folder(cell.id)
    folder.mkdir(exist_ok=True)
    for name in ("result.json", "failure.json", "lease.1", "usage.json"):
        (folder / name).write_bytes(content)
        with suppress(ValueError):
            if name != "lease.1" and isinstance(value := json.loads(content), dict):
                write_sealed(folder / name, value)
    record = store.record(cell.id)
    assert record is None or record.status in ("done", "failed")
    store.usage(cell.id)
    assert read_lease(folder) is None or isinstance(read_lease(folder), dict)
    assert LeaseWatch().free(folder) in (None, 2)
    status(store, MANIFEST.but(cells=[cell], config={}))


def built(name: str, options: dict[str, Any]) -> TaskData | None:
    """A task's data, or a complaint of one line."""
    try:
        return get_task(name, options).build()
    except UserError as error:
        assert str(error) and "\n" not in str(error) and "\r" not in str(error)
        return None


lines = st.lists(st.text(max_size=60), max_size=12).map(lambda texts: "\n".join(texts).encode(errors="replace"))


@many
@given(
    content=st.one_of(st.binary(max_size=300), lines),
    name=st.one_of(st.just("a.txt"), st.text(max_size=8), st.sampled_from(["*", "[", "**", ".", "a.txt/b", "x\0y"])),
    options=st.fixed_dictionaries({}, optional={
        "length": st.integers(-1, 40), "tokenizer": st.sampled_from(["bytes", "bpe", "pretrained:/nowhere", ""]),
        "n_test": st.integers(0, 4), "bpe_vocab_size": st.integers(250, 300),
    }),
)  # fmt: skip
def test_broken_texts(tmp_path: Path, content: bytes, name: str, options: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    data = built("text", {"files": [f"{tmp_path}/{name}"], **options})
    assert data is None or (len(data.train) and len(data.valid) and len(data.test))


@settings(parent=many, max_examples=max(3, EXAMPLES // 20))  # datasets takes a tenth of a second for each
@given(
    kind=st.sampled_from(["jsonl", "csv", "txt", "parquet", "arrow", ""]),
    content=st.one_of(
        st.binary(max_size=200),
        lines,
        st.lists(st.dictionaries(st.sampled_from(["text", "b"]), scalars, max_size=2), max_size=9).map(
            lambda rows: "\n".join(json.dumps(row, default=str) for row in rows).encode()
        ),
    ),
)
def test_broken_local_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / f"train.{kind}".rstrip(".")).write_bytes(content)
    built("hub", {"dataset": str(folder), "length": 4})
