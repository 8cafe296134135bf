"""MLflow against the store, run by run and metric by metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlflow import MlflowClient

from bench.store.manifest import Manifest
from bench.store.mlflow_server import EXPERIMENT
from bench.store.records import Record, configuration
from bench.store.store import Store
from bench.store.tracking import CELL_TAG, SEARCH, STUDY


def runs_of(client: MlflowClient) -> list[Any]:
    """All runs of the suite, deleted ones left out."""
    found = [each for each in client.search_experiments() if each.name.split("/")[0] == EXPERIMENT]
    assert found
    return list(client.search_runs([each.experiment_id for each in found], max_results=5000))


def flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, str(inner)


def curves(record: Record) -> dict[str, list[tuple[int, float]]]:
    """What MLflow must hold of a record: (step, value) by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in record.history:
        for name, value in entry.dump().items():
            if name not in ("step", "seconds"):
                found.setdefault(name, []).append((entry.step, value))
                found.setdefault(f"by_mflops/{name}", []).append((int(entry.flops / 1e6), value))
    found |= {name.replace("@", " at "): [(0, value)] for name, value in record.metrics.items()}
    for group, values in (("costs", record.costs.dump()), ("timing", record.timing.dump())):
        found |= {f"{group}.{name}": [(0, value)] for name, value in values.items()}
    for point in record.exits.points if record.exits else ():
        for name in {"accuracy", "bits_per_byte"} & point.dump().keys():
            at = round(point.flops_per_token / 1e3), point.score(name)
            found.setdefault(f"by_executed_kflops/fixed/{name}", []).append(at)
    return found


def by_rule(record: Record) -> set[str]:
    """The names of the exit rules' curves: their values are in ``test_tracking``."""
    rules = record.exits.rules.items() if record.exits else ()
    plain = {(key, name) for key, rule in rules for name in rule.curve if "." not in key and key != "fixed"}
    return {f"by_executed_kflops/{key}/{name}" for key, name in plain if name in ("accuracy", "bits_per_byte")}


def assert_agree(uri: str, store: Store, manifest: Manifest) -> None:
    """Whether MLflow holds one finished run of the study, and below it what the store holds of it, once and whole."""
    client = MlflowClient(uri)
    runs = runs_of(client)
    (parent,) = [run for run in runs if run.data.tags.get(STUDY) == manifest.study]
    assert parent.info.status == "FINISHED"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    records = store.results(cell.id for cell in manifest.cells)
    assert sorted(run.data.tags[CELL_TAG] for run in children if CELL_TAG in run.data.tags) == sorted(records)
    searches = {row.study: row for row in store.searches(manifest.study)}
    assert sorted(run.data.tags[SEARCH] for run in children if SEARCH in run.data.tags) == sorted(searches)
    for run in children:
        if SEARCH in run.data.tags:
            assert run.info.status == "FINISHED"
            assert run.data.metrics["trials"] == searches[run.data.tags[SEARCH]].trials
            continue
        record = records[run.data.tags[CELL_TAG]]
        assert run.data.params == dict(flat(configuration(record)))
        (data,) = run.inputs.dataset_inputs
        assert data.dataset.name == record.cell.task and record.cell.fingerprint.startswith(data.dataset.digest)
        files = {path.path for path in client.list_artifacts(run.info.run_id)}
        if record.status == "failed":
            assert (run.info.status, run.data.tags["reason"]) == ("FAILED", record.reason)
            assert "failure.json" in files
            continue
        assert run.info.status == "FINISHED" and run.info.start_time == int(1000 * record.timing.started)
        expected = curves(record)
        assert {name for name in run.data.metrics if not name.startswith("system/")} == {*expected, *by_rule(record)}
        for name, values in expected.items():
            if len(values) > 1:
                history = client.get_metric_history(run.info.run_id, name)
                assert [(metric.step, metric.value) for metric in history] == values, name
            else:
                assert run.data.metrics[name] == values[0][1], name
        here = {p.name for p in store.folder(record.id).iterdir()}
        assert files == here & {"result.json", "log.txt"}
        if (local := Path(urlparse(run.info.artifact_uri).path, "result.json")).exists():
            assert local.read_bytes() == (store.folder(record.id) / "result.json").read_bytes()
