"""A study's finished models scored on tasks of lm-evaluation-harness; scores are kept beside the models' results.

Models are scored one after the other by the process that runs the study, on a GPU if there is one. What is stored is
not scored again, unless the task itself has changed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.data.task import task_data
from bench.downstream.run import Asked, Harness, open_checkpoint
from bench.errors import UserError, typed_line
from bench.store.records import HarnessScores
from bench.store.store import Store
from bench.study.harness import PREFIX, HarnessEntry
from bench.study.plan import Planned
from bench.study.schema import Study

Tell = Callable[[str], object]


class Scoring:
    """A study's tasks of the harness, to be asked of its models."""

    def __init__(self, study: Study) -> None:
        """Raises UserError, before anything is trained, for a task that nobody knows."""
        only = study.tasks[0].label
        self._entries = [(entry, entry.on or only) for entry in study.harness]
        include = list(dict.fromkeys(entry.include for entry, _ in self._entries if entry.include is not None))
        self._harness = Harness([_asked(entry) for entry, _ in self._entries], include)
        self._of = {entry.key: _digest(entry) for entry, _ in self._entries}
        self._failed: dict[str, str] = {}

    def score(self, store: Store, cells: Iterable[Planned], tell: Tell) -> dict[str, str]:
        """Score the finished ones of the cells where they lack scores; why it could not be done, by name and task.

        tell: called with a line for every score, and for every task that has changed since it was scored.
        """
        for planned in cells:
            id = planned.cell.id
            if not store.done(id):
                continue
            known = store.harness(id)
            name = f"{planned.variant} {planned.task} seed {planned.cell.seed}"
            for entry in (entry for entry, on in self._entries if on == planned.task):
                where = f"{name}, {entry.key}"
                if where in self._failed:
                    continue
                try:
                    if entry.key not in known or known[entry.key].of != self._of[entry.key]:
                        if entry.key in known:
                            tell(f"harness: {where}: the task has changed since it was scored: scored again")
                        found = self._scores(store.folder(id) / "model", entry)
                        if entry.key not in found:
                            raise UserError(f"the harness has no score of {entry.name!r} as a whole: name its parts")
                        store.write_harness(id, found)
                        known |= found
                        told = ", ".join(f"{metric} {value:.4g}" for metric, value in found[entry.key].scores.items())
                        tell(f"harness: {where}: {told}")
                    if entry.metric not in known[entry.key].scores:
                        has = ", ".join(known[entry.key].scores)
                        raise UserError(f"harness: {entry.name!r} has no metric {entry.metric!r} (it has: {has})")
                except Exception as error:  # of one task on one model: the others go on
                    self._failed[where] = str(error) if isinstance(error, UserError) else typed_line(error)
        return self._failed

    def _scores(self, model: Path, entry: HarnessEntry) -> dict[str, HarnessScores]:
        """Of a model, by key; a group's parts as well."""
        lm, tokenizer = open_checkpoint(str(model))
        if tokenizer is None:
            raise UserError("the model has no tokeniser beside it, which lm-evaluation-harness needs")
        if torch.cuda.is_available():
            lm.to("cuda")  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            rows = self._harness.score(lm, tokenizer, _asked(entry), Path(folder))
        found: dict[str, HarnessScores] = {}
        name = (PREFIX if entry.ours else "") + entry.name
        for row in rows:
            key = entry.key if row["task"] == name else f"{entry.key}/{row['task']}"
            if key not in found:
                found[key] = HarnessScores(
                    of=self._of[entry.key],
                    scores={},
                    errors={},
                    flops_per_token=float(row["flops_per_token"]),
                    samples=row["samples"],
                    version=self._harness.version,
                )
            found[key].scores[row["metric"]] = row["value"]
            if row["stderr"] is not None:
                found[key].errors[row["metric"]] = row["stderr"]
        return found


def _asked(entry: HarnessEntry) -> Asked:
    return Asked(entry.name, entry.options, entry.limit, entry.fewshot)


def _digest(entry: HarnessEntry) -> str:
    """What tells a task from others of the same name: its data, or the files in its folder."""
    if entry.ours:
        return task_data(entry.name, entry.options).fingerprint
    digest = hashlib.sha256()
    for path in sorted(Path(entry.include).rglob("*")) if entry.include is not None else []:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(entry.include or '')}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest() if entry.include is not None else ""
