import os
from pathlib import Path

# Before anything is imported: the tests never reach for a hub, and two workers share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # who waits for another thread lets it have the core
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch
from hypothesis import settings

from bench import processes

torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None)  # how long an example takes tells more of the machine's neighbours
settings.load_profile("quiet")

# What a whole command imports, once for all that are forked (tests/commands.py).
processes.PRELOADED += [
    "mlflow",
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
    """An SQLite file as MLflow makes it, to be copied: its tables take seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
