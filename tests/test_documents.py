"""The documents: every command in them is run or marked as not, studies shown are valid, the reference is whole."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jsonschema
import pytest
import typer
import yaml
from commands import cyclebench

from bench.cli import app
from bench.data.task import tasks
from bench.evaluate.rules import rules
from bench.model.gates import gates
from bench.model.variant import variants
from bench.study.load import study_from, study_names
from bench.study.schema import Study
from bench.study.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
FENCE = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<kind>\w*)(?P<rest>.*)\n(?P<text>(?:.*\n)*?)^```$", re.M)
TOOLS = ("cyclebench", "make", "pip", "sbatch", "mlflow", "git", ".")  # what a line of a shell may begin with
TINY = {"n_train": 60, "n_valid": 8, "n_test": 16}


class Block(NamedTuple):
    """A fenced block: its language, the title in its head, the comment before it, and what is in it."""

    kind: str
    title: str
    mark: str
    text: str


def blocks(text: str) -> list[Block]:
    found = []
    for place in FENCE.finditer(text):
        title = re.search(r'title="(.+?)"', place["rest"])
        found.append(Block(place["kind"], title[1] if title else "", place["mark"] or "", place["text"]))
    return found


def shell(block: Block) -> Iterator[list[str]]:
    for line in block.text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def marked(block: Block) -> bool:
    return block.mark.startswith("not run: ")


@cache
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)  # as mkdocs does
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return dict(reference().pages())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return dict(reference().study_schema())


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_what_a_shell_would_run_stands_in_blocks_of_a_shell(page: str) -> None:
    for block in blocks(PAGES[page]):
        assert block.kind, f"{page}: a block without a language: {block.text}"
        if block.kind == "sh":
            for words in shell(block):
                assert words[0] in TOOLS, words
                assert words[0] == "cyclebench" or marked(block), f"{page}: {words} is neither run nor marked"
        else:
            lines = block.text.splitlines()
            assert block.kind == "python" or not [line for line in lines if line.startswith(TOOLS[:-1])], block.text


def mentioned(text: str) -> Iterator[list[str]]:
    """Every command line of ours in a page: in blocks of a shell, inside other commands there, and in running text."""
    for block in blocks(text):
        for words in shell(block) if block.kind == "sh" else ():
            yield from (shlex.split(word) for word in words if word.startswith("cyclebench "))
            if words[0] == "cyclebench":
                yield words
    running = FENCE.sub("", text)
    yield from (found.split() for found in re.findall(r"(?<!`)`(cyclebench\s[^`]+)`", running))
    yield from (["cyclebench", "*", *found.split()] for found in re.findall(r"(?<!`)`(--[^`]+)`", running))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_no_command_or_option_is_invented(page: str) -> None:
    text = PAGES.get(page) or (ROOT / page).read_text()
    known = {
        name: {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    known["*"] = set().union(*known.values(), {"--version"})
    for words in mentioned(text):
        if words[1].startswith("-") or words[1].isupper():  # of the command itself, or a word for any command
            words = ["cyclebench", "*", *words[1:]]
        assert words[1] in known, words
        for word in words[2:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known[words[1]], words
        if words[1] in ("run", "sweep", "costs") and words[2:] and re.fullmatch("[a-z_]+", words[2]):
            assert words[2] in study_names(), words
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)
    assert targets
    asked = re.findall(r"(?<!`)`make ([a-z]+)", FENCE.sub("", text))
    asked += [words[1] for block in blocks(text) if block.kind == "sh" for words in shell(block) if words[0] == "make"]
    assert not set(asked) - set(targets[1].split()), asked


def tiny(raw: dict[str, Any]) -> dict[str, Any]:
    """A study of a page at a size that is trained in a second."""
    raw["model"] |= {"d_model": 16, "n_heads": 2}
    raw["train"] |= {"steps": 3, "batch_size": 4}
    raw["seeds"] = min(raw["seeds"], 2)
    for part in raw.get("sweep", {}).values():
        part["trials"] = min(part["trials"], 3)
    for task in raw["tasks"]:
        options = task.setdefault("options", {})
        options |= TINY
        options |= {"length": min(options.get("length", 16), 16)} if task["name"] == "p_hop" else {}
    return raw


RUN = [page for page, text in PAGES.items() if any(b.kind == "sh" and not marked(b) for b in blocks(text))]


@pytest.mark.long
@pytest.mark.parametrize("page", RUN)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = page in ("docs/tutorial.md", "docs/howto/figure.md")
    for block in blocks(PAGES[page]):
        if block.title:
            text = block.text
            if block.kind == "yaml":
                text = json.dumps(tiny(parse_yaml(text, block.title)))
            (tmp_path / block.title).write_text(text)
        elif block.kind == "sh" and not marked(block):
            for words in shell(block):
                ended = cyclebench(tmp_path, *words[1:], figures=figures)
                assert ended.returncode == 0, f"{words}: {ended.stdout[-1500:]}{ended.stderr[-1500:]}"
        elif block.kind == "python" and not marked(block):
            exec(compile(block.text, page, "exec"), {"__name__": "page"})
    if page == "docs/tutorial.md":
        folder = tmp_path / "runs" / "reports" / "my-study"
        assert (tmp_path / "figure.pdf").stat().st_size > 1000
        assert (folder / "accuracy_vs_flops_p_hop.pdf").is_file() and "toprule" in (folder / "report.tex").read_text()
    if page == "docs/howto/machines.md":
        assert len((tmp_path / "here/reports/split/results.csv").read_text().splitlines()) == 3  # both seeds


# --- studies ----------------------------------------------------------------------------------------------------------

SHOWN = [(page, block) for page, text in PAGES.items() for block in blocks(text) if block.title.endswith(".yaml")]


@pytest.mark.parametrize(("page", "block"), SHOWN, ids=lambda value: getattr(value, "title", value))
def test_the_studies_shown_are_valid(page: str, block: Block, tmp_path: Path, schema: dict[str, Any]) -> None:
    for other in blocks(PAGES[page]):
        if other.kind == "python" and other.title:
            (tmp_path / other.title).write_text(other.text)
    raw = parse_yaml(block.text, block.title)
    jsonschema.validate(raw, schema)
    assert study_from(raw, [], block.title, folder=tmp_path).variants


@pytest.mark.parametrize("name", study_names())
def test_the_schema_for_editors_takes_every_study(name: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(parse_yaml((ROOT / "studies" / f"{name}.yaml").read_text(), name), schema)


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {}},
        {"model": {"family": "gpt3"}},
        {"train": {"steps": 0}},
        {"variants": []},
        {"variants": [{"label": "no name"}]},
        {"tasks": [{"name": "p_hop", "train": {"lr_schedule": "linear"}}]},
        {"seeds": 0},
        {"presets": {"gpu": {"model": {"width": 3}}}},
        {"hypotheses": [{"claim": "c", "within": "wide"}]},
    ],
)
def test_the_schema_for_editors_refuses_what_a_study_refuses(change: dict[str, Any], schema: dict[str, Any]) -> None:
    sound = {"name": "a", "question": "?", "tasks": ["p_hop"], "variants": ["htc"], "seeds": 2}
    jsonschema.validate({**sound, "train": {"grad_clip": "none"}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**sound, **change}, schema)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_every_key_of_a_study_is_described(made: dict[str, str]) -> None:
    module, page = reference(), made["reference/study.md"]
    for name, kind in module.inside(Study).items():
        assert f"## {name}\n" in page
        for key, _, _, text in module.fields(kind):
            assert text, f"{name}.{key} has no description"
            assert f"| `{key}` |" in page


def test_everything_that_is_registered_stands_in_the_reference(made: dict[str, str]) -> None:
    import cyclebench as public

    for page, names in (
        ("variants", [f"## {name}\n" for name in variants.names()]),
        ("tasks", [f"## {name}\n" for name in tasks.names()]),
        ("rules", [f"| `{name}` |" for name in rules.names()]),
        ("gates", [f"| `{name}` |" for name in gates.names()]),
        ("cli", [f"## {name}\n" for name in typer.main.get_command(app).commands]),  # type: ignore[attr-defined]
        ("records", ["## Record\n", "## Failure\n", "`valid_metrics`"]),
    ):
        for name in names:
            assert name in made[f"reference/{page}.md"], (page, name)
    for name in public.__all__:
        assert re.search(rf"(heading: |## ){name}\n", made["reference/python.md"]), name
    assert "| ztt | 0 1 2 1 2 3 |" in made["reference/variants.md"]
    assert "whole number from 1 to 512" in made["reference/study.md"]


def test_findings_are_the_verdicts_as_published(made: dict[str, str]) -> None:
    published = ROOT / "reports" / "published"
    told = [json.loads(path.read_text()) for path in published.glob("*/study.json")]
    for study in told:
        for row in study["verdicts"]:
            start, gain = f"| {row['hypothesis']} | {row['verdict']} |", f"| {row['gain']} |"
            lines = made["findings.md"].splitlines()
            assert any(line.startswith(start) and gain in line for line in lines), row
    for path in published.glob("*/report.md"):
        assert re.search(rf"^(## |- ){path.parent.name}$", made["findings.md"], re.M), path


def test_the_readme_begins_as_the_findings_do(made: dict[str, str]) -> None:
    words = " ".join(PAGES["README.md"].split())
    first, second = made["findings.md"].split("\n\n")[1:3]
    assert " ".join(first.split()) in words and " ".join(second.split()) in words


def test_all_pages_and_none_other_are_in_the_contents(made: dict[str, str]) -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w/]+\.md)$", settings, re.M))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | {
        p for p in made if p.endswith(".md")
    }


# --- README and words -------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_what_it_names_is_there() -> None:
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 120
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path
    assert "make quick" in text and "make test" in text and ".png)" in text


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_a_word_is_said_what_it_means_before_it_is_used(page: str) -> None:
    text = PAGES[page]
    for word in ("cell", "study") if page == "README.md" else ("cell", "block"):
        told = text.index(f"**{word}**")
        used = re.search(rf"\bfinished {word}s?\b|\b{word}s\b", text) if word == "cell" else None
        assert used is None or told < used.start(), word


def test_the_glossary_has_the_words() -> None:
    rows = yaml.safe_load(json.dumps(re.findall(r"^\| ([\w -]+) \|", PAGES["docs/glossary.md"], re.M)))
    assert {"cell", "step", "cycle", "prelude", "coda", "exit point", "block", "study", "verdict"} <= set(rows)
    assert len(rows) == len(set(rows))
