"""Our tasks as tasks of lm-evaluation-harness: a YAML file and local JSON lines, which plain ``lm_eval`` reads as well.

A generated task gives one document for each scored target: the ids before it as the context, written out, the target
as what must follow greedily; the harness's ``acc`` is our accuracy. An instruction gives one for each response, all of
which must follow greedily. A text gives one document, its first windows in a
row, and the harness's rolling log-likelihood is cut where our windows are, if the model's length is the window's: its
``bits_per_byte`` is ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from bench.config import IGNORED
from bench.data.batches import arrays
from bench.data.instruction import Instruction
from bench.data.task import TaskData, build, get_task, tasks
from bench.data.text import TextOptions
from bench.errors import UserError
from bench.form import TEXT
from bench.study.harness import PREFIX


@dataclass(frozen=True)
class Exported:
    """A task written for the harness.

    Attributes:
        name: there.
        path: of the YAML file.
        first_token: what the text's first scored token is conditioned on, None where documents have a context.
        length: tokens of a window of text, None likewise.
    """

    name: str
    path: Path
    first_token: int | None
    length: int | None


def export(name: str, options: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Exported:
    """Write a task's test split into the folder as ``cyclebench_NAME.yaml`` and ``.jsonl``.

    tokenizer: the model's; a text's options.tokenizer must stand for the same one. Raises UserError for an unknown
    task or option.
    """
    task = tasks.get(name)
    is_instruction = issubclass(task, Instruction)
    is_text = issubclass(task.Options, TextOptions) and not is_instruction
    # A text is read in one piece: its first windows, not some all over it.
    asked = get_task(name, options)  # with all options, so that each is checked
    keep = options.pop("n_test", None) if is_text else None
    data = build(get_task(name, options) if keep is not None else asked)
    if data.form != TEXT:
        raise UserError(f"task {name!r} has no tokens that a tokeniser could read (allowed: a task of text)")
    if is_text:
        documents = _text(data, tokenizer, keep)
    else:
        documents = _responses(data, tokenizer) if is_instruction else _targets(data, tokenizer)
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
        about["target_delimiter"] = ""  # the target brings its own space, if it has one
    about["metric_list"] = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": not is_text}
        for metric, aggregation in metrics.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    (folder / f"{PREFIX}{name}.jsonl").write_text(lines, encoding="utf-8")
    path = folder / f"{PREFIX}{name}.yaml"
    path.write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
    first = int(arrays(data.test)[0][0, 0]) if is_text else None
    return Exported(PREFIX + name, path, first, data.length if is_text else None)


def ours(name: str) -> bool:
    """Whether a task of that name is ours."""
    return name in tasks.names()


def _text(data: TaskData, tokenizer: PreTrainedTokenizerBase, keep: int | None) -> list[dict[str, str]]:
    """The scored tokens of the first ``keep`` windows as one text; it must read back as the same tokens."""
    tokens = arrays(data.test)[1][:keep].ravel()
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != tokens.tolist():
        raise _other_tokens()
    return [{"text": str(text)}]


def _other_tokens() -> UserError:
    return UserError(
        "tasks: the text is not what the model's tokeniser reads (set the task's options.tokenizer to the model's)"
    )


def _targets(data: TaskData, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Each target with what stands before it, as numbers, which any tokeniser may write in its own way."""
    try:
        tokenizer(" ".join(map(str, range(data.vocab_size))), add_special_tokens=False, verbose=False)
    except Exception:  # the library has no class of its own for a text that a vocabulary cannot write
        raise _other_tokens() from None
    ids, targets = arrays(data.test)
    return [
        {"context": " ".join(map(str, row[: place + 1])), "target": f" {goal[place]}"}
        for row, goal in zip(ids, targets, strict=True)
        for place in (goal != IGNORED).nonzero()[0]
    ]


def _responses(data: TaskData, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Each response with what stands before it; both must read back as the same tokens."""
    documents = []
    for row, goal in zip(*arrays(data.test), strict=True):
        scored = np.append(goal != IGNORED, False)
        for start, stop in zip(*(np.flatnonzero(np.diff(scored, prepend=False)).reshape(-1, 2).T), strict=True):
            parts = row[: start + 1].tolist(), goal[start:stop].tolist()
            texts = [str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in parts]
            for tokens, text in zip((parts[0], parts[0] + parts[1]), (texts[0], "".join(texts)), strict=True):
                if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != tokens:
                    raise _other_tokens()
            documents.append({"context": texts[0], "target": texts[1]})
    return documents
