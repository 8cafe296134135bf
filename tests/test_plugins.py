"""An outside package with one thing of every kind: found, run, swept and drawn as if it came with the suite."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from bench.cli import app
from bench.errors import UserError
from bench.model.gates import gates
from bench.plugins import changed_since, digests, import_files, pack, unpack
from bench.registry import Registry

PACKAGE = '''
"""One thing of every kind."""

import torch
from matplotlib.figure import Figure

import cyclebench


@cyclebench.register_variant("outside_reversed")
class Reversed(cyclebench.Variant):
    """All blocks in order, then in reverse, again and again."""

    def schedule(self, model):
        there = list(range(model.n_blocks))
        ways = [there if cycle % 2 == 0 else there[::-1] for cycle in range(model.n_cycles)]
        blocks = [block for way in ways for block in way]
        ends = [model.n_blocks * (cycle + 1) for cycle in range(model.n_cycles)]
        return cyclebench.build_schedule(blocks, exits=ends)


@cyclebench.register_task("outside_last")
class Last(cyclebench.Generated):
    """The first symbol, asked for at the end."""

    @property
    def vocab_size(self):
        return 8

    def sample(self, count, rng):
        ids = rng.integers(8, size=(count, 12))
        targets = ids * 0 - 100
        targets[:, -1] = ids[:, 0]
        return cyclebench.Sample(ids, targets)


@cyclebench.register_rule("outside_size")
class Size(cyclebench.Rule):
    """The norm of the state."""

    leave = "above"

    def signal(self, view, previous):
        return view.hidden.float().norm(dim=-1)


@cyclebench.register_gate("outside_half")
class Half(cyclebench.Gate):
    """Halves every update."""

    def merge(self, step, branch, hidden, update, zero_attention):
        return hidden + update / 2


@cyclebench.register_figure("outside_counts", "How many cells there are")
def counts(manifest, results, task):
    """A bar for each variant: its finished cells."""
    figure = Figure(figsize=(3.4, 2))
    labels = [variant.label for variant in manifest.variants]
    figure.subplots().bar(labels, [len(results)] * len(labels))
    return figure


@cyclebench.register_tracker("outside_lines")
class Lines(cyclebench.Tracker):
    """A line a cell in a file."""

    def log(self, record, place):
        with open("lines.txt", "a") as file:
            print(place.variant, record.status, file=file)
'''
STUDY = """
name: outside
question: Does an outside package have all that the suite has?
reference: outside_reversed
model: {d_model: 16, n_heads: 2, n_blocks: 3, n_cycles: 2}
train: {steps: 6, batch_size: 4}
tasks: [{name: outside_last, options: {n_train: 200, n_valid: 40, n_test: 40}}]
variants:
  - outside_reversed
  - {name: ztt, options: {gating: outside_half}}
seeds: 1
sweep: {thresholds: {trials: 5, rules: [outside_size]}}
"""
USE = """
import sys
from bench.cli import main
runs = ("run study.yaml --jobs 1 --tracker outside_lines", "sweep study.yaml --jobs 1")
for words in ("list", *runs, "report study.yaml"):
    sys.argv = ["cyclebench", *words.split()]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def wheel(folder: Path) -> Path:
    """The package as a wheel, made by hand: nothing has to be fetched to build it."""
    info = "outside-1.0.dist-info"
    kinds = ("variants", "tasks", "exit_rules", "gates", "figures", "trackers")
    files = {
        "outside.py": PACKAGE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "".join(f"[cyclebench.{kind}]\nall = outside\n\n" for kind in kinds),
    }
    rows = [
        f"{name},sha256={urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for name, text in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""])
    path = folder / "outside-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.mark.long
def test_an_installed_package_with_all_kinds_runs_a_study_a_sweep_and_a_report(tmp_path: Path, no_runs: Path) -> None:
    shutil.copy(no_runs, tmp_path / "mlflow.db")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel(tmp_path))], check=True, capture_output=True)
    (tmp_path / "study.yaml").write_text(STUDY)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("outside_reversed", "outside_last", "outside_size", "outside_half"):
        assert name in done.stdout
    report = tmp_path / "runs" / "reports" / "outside"
    assert (report / "outside_counts_outside_last.png").stat().st_size > 1000
    assert "How many cells there are" in (report / "report.html").read_text()
    assert "outside_size" in (report / "sweep_thresholds.csv").read_text()
    assert "outside_size" in (report / "report.md").read_text()
    assert sorted((tmp_path / "lines.txt").read_text().splitlines()) == ["outside_reversed done", "ztt done"]


FILE = """
import cyclebench

digest = None  # a name of the file's own


@cyclebench.register_gate("of_a_file")
class OfAFile(cyclebench.Gate):
    '''A gate of a file.'''

    half = 0.5

    def merge(self, step, branch, hidden, update, zero_attention):
        return hidden + self.half * update
"""


@pytest.fixture
def gate_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gates, "_found", dict(gates.items()))
    path = tmp_path / "my_gates.py"
    path.write_text(FILE)
    return path


def test_what_a_file_registers_reaches_other_processes_by_its_definition(gate_file: Path) -> None:
    import_files([gate_file], "--import")
    kind = gates.get("of_a_file")
    import_files([gate_file], "the study's imports")
    assert gates.get("of_a_file") is kind, "a file runs once, whoever names it"
    packed = pack()
    gates._found.pop("of_a_file")  # type: ignore[attr-defined]
    unpack(packed)
    assert gates.get("of_a_file").__qualname__ == kind.__qualname__
    elsewhere = "import sys; from bench.plugins import unpack; unpack(sys.stdin.buffer.read()); "
    elsewhere += "from bench.model.gates import gates; print(gates.get('of_a_file').half); "
    elsewhere += "from bench.plugins import digests; print(digests()['gate of_a_file'])"
    found = subprocess.run([sys.executable, "-c", elsewhere], input=packed, capture_output=True, check=True)
    digest = hashlib.sha256(FILE.encode()).hexdigest()[:16]
    assert found.stdout.decode().split() == ["0.5", digest] and digests()["gate of_a_file"] == digest
    codes = [{}, {"gate of_a_file": digest}, {"gate of_a_file": "another"}, {"gate of_nobody": "another"}]
    told = "the code of gate of_a_file, after 1 cell that used it, whose results stay (another name runs it anew)"
    assert changed_since(codes, digests()) == [told]


def test_a_file_that_has_changed_is_run_again(gate_file: Path) -> None:
    import_files([gate_file], "--import")
    gate_file.write_text(FILE.replace("0.5", "0.25"))
    import_files([gate_file], "--import")
    assert gates.get("of_a_file").half == 0.25  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"is one path \(allowed: a list of paths\)"):
        import_files(str(gate_file), "--import")


NOTEBOOK = """
import linecache
cell = '''
import cyclebench

@cyclebench.register_gate("of_a_notebook")
class Mine(cyclebench.Gate):
    def merge(self, step, branch, hidden, update, zero_attention):
        return hidden + HALF * update
'''
digests = []
for number, half in enumerate(("0.5", "0.5", "0.25")):
    text, file = cell.replace("HALF", half), f"<ipython-input-{number}>"
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    exec(compile(text, file, "exec"), globals())
    from bench.plugins import digests as told
    digests.append(told()["gate of_a_notebook"])
assert digests[0] == digests[1] != digests[2], digests
try:
    cyclebench.register_task("modular_chain")(type("Chain", (cyclebench.Task,), {"__module__": "__main__"}))
except cyclebench.UserError as error:
    assert "is taken by bench.data.modular_chain" in str(error), error
assert "p_hop" in {row for row in __import__("bench.data.task", fromlist=["tasks"]).tasks.names()}
"""


def test_what_a_notebook_defines_again_is_seen_and_no_name_is_taken_from_the_suite() -> None:
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_module_beside_the_notebook_reaches_the_workers(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(FILE)
    send = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import beside; from bench.plugins import pack; "
    send += "sys.stdout.buffer.write(pack())"
    packed = subprocess.run([sys.executable, "-c", send], capture_output=True, check=True).stdout
    take = "import sys; from bench.plugins import unpack; unpack(sys.stdin.buffer.read()); "
    take += "from bench.model.gates import gates; print(gates.get('of_a_file').half, 'beside' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", take], input=packed, capture_output=True, check=True, cwd="/")
    assert found.stdout.split() == [b"0.5", b"False"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is not a file"),
        ("import nowhere", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("1 +", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        (FILE.replace("of_a_file", "scalar"), "gate name 'scalar' is taken by bench.model.gates.ScalarGate"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(gate_file: Path, text: str | None, told: str) -> None:
    path = gate_file.with_name(f"other_{hashlib.sha256(str(text).encode()).hexdigest()[:6]}.py")
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        import_files([path], "--import")
    assert told in str(error.value)


def test_every_command_that_reads_a_study_takes_files_that_register_what_it_uses() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        options = inspect.signature(command.callback).parameters
        assert "imports" in options or not {"study", "studies"} & {*options}, command.callback.__name__


def test_a_name_is_registered_once_and_the_same_definition_again() -> None:
    registry: Registry[type] = Registry("thing", "cyclebench.things", "bench.errors")
    try:
        first = registry.register("one")(type("First", (), {"__module__": "a"}))
        again = registry.register("one")(type("First", (), {"__module__": "a"}))
        assert registry.get("one") is again is not first
        with pytest.raises(UserError, match=r"thing name 'one' is taken by a\.First"):
            registry.register("one")(type("Second", (), {"__module__": "a"}))
        with pytest.raises(UserError, match="unknown thing 'oen'; did you mean 'one'"):
            registry.get("oen")
    finally:
        Registry.all.remove(registry)


@pytest.mark.long
def test_a_broken_entry_point_is_one_line_that_names_it(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cyclebench.gates]\nbad = no_such_module\n")
    code = "from bench.cli import main; import sys; sys.argv = ['cyclebench', 'list']; main()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: entry point bad = 'no_such_module' of cyclebench.gates cannot be loaded: ModuleNotFoundError: "
        "No module named 'no_such_module'"
    ]


SCRIPT = textwrap.dedent(
    """
    import cyclebench


    @cyclebench.register_variant("of_the_script")
    class OfTheScript(cyclebench.variant_class("htc")):
        '''Head-Tail Cycling of a script.'''


    results = cyclebench.run(
        {
            "name": "script",
            "question": "Does it need a guard?",
            "tasks": [{"name": "p_hop", "options": {"n_train": 200, "n_valid": 20, "n_test": 20}}],
            "variants": ["htc", "of_the_script"],
            "seeds": 1,
            "model": {"d_model": 16, "n_heads": 2},
            "train": {"steps": 4, "batch_size": 4},
        },
        tracking_uri="sqlite:///mlflow.db",
    )
    frame = results.frame().set_index("variant")
    assert (frame.status == "done").all(), frame
    assert frame.test_loss["htc"] == frame.test_loss["of_the_script"]  # the same model under another name
    assert set(results.exits()["rule"]) >= {"confidence", "random", "oracle"}
    assert results.history().train_loss.notna().all()
    assert results.figure("accuracy_vs_flops").axes
    assert list(cyclebench.load_results("script.yaml", runs="runs").frame().id) == list(results.frame().id)
    codes = {cell.variant: [*record.code] for cell, record in results._finished()}
    assert codes == {"htc": [], "of_the_script": ["variant of_the_script"]}, codes
    print("all is well")
    """
)


@pytest.mark.long
def test_a_script_without_a_guard_runs_a_variant_of_its_own_and_nothing_is_shadowed(
    tmp_path: Path, no_runs: Path
) -> None:
    shutil.copy(no_runs, tmp_path / "mlflow.db")
    for name in ("bench", "variants", "reports", "studies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a folder of the user is not the suite')\n")
    (tmp_path / "studies" / "quick.yaml").write_text("name: theirs\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "script.yaml").write_text("{name: script, question: '-', tasks: [p_hop], variants: [htc], seeds: 1}")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["all is well"], done.stderr
    assert "changed since" not in done.stdout
    (tmp_path / "script.py").write_text(SCRIPT.replace("of a script.", "of this script."))
    again = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "changed since: the code of variant of_the_script, after 1 cell that used it" in again.stdout, again.stderr
    quick = "import cyclebench; print(cyclebench.load_study('quick').name)"
    found = subprocess.run([sys.executable, "-c", quick], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == "quick", found.stderr
    theirs = "import sys; sys.path.insert(0, ''); sys.modules['variants'] = type(sys)('variants'); import cyclebench"
    refused = subprocess.run([sys.executable, "-c", theirs], cwd=tmp_path, capture_output=True, text=True)
    assert "was imported before cyclebench" in refused.stderr
