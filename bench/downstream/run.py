"""Run lm-evaluation-harness on a checkpoint, counting the FLOPs its requests execute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase

from bench.downstream.tasks import export, ours
from bench.errors import UserError
from bench.evaluate.rules import get_rule
from bench.evaluate.usable import check_usable
from bench.exits.execute import Threshold
from bench.exits.whole import WholeExit
from bench.model.costs import pass_flops
from bench.model.counter import flop_counter
from bench.model.language_model import CycleForCausalLM
from bench.model.variant import get_variant
from bench.pretrained.convert import convert
from bench.pretrained.sources import load, load_tokenizer, locate, our_model
from bench.study.harness import asked_as


class Meter:
    """Runs a model at a number of cycles and counts what it executes, padding and the LM head included.

    What a pass over whole sequences executes follows from their length alone. All else is counted by PyTorch as it
    runs: where sequences leave early or decide on how many tokens a cycle runs, and where a cache holds what was
    before, as in generation. A context manager.

    Attributes:
        tokens: positions computed.
        flops: forward, of all passes so far.
        cycles: that these took, over all sequences and passes.
        passes: sequences in all passes.
    """

    def __init__(self, lm: CycleForCausalLM, n_cycles: int | None) -> None:
        self.lm, self.n_cycles = lm, n_cycles
        self.tokens = self.flops = self.cycles = self.passes = 0
        self._of: dict[int, int] = {}
        self._counter: FlopCounterMode | None = None
        self._number = {depth: number for number, depth in enumerate(lm.schedule_at(n_cycles).depths, 1)}

    def __enter__(self) -> Meter:
        lm = self.lm
        self._hooks = [lm.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._hooks.append(lm.register_forward_hook(self._after, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def mean_cycles(self) -> float:
        """Cycles that a sequence took in a pass."""
        return self.cycles / self.passes

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        batch, length = ids.shape
        cached = kwargs.get("cache", kwargs.get("past_key_values")) is not None
        if depends(self.lm) or cached or kwargs.get("use_cache") or kwargs.get("logits_to_keep"):
            self._counter = flop_counter(self.lm.model_shape.flops).__enter__()
        else:
            if length not in self._of:
                self._of[length] = pass_flops(self.lm, length, self.n_cycles).forward
            self.flops += batch * self._of[length]
        self.tokens += batch * length
        return args, {**kwargs, "n_cycles": self.n_cycles}

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops += self._counter.get_total_flops()
            self._counter = None
        if out is not None:
            numbers = [self._number[depth] for depth in out.exit_depth.tolist()]
            self.cycles, self.passes = self.cycles + sum(numbers), self.passes + len(numbers)


def depends(lm: CycleForCausalLM) -> bool:
    """Whether what the model executes, or says of a token, depends on the text behind it or beside it."""
    return lm.exits is not None or lm.variant.looks_ahead or (lm.recurrence is not None and lm.recurrence.chooses)


def open_checkpoint(source: str) -> tuple[CycleForCausalLM, PreTrainedTokenizerBase | None]:
    """A model of this suite by its folder, any other source as the plain stack it is, without gradients (which would
    stand in the way of PyTorch's counter); and its tokeniser.
    """
    where = locate(source)
    if where.gguf is None and b'"cyclebench"' in (where.folder / "config.json").read_bytes():
        return our_model(where.folder, source).requires_grad_(False), load_tokenizer(source)
    pretrained = load(source)
    lm = convert(pretrained, get_variant("vanilla"), pretrained.outline.shape)
    assert isinstance(lm, CycleForCausalLM)  # other sources than ours are
    return lm.requires_grad_(False), pretrained.tokenizer


@dataclass(frozen=True)
class Asked:
    """A task of the harness, and how it is asked.

    Attributes:
        name: ours, or one of the harness's.
        options: of ours.
        limit: documents, None for all.
        fewshot: examples in front of a document, None for as many as the task says.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    fewshot: int | None = None


class Harness:
    """lm-evaluation-harness with the tasks that are asked for."""

    def __init__(self, asked: Sequence[Asked], include: Sequence[str] = ()) -> None:
        """include: folders of YAML files of tasks. Raises UserError for a task that nobody knows, a folder that is not
        there, and without the harness.
        """
        try:
            import lm_eval  # optional
            from lm_eval.tasks import TaskManager  # optional
        except ImportError:
            raise UserError("eval needs the package lm-eval (pip install 'cyclebench[eval]')") from None
        self.version = str(lm_eval.__version__)
        for folder in include:
            if not Path(folder).is_dir():
                raise UserError(f"include: {folder!r} is not a folder (allowed: one of the harness's YAML files)")
        theirs = [one.name for one in asked if not ours(one.name)]
        self._manager = TaskManager(include_path=list(include) or None, include_defaults=False)
        if any(name not in self._manager.all_tasks for name in theirs):
            # Reading the harness's own thousands of tasks takes longer than many of ours.
            self._manager = TaskManager(include_path=list(include) or None, include_defaults=True)
        for name in theirs:
            if name not in self._manager.all_tasks:
                raise UserError(f"unknown task {name!r} (allowed: a task of this suite or of lm-evaluation-harness)")

    def score(
        self,
        lm: CycleForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        asked: Asked,
        folder: Path,
        n_cycles: int | None = None,
        batch_size: int = 16,
    ) -> list[dict[str, Any]]:
        """Scores of a model: a row for each metric, with its standard error and the FLOPs per token it took.

        Where what is executed depends on the text, sequences are run one at a time, without padding.

        Args:
            tokenizer: the model's.
            asked: a task of ours is written into ``folder`` first.
            n_cycles: to run the model at, None for those it was made with.

        Raises:
            UserError: if the task and the model do not go together, or the harness gives no result.
        """
        from lm_eval import simple_evaluate  # optional
        from lm_eval.models.huggingface import HFLM  # optional

        task = export(asked.name, dict(asked.options), folder, tokenizer) if ours(asked.name) else None
        model = HFLM(
            pretrained=lm,
            tokenizer=tokenizer,
            batch_size=1 if depends(lm) else batch_size,
            max_length=task.length if task else None,
            prefix_token_id=task.first_token if task else None,
        )
        with Meter(lm, n_cycles) as meter:
            found = simple_evaluate(
                model,
                tasks=[str(task.path) if task else asked.name],
                num_fewshot=asked.fewshot,
                limit=asked.limit,
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        if found is None:
            raise UserError(f"task {asked.name!r}: the harness gave no result")
        return _rows(found, lm.schedule_at(n_cycles).n_cycles, meter)


def evaluate_checkpoint(
    source: str,
    asked: Sequence[Asked],
    cycles: Sequence[int | None],
    folder: Path,
    batch_size: int = 16,
    leave: tuple[str, Threshold] | None = None,
    include: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Scores of a checkpoint: rows as of ``Harness.score`` for each task and number of cycles.

    leave: an exit rule by its key and its threshold, where sequences leave early. Raises UserError for an unknown task,
    rule or threshold, or a checkpoint without a tokeniser.
    """
    exits, harness = None if leave is None else WholeExit(*leave), Harness(asked, include)
    lm, tokenizer = open_checkpoint(source)
    if tokenizer is None:
        raise UserError(f"checkpoint {source!r} has no tokeniser beside it, which lm-evaluation-harness needs")
    if torch.cuda.is_available():
        lm.to("cuda")  # type: ignore[arg-type]
    for n_cycles in cycles:  # not after other numbers were scored
        lm.check_cycles("--cycles", n_cycles)
        if leave is not None:
            check_usable(lm, get_rule(leave[0]), n_cycles)
    lm.exits, rows = exits, list[dict[str, Any]]()
    told = {} if leave is None else {"exit": leave[0], "threshold": leave[1]}
    for one in asked:
        for n_cycles in cycles:
            points = lm.schedule_at(n_cycles).n_cycles - 1
            if leave is not None and isinstance(leave[1], Sequence) and len(leave[1]) != points:
                raise UserError(f"--threshold: {len(leave[1])} given (allowed: one, or one for each of {points} exits)")
            found = harness.score(lm, tokenizer, one, folder, n_cycles, batch_size)
            how = asked_as(one.options, one.limit, one.fewshot)
            rows += [{**row, **told, **({"asked": how} if how else {})} for row in found]
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
                    "mean_cycles": meter.mean_cycles,
                    "flops_per_token": meter.flops / meter.tokens,
                    "samples": found["n-samples"].get(task, {}).get("effective"),
                }
            )
    return rows
