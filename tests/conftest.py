import os
from collections.abc import Iterator
from pathlib import Path

# Before anything is imported: the tests never reach for a hub, and two workers share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # who waits for another thread lets it have the core
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import commands
import pytest
import torch
from hypothesis import settings

from bench import plugins, processes
from bench.registry import Registry

torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None)  # how long an example takes tells more of the machine's neighbours
settings.load_profile("quiet")

# What a whole command imports, once for all that are forked (tests/commands.py).
processes.PRELOADED += [
    "datasets",
    "mlflow.store.db.utils",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.processing_utils",
    "bench.api",
    "bench.run.runner",
    "bench.sweep.run",
    "bench.sweep.tune",
    "reports.page",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def no_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without a run (``commands.no_runs``), to be copied."""
    path = tmp_path_factory.mktemp("mlflow") / commands.DATABASE
    path.write_bytes(commands.no_runs())
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, for tests of what they say: to draw takes most of a report's time."""
    monkeypatch.setattr("reports.page._drawn", lambda *_: iter(()))


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_imported() -> Iterator[None]:
    """What the files that a test imports have registered is forgotten after its module, so that it harms no other."""
    yield
    plugins._imported.cache_clear()
    for registry in Registry.all:
        for name in [name for name, it in registry.registered().items() if it.__module__.startswith(plugins.PREFIX)]:
            del registry._found[name]
