"""Run lm-evaluation-harness on a checkpoint, counting the FLOPs its requests execute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bench.downstream.tasks import export, ours
from bench.errors import UserError
from bench.model.costs import pass_flops
from bench.model.language_model import CycleForCausalLM
from bench.model.variant import get_variant
from bench.pretrained.convert import convert
from bench.pretrained.sources import load, load_tokenizer, locate
from bench.store.digests import DamagedError, check_model


@dataclass
class Meter:
    """A hook that runs a model at a number of cycles and counts what it executes, padding and the LM head included.

    tokens: positions computed; flops: forward, of all passes so far.
    """

    lm: CycleForCausalLM
    n_cycles: int | None
    tokens: int = 0
    flops: int = 0
    _of: dict[int, int] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of the model."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        batch, length = ids.shape
        if length not in self._of:
            self._of[length] = pass_flops(self.lm, length, self.lm.device.type, self.n_cycles).forward
        cache = kwargs.get("cache")
        past = cache.get_seq_length() if cache is not None else 0
        shape, depth = self.lm.model_shape, self.lm.schedule_at(self.n_cycles).depth
        before = 4 * depth * shape.n_heads * length * past * shape.head_dim  # attention to what the cache holds
        self.flops += batch * (self._of[length] + before)
        self.tokens += batch * length
        return args, {**kwargs, "n_cycles": self.n_cycles}


def open_checkpoint(source: str) -> tuple[CycleForCausalLM, PreTrainedTokenizerBase | None]:
    """A model of this suite by its folder; any other source as the plain stack it is, and its tokeniser."""
    where = locate(source)
    if where.gguf is None and '"cyclebench"' in (where.folder / "config.json").read_text(encoding="utf-8"):
        try:
            check_model(where.folder)
        except DamagedError as error:
            raise UserError(f"checkpoint {source!r}: {error}") from None
        return CycleForCausalLM.from_pretrained(where.folder).eval(), load_tokenizer(source)
    pretrained = load(source)
    return convert(pretrained, get_variant("vanilla"), pretrained.outline.shape), pretrained.tokenizer


def evaluate_checkpoint(
    source: str,
    tasks: Sequence[str],
    options: dict[str, dict[str, Any]],
    cycles: Sequence[int | None],
    folder: Path,
    batch_size: int = 16,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Scores of a checkpoint: a row for each task, metric and number of cycles, with the FLOPs per token it took.

    Args:
        tasks: ours by name, written into ``folder`` first, or any of the harness's.
        options: of ours.
        cycles: numbers to run the model at, None for the one it was made with.
        limit: documents of a task, None for all.

    Raises:
        UserError: for an unknown task, or a checkpoint without a tokeniser.
    """
    try:
        from lm_eval import simple_evaluate  # optional
        from lm_eval.models.huggingface import HFLM  # optional
        from lm_eval.tasks import TaskManager  # optional
    except ImportError:
        raise UserError("eval needs the package lm-eval (pip install 'cyclebench[eval]')") from None

    lm, tokenizer = open_checkpoint(source)
    if tokenizer is None:
        raise UserError(f"checkpoint {source!r} has no tokeniser beside it, which lm-evaluation-harness needs")
    if torch.cuda.is_available():
        lm.to("cuda")  # type: ignore[arg-type]
    exported = {name: export(name, dict(options.get(name, {})), folder, tokenizer) for name in tasks if ours(name)}
    # Reading the harness's own thousands of tasks takes longer than many of ours.
    theirs = any(name not in exported for name in tasks)
    manager = TaskManager(include_path=str(folder) if exported else None, include_defaults=theirs)
    for name in tasks:
        if name not in exported and name not in manager.all_tasks:
            raise UserError(f"unknown task {name!r} (allowed: a task of this suite or of lm-evaluation-harness)")
    rows = []
    for name in tasks:
        task = exported.get(name)
        harness = HFLM(
            pretrained=lm,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=task.length if task else None,
            prefix_token_id=task.first_token if task else None,
        )
        for n_cycles in cycles:
            meter = Meter(lm, n_cycles)
            hook = lm.register_forward_pre_hook(meter, with_kwargs=True)
            try:
                found = simple_evaluate(
                    harness,
                    tasks=[task.name if task else name],
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
            finally:
                hook.remove()
            if found is None:
                raise UserError(f"task {name!r}: the harness gave no result")
            rows += _rows(found, lm.schedule.n_cycles if n_cycles is None else n_cycles, meter)
    return rows


def _rows(found: Any, n_cycles: int, meter: Meter) -> list[dict[str, Any]]:
    """The harness's results as flat rows, a score with its standard error."""
    rows = []
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "cycles": n_cycles,
                    "flops_per_token": meter.flops / meter.tokens,
                    "samples": found["n-samples"][task]["effective"],
                }
            )
    return rows
