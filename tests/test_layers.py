"""The house's order: what may import what, no circle, no import inside a function without its reason, no long file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "variants", "reports", "cyclebench")
LAYERS = (  # from low to high; a module may import from its own layer and from lower ones
    (
        "bench.errors",
        "bench.limits",
        "bench.registry",
        "bench.strict",
        "bench.config",
        "bench.processes",
        "bench.plugins",
        "bench.tables",
        "bench.house",
    ),
    ("bench.stats",),
    ("bench.store",),
    ("bench.model",),
    ("bench.pretrained",),
    ("bench.data",),
    ("bench.evaluate",),
    ("bench.train",),
    ("bench.exits",),
    ("bench.study",),
    ("bench.run",),
    ("bench.sweep",),
    ("reports",),
    ("bench.downstream",),
    ("bench.perf",),
    ("bench.api",),
    ("bench.cli", "bench.__main__"),
    ("cyclebench",),
)
GROUND = 0  # the layer of files that lie in bench/ itself
FOR_VARIANTS = {"bench.config", "bench.errors", "bench.model", "bench.registry", "variants"}
REASON = re.compile(r"#.*\b(start-up|optional)\b")
LONGEST = 400


@dataclass(frozen=True)
class Import:
    """One import: who imports what, where, and whether inside a function without a reason."""

    module: str
    target: str
    place: str
    unexplained: bool


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str, source: str, place: str, known: set[str]) -> Iterator[Import]:
    """Every import of one of ours, wherever it stands."""
    lines = source.splitlines()
    package = module if place.endswith("__init__.py") else module.rpartition(".")[0]

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            for target in dict.fromkeys(targets):
                yield Import(module, target, f"{place}:{node.lineno}", inside and not REASON.search(text))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def layer_of(module: str) -> int | None:
    """None for the variants, which have a rule of their own."""
    if module.split(".")[0] == "variants":
        return None
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return GROUND if module.count(".") <= 1 and module.startswith("bench") else len(LAYERS)


def against(found: Import) -> bool:
    """Whether an import is from a higher layer, or one that a variant may not have."""
    mine, theirs = layer_of(found.module), layer_of(found.target)
    if mine is None:
        return not any(found.target == name or found.target.startswith(f"{name}.") for name in FOR_VARIANTS)
    return theirs is None or theirs > mine


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, the first at the end again; none: []."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


ALL = [
    found
    for module, path in FILES.items()
    for found in imports(module, path.read_text(), str(path.relative_to(ROOT)), set(FILES))
]
OURS = [found for found in ALL if found.target.split(".")[0] in PACKAGES]


def test_every_module_imports_only_from_its_own_layer_and_lower_ones():
    assert [f"{found.place}: {found.module} imports {found.target}" for found in OURS if against(found)] == []


def test_no_circle_among_modules():
    arrows: dict[str, set[str]] = {module: set() for module in FILES}
    for found in OURS:
        arrows[found.module].add(found.target)
    assert " -> ".join(circle(arrows)) == ""


def test_an_import_inside_a_function_tells_why():
    assert [f"{found.place}: {found.target}" for found in ALL if found.unexplained] == []


def test_no_file_is_long():
    lengths = {
        path: len(path.read_text().splitlines())
        for package in (*PACKAGES, "tests")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST} == {}


@pytest.mark.parametrize(
    ("text", "home"),
    [
        (".splitlines()[", "bench.errors"),  # first_line
        ("csv.DictWriter(", "bench.tables"),
        ("| ---", "bench.tables"),
        ("yaml.safe_load(", "bench.study.yaml_text"),
        ("yaml.load(", "bench.study.yaml_text"),
    ],
)
def test_what_has_one_place_is_nowhere_else(text: str, home: str) -> None:
    assert [module for module, path in FILES.items() if text in path.read_text() and module != home] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bench.model.a", "from bench.train.loop import x"),
        ("bench.model.a", "if TYPE_CHECKING:\n    from bench.train import loop"),
        ("bench.model.a", "def f():\n    import bench.train.loop  # start-up"),
        ("bench.model.a", "import variants.htc"),
        ("bench.errors", "from bench.model import parts"),
        ("bench.errors", "from .model import parts"),
        ("variants.a", "from bench.data.task import tasks"),
        ("reports.a", "import bench.perf.report"),
    ],
)
def test_an_arrow_against_the_layers_is_seen(module, source):
    assert any(against(found) for found in imports(module, source, "a.py", set(FILES)))


def test_what_is_allowed_is_let_pass():
    for module, source in (
        ("bench.model.a", "from bench.errors import UserError"),
        ("bench.cli.a", "from reports import page"),
        ("variants.a", "from bench.model.parts import Part\nfrom variants.htc import HeadTailCycling"),
    ):
        assert not any(against(found) for found in imports(module, source, "a.py", set(FILES)))


def test_a_circle_is_seen():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("comment", "unexplained"), [("", True), ("  # start-up", False), ("  # optional: ray", False)]
)
def test_an_import_inside_a_function_needs_its_reason(comment, unexplained):
    (found,) = imports("bench.a", f"def f():\n    import torch{comment}", "a.py", set())
    assert found.unexplained is unexplained
