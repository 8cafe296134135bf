"""Our tasks as tasks of lm-evaluation-harness: a YAML file and local JSON lines, which plain ``lm_eval`` reads as well.

A generated task gives one document for each scored target: the ids before it as the context, written out, the target
as what must follow greedily; the harness's ``acc`` is our accuracy. A text gives one document, its first windows in a
row, and the harness's rolling log-likelihood is cut where our windows are, if the model's length is the window's: its
``bits_per_byte`` is ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from bench.config import IGNORED
from bench.data.batches import arrays
from bench.data.task import TaskData, build, get_task, tasks
from bench.data.text import TextOptions
from bench.errors import UserError

PREFIX = "cyclebench_"  # of the names our tasks have in the harness


@dataclass(frozen=True)
class Exported:
    """A task written for the harness.

    Attributes:
        name: there.
        first_token: what the text's first scored token is conditioned on, None where documents have a context.
        length: tokens of a window of text, None likewise.
    """

    name: str
    first_token: int | None
    length: int | None


def export(name: str, options: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Exported:
    """Write a task's test split into the folder as ``cyclebench_NAME.yaml`` and ``.jsonl``.

    tokenizer: the model's; a text's options.tokenizer must stand for the same one. Raises UserError for an unknown
    task or option.
    """
    is_text = issubclass(tasks.get(name).Options, TextOptions)
    # A text is read in one piece: its first windows, not some all over it.
    keep = options.pop("n_test", None) if is_text else None
    data = build(get_task(name, options))
    documents = _text(data, tokenizer, keep) if is_text else _targets(data)
    about: dict[str, Any] = {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{PREFIX}{name}.jsonl").resolve())}},
        "test_split": "test",
        "metadata": {"version": 1, "fingerprint": data.fingerprint},
    }
    if is_text:
        metrics = {name: "weighted_perplexity" for name in ("word_perplexity", "byte_perplexity")}
        metrics["bits_per_byte"] = "bits_per_byte"
        about |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    else:
        metrics = {"acc": "mean"}
        about |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{target}}"}
        about["target_delimiter"] = ""  # the target brings its own space
    about["metric_list"] = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": not is_text}
        for metric, aggregation in metrics.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    (folder / f"{PREFIX}{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / f"{PREFIX}{name}.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
    return Exported(
        PREFIX + name, int(arrays(data.test)[0][0, 0]) if is_text else None, data.length if is_text else None
    )


def ours(name: str) -> bool:
    """Whether a task of that name is ours."""
    return name in tasks.names()


def _text(data: TaskData, tokenizer: PreTrainedTokenizerBase, keep: int | None) -> list[dict[str, str]]:
    """The scored tokens of the first ``keep`` windows as one text; it must read back as the same tokens."""
    tokens = arrays(data.test)[1][:keep].ravel()
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != tokens.tolist():
        raise UserError(
            "tasks: the text is not what the model's tokeniser reads (set the task's options.tokenizer to the model's)"
        )
    return [{"text": str(text)}]


def _targets(data: TaskData) -> list[dict[str, str]]:
    ids, targets = arrays(data.test)
    return [
        {"context": " ".join(map(str, row[: place + 1])), "target": f" {goal[place]}"}
        for row, goal in zip(ids, targets, strict=True)
        for place in (goal != IGNORED).nonzero()[0]
    ]
