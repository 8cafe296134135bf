"""Tasks of lm-evaluation-harness that a user could have written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The harness asks pip for every package there is, each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)
        yield


def own_task(folder: Path, name: str, documents: list[dict[str, Any]], metrics: tuple[str, ...], **about: Any) -> Path:
    """A folder with a task of one's own. about: what kind it is, and how a document becomes a prompt."""
    folder.mkdir(exist_ok=True)
    (folder / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    frame = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{ask}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(frame | about))
    return folder
