"""What notebooks and scripts do with the suite, and the command line as well: run a study, open what has been run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import UserError, unknown
from bench.plugins import changed_since, digests, import_files
from bench.run.upgrade import open_store
from bench.store.manifest import CellRow, Manifest
from bench.store.records import Failure, Outcome, Record, configuration, dotted
from bench.store.store import Store
from bench.study.load import load_study, names_a_study, said_since, study_from, study_names
from bench.study.schema import Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from bench.store.store import Records
    from bench.store.tracker import Findings
    from bench.study.plan import Plan

TRACKING = "sqlite:///mlflow.db"
LABELS = ("variant", "task", "seed")  # of a cell's configuration, what its row in the manifest tells
StudySource = str | Path | Mapping[str, Any] | Study
"""The name of a study that comes with the suite, a YAML file, what such a file holds as a mapping, or a study."""


def open_study(study: StudySource, set: Sequence[str] = (), preset: str | None = None) -> Study:
    """A study from whatever names it.

    Args:
        study: a name, a file, a mapping, or a study (which takes no overrides and no preset).
        set: overrides, ``["train.steps=100"]``.
        preset: one of the study's, ``small`` by default where it has that.

    Raises:
        UserError: one line that says what is wrong.
    """
    if isinstance(study, Study):
        if set or preset is not None:
            raise UserError("set, preset: a study that is made already takes none (allowed: a name, a file, a mapping)")
        return study
    if isinstance(study, Mapping):
        return study_from(dict(study), set, "study", preset)
    return load_study(str(study), set, preset)


class Results:
    """The cells of a study's last run: what each is, what came out of it, and what may be concluded.

    It is read from the store alone and holds no model. Cells that are missing or have failed are told as such.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Use ``run`` or ``load_results``.

        Args:
            store: where the results lie.
            manifest: which cells the study consists of.
        """
        self.store, self.manifest = store, manifest
        self.said_since: list[str] = []  # what the study that names the run says by now, and did not when it was run
        self.paths: list[Path] = []  # of the report's files, where one was written
        self.unscored: dict[str, str] = {}  # why a model could not be scored on a task of the harness, by both

    def __repr__(self) -> str:
        states = [row["status"] for row in self._rows()]
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"<Results of {self.manifest.study!r}: {told}>"

    @cached_property
    def records(self) -> dict[str, Outcome]:
        """Records by cell id, as figures and tables need them; cells without one left out."""
        from reports.read import read  # start-up

        return read(self.store, self.manifest)

    @property
    def newer(self) -> list[str]:
        """What has changed since the run, in words: what the study says, and code that was registered by hand."""
        if not (now := digests()):  # then no record need be read
            return self.said_since
        codes = (record.code for record in self.records.values() if record.status == "done")
        return [*self.said_since, *changed_since(codes, now)]

    @property
    def failed(self) -> list[tuple[CellRow, Failure]]:
        """The failed cells: the manifest's row and the record, with its ``reason``."""
        found = [(cell, self.records.get(cell.id)) for cell in self.manifest.cells]
        return [(cell, record) for cell, record in found if record is not None and record.status == "failed"]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for cell in self.manifest.cells:
            record = self.records.get(cell.id)
            row = {**cell.dump(), "status": record.status if record else "missing"}
            if record is not None:
                told = configuration(record).items()
                row |= dict(dotted({key: value for key, value in told if key not in LABELS}))
            if record is not None and record.status == "done":
                row |= record.scores
                row |= {f"costs.{key}": value for key, value in record.costs.dump().items()}
                row |= {f"timing.{key}": value for key, value in record.timing.dump().items()}
            elif record is not None:
                row["reason"] = record.reason
            yield row

    def frame(self) -> pd.DataFrame:
        """A row a cell: ``variant``, ``task`` (labels), ``seed``, ``id``, ``status``, its configuration by dotted keys
        (``model.d_model``), its metrics (``test_accuracy``), ``costs.*`` (FLOPs, bytes, parameters) and ``timing.*``
        (seconds).
        """
        import pandas as pd  # start-up

        return pd.DataFrame(list(self._rows()))

    def exits(self) -> pd.DataFrame:
        """A row a finished cell, exit rule and stored point of its curve on the test data: ``threshold`` (NaN: none
        leaves early), ``flops_per_token`` (executed, forward), ``mean_cycles``, ``loss``, ``accuracy``, for text
        ``bits_per_byte``.
        """
        import pandas as pd  # start-up

        parts = []
        for cell, record in self._finished():
            for rule, found in (record.exits.rules if record.exits else {}).items():
                columns = {name: column for name, column in found.curve.items() if name != "share"}
                parts.append(pd.DataFrame({**cell.dump(), "rule": rule, "leave": found.leave, **columns}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def history(self) -> pd.DataFrame:
        """A row a finished cell and validation: ``step``, ``tokens``, ``flops`` (training), ``seconds``, ``train_loss``
        and the validation's scores.
        """
        import pandas as pd  # start-up

        rows = [cell.dump() | entry.dump() for cell, record in self._finished() for entry in record.history]
        return pd.DataFrame(rows)

    def verdicts(self) -> pd.DataFrame:
        """A row for each of the study's hypotheses, as the report tells it."""
        import pandas as pd  # start-up

        from reports.verdicts import verdicts  # start-up

        return pd.DataFrame(verdicts(self.manifest, self.records))

    def figure(self, name: str, task: str | None = None) -> Figure:
        """One of the report's figures.

        Args:
            name: of the figure, such as ``accuracy_vs_flops``.
            task: label of the task it is of; may be left out where the study has a single one.

        Raises:
            UserError: if there is no such figure or task, or it has nothing to show here.
        """
        import matplotlib as mpl  # start-up

        from reports.drawing import figures  # start-up
        from reports.look import STYLE  # start-up
        from reports.render import DPI, render  # start-up

        drawing = figures.get(name)
        tasks = {row.label: row for row in self.manifest.tasks}
        if drawing.over_tasks:
            found = drawing(self.manifest, self.records)
        else:
            label = task if task is not None else next(iter(tasks)) if len(tasks) == 1 else None
            if not isinstance(label, str) or label not in tasks:
                raise unknown("task of the study:", task, tasks)
            found = drawing(self.manifest, self.records, tasks[label])
        if found is None:
            raise UserError(f"figure {name!r} has nothing to show of study {self.manifest.study!r}")
        vars(found)["savefig"] = mpl.rc_context({**STYLE, "savefig.dpi": DPI})(found.savefig)  # as in the report
        vars(found)["_repr_png_"] = lambda: render(found, name, ("png",))["png"]  # what a notebook asks for
        return found

    def findings(self) -> Findings:
        """Verdicts, table and means, as trackers show them."""
        from reports.first_page import findings  # start-up

        return findings(self.manifest, self.records)

    def report(
        self, out: str | Path | None = None, formats: Sequence[str] = ("png",), published: bool = False
    ) -> list[Path]:
        """Write the report: tables, figures and the page.

        Args:
            out: folder, by default ``reports/STUDY`` in the folder of the results.
            formats: of the figures: ``png``, ``svg``, ``pdf``.
            published: only what a repository shows: PNG, Markdown and CSV; those of the study's sweep as well.

        Returns:
            The paths of all files.

        Raises:
            UserError: for another format, and where ``out`` is no folder.
        """
        from reports.pool import renderers  # start-up

        folder = Path(out) if out is not None else self.store.root / "reports" / self.manifest.study
        with renderers(len(self.manifest.cells)) as pool:
            from reports.page import write_report  # start-up

            sweeps = [s for s in self.store.sweeps() if (s.of or s.study) == self.manifest.study]
            shown = () if published else sweeps
            self.paths = write_report(self.manifest, self.records, folder, published, formats, pool, shown)
        if published and (own := [s for s in sweeps if s.study == self.manifest.study]):  # as it is written
            from reports.sweeps import write_sweep  # start-up

            self.paths += write_sweep(own[0], folder, ("png",))
        return self.paths

    def _finished(self) -> Iterator[tuple[CellRow, Record]]:
        """Labels and whole records of the finished cells."""
        for cell in self.manifest.cells:
            record = self.store.record(cell.id)
            if record is not None and record.status == "done":
                yield cell, record


def load_results(
    study: StudySource, runs: str | Path = "runs", preset: str | None = None, set: Sequence[str] = ()
) -> Results:
    """What is stored of a study's last run, finished or not.

    Args:
        study: whatever names it, or what a run in ``runs`` is called (``quick+9ecf4a19``).
        runs: folder of the results.
        preset: one of the study's.
        set: the overrides that it was run with; seeds need not be told, but for pilots.

    Raises:
        UserError: if it has not been run.
    """
    store = open_store(runs)
    if isinstance(study, str) and not names_a_study(study) and not set and preset is None:
        manifest = store.manifest(study) if study in store.studies() else None
        if manifest is None:
            raise unknown("study", study, {*study_names(), *store.studies()})
        found = [path for path in manifest.config.get("imports", ()) if Path(path).is_file()]
        import_files(found, f"{study}: imports")  # of a study from another machine they may not be here
        return Results(store, manifest)
    opened = open_study(study, set, preset)
    manifest = store.manifest(opened.name)
    if manifest is None:
        from bench.run.status import run_in_words, runs_of  # start-up

        others = "; ".join(map(run_in_words, runs_of(store, opened.name)))
        there = f"{store.root} holds {others}" if others else f"{store.root} holds no record of it"
        raise UserError(f"study {opened.name!r} has not been run: {there} (run: {_command(study, set, preset, runs)})")
    results = Results(store, manifest)
    results.said_since = said_since(manifest.config, opened)
    return results


def _command(study: StudySource, set: Sequence[str], preset: str | None, runs: str | Path) -> str:
    """What runs a study."""
    if not isinstance(study, str | Path):
        return "cyclebench.run"
    changes = [part for override in set for part in ("--set", override)]
    where = [] if Path(runs) == Path("runs") else ["--runs", str(runs)]
    return shlex.join(["cyclebench", "run", str(study), *(["--preset", preset] if preset else []), *changes, *where])


def run(
    study: StudySource,
    set: Sequence[str] = (),
    preset: str | None = None,
    runs: str | Path = "runs",
    jobs: int | None = None,
    *,
    pack: int | None = None,
    executor: Literal["local", "ray"] = "local",
    address: str | None = None,
    retry: bool = False,
    checkpoint_every: str = "60s",
    hang: float = 60.0,
    storage: str | None = None,
    imports: Sequence[str | Path] = (),
    tracker: str = "mlflow",
    tracking_uri: str = TRACKING,
    out: str | Path | None = None,
    formats: Sequence[str] = ("png",),
    command: str = "cyclebench.run",
    tell: Callable[[str], object] = print,
) -> Results:
    """Run a study's cells, track them in MLflow, write the report and return the results.

    A study with ``decide`` adds seeds until its hypotheses are decided (``bench.run.deciding``). Cells that are done
    are not run again, interrupted ones go on from their checkpoints. The same call in several
    processes, on several machines that share the results' folder, divides the cells between them. It needs no
    ``if __name__ == "__main__":`` around it, and variants registered in the calling notebook or script are known to its
    workers.

    Args:
        study: whatever names it.
        set: overrides, ``["train.steps=100", "seeds=3"]``.
        preset: one of the study's.
        runs: folder of the results.
        jobs: cells at a time; None: the cores over a cell's threads and processes.
        pack: seeds and learning rates in one stack at most, where ``train.stacked`` has stacks; None: as many as pay.
        executor: processes on this machine, or tasks of Ray.
        address: of the Ray cluster; None starts one here.
        retry: run failed cells again, whatever they failed of.
        checkpoint_every: seconds (``90s``), minutes (``10m``) or optimizer steps (``500``).
        hang: minutes without a sign of life after which a cell is ended, as if its process had died.
        storage: database of the tuning's trials, any SQLAlchemy URL; by default ``optuna.db`` in ``runs``.
        imports: Python files that register variants, tasks, rules, gates or figures.
        tracker: what shows the results beside the report, ``mlflow`` or a plug-in's.
        tracking_uri: where it keeps its records.
        out: folder of the report, by default inside ``runs``.
        formats: of the report's figures: ``png``, ``svg``, ``pdf``.
        command: what the report says it was made by.
        tell: called with lines about what the matching chose, what there is to know of the data, and what models score
            on tasks of lm-evaluation-harness.

    Raises:
        UserError: one line that says what is wrong.
    """
    if address is not None and executor != "ray":
        raise UserError(f"--address: {address!r} is of a Ray cluster (allowed: only with --executor ray)")
    import_files(imports, "--import")
    loaded = open_study(study, set, preset)  # a mistake is told before the seconds that the rest takes to import
    from bench.data.task import forget  # start-up
    from bench.run.deciding import decide  # start-up
    from bench.run.executors import hang_seconds  # start-up
    from bench.run.runner import Running, run_study  # start-up
    from bench.run.seeds import after_verdicts, of_the_same_cells, with_earlier  # start-up
    from bench.run.told import told  # start-up
    from bench.store.environment import git_revision  # start-up
    from bench.store.tracker import trackers  # start-up
    from bench.sweep.storage import default_url  # start-up
    from bench.sweep.tune import tuned_plan  # start-up
    from bench.train.checkpoints import Every  # start-up
    from reports.render import check_output  # start-up

    forget()
    check_output(out, formats)
    every, silent = Every.parse(checkpoint_every), hang_seconds(hang)
    how = Running(jobs, retry, every, executor, address, pack=pack, hang=silent)
    store = open_store(runs)
    window, held = trackers.get(tracker)(tracking_uri, store), dict[str, Failure]()

    def run_plan(plan: Plan) -> Records:
        open_store(runs, begin=True)  # not before: a mistake leaves no folder behind
        window.begin(plan.manifest)
        window.catch_up(plan.manifest)
        records = run_study(plan, store, how, window.add, window)
        window.finish([])
        held.update(records.held)
        return records

    scoring, unscored = None, dict[str, str]()
    if loaded.harness:
        from bench.downstream.study import Scoring  # start-up

        scoring = Scoring(loaded)
    url = storage or (default_url(store.root) if loaded.tune is not None else "")
    plan = tuned_plan(with_earlier(loaded, store), run_plan, command, git_revision(), url)
    plan = after_verdicts(of_the_same_cells(plan, loaded.seeds, store), store)
    for line in told(loaded, plan, store):
        tell(line)

    def run_scored(plan: Plan) -> Records:
        records = run_plan(plan)
        if scoring is not None:
            unscored.update(scoring.score(store, plan.cells, tell))
        return records

    def run_all() -> tuple[Results, AbstractSet[str]]:
        """The results, and the ids of the cells that should be among them."""
        if not loaded.decides:
            return Results(store, plan.manifest), {*run_scored(plan)}
        if scoring is not None:  # those of before are judged first
            unscored.update(scoring.score(store, plan.cells, tell))
        come_to = decide(plan, run_scored, store, tell)
        return Results(store, come_to.manifest), {planned.cell.id for planned in come_to.cells}

    results, ran = run_all()
    if ran - held.keys() - results.records.keys():  # damaged ones, set aside when they were read
        results, _ = run_all()
    results.records.update(held)  # failures that a full disk has refused
    results.unscored = unscored
    for change in results.newer:
        tell(f"changed since: {change}")
    results.report(out, formats)
    window.complete(results.manifest, results.paths, results.findings())
    return results
