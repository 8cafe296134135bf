"""``python -m bench.perf``: training throughput against transformers' GPT-2, what the zero token costs a step, what
judging exit rules costs, what early exits save in generation, what packing seeds saves, and what the harness costs.

Every comparison is paired: the two sides take turns in one process, and the median of the ratios is printed with its
quartiles, so that a machine whose speed drifts does not decide the outcome.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from bench.checkpoint import Every
from bench.config import ModelConfig
from bench.costs import build_model
from bench.perf import exits, packing
from bench.perf.harness import overhead, skipping
from bench.perf.timing import Step, paired, training_step
from bench.perf.traces import trace_table
from bench.variant import get_variant

VOCAB = 256


def ours(variant: str, model: ModelConfig, length: int, **options: Any) -> Any:
    """A seeded model of a variant."""
    lm = build_model(get_variant(variant, options), model, VOCAB, length)
    lm.reset_parameters(0)
    return lm


def stock(model: ModelConfig, length: int) -> Any:
    """transformers' GPT-2 of the same shape, with its default (fused) attention and without dropout."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=length, n_embd=model.d_model, n_layer=model.n_blocks, n_head=model.n_heads
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.perf", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="pairs of timed steps for each comparison")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=700, help="of the cell that the harness's own cost is measured on")
    arguments = parser.parse_args()
    shape = {"batch": arguments.batch, "length": arguments.length}
    console = Console()
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {shape}, float32, medians [quartiles]"
    )
    title = "training throughput: ours / transformers GPT-2 (above 1: ours is faster)"
    table = Table("d_model", "ours, tokens/s", "transformers, tokens/s", "ratio", title=title)
    for d_model in (128, 256, 384):
        model = ModelConfig(d_model=d_model, n_heads=d_model // 64, n_blocks=6, n_cycles=1)
        sides = (ours("vanilla", model, arguments.length), stock(model, arguments.length))
        _row(table, str(d_model), paired(*_steps(sides, shape), arguments.rounds), shape, True)
    console.print(table)
    title = "a training step at the same schedule: ZTT / HTC (above 1: the zero token costs time)"
    table = Table("ZTT gating, d_model", "ZTT, tokens/s", "HTC, tokens/s", "ratio", title=title)
    for d_model in (128, 256, 384):
        model = ModelConfig(d_model=d_model, n_heads=d_model // 64, n_blocks=4, n_cycles=2)
        for gating in ("attention", "none"):
            sides = (ours("ztt", model, arguments.length, gating=gating), ours("htc", model, arguments.length))
            _row(table, f"{gating}, {d_model}", paired(*_steps(sides, shape), arguments.rounds), shape, False)
    console.print(table)
    console.print(trace_table(sequences=1000, length=128))
    console.print(exits.table(4 * arguments.rounds))
    console.print(packing.table(max(3, arguments.rounds // 3)))
    seconds = overhead(arguments.steps, max(3, arguments.rounds // 5), Every(10.0))
    share = seconds[:, 1] / seconds[:, 0] - 1
    low, middle, high = np.quantile(share, (0.25, 0.5, 0.75))
    console.print("harness (lease, log, checkpoints every 10 s, progress, MLflow) as a share of training, quick study:")
    console.print(f"{100 * middle:.2f} % [{100 * low:.2f}, {100 * high:.2f}] of {np.median(seconds[:, 0]):.1f} s")
    console.print(f"5,000 finished cells seen and skipped in {skipping(5000):.2f} s")


def _steps(sides: tuple[Any, Any], shape: dict[str, int]) -> tuple[Step, Step]:
    return training_step(sides[0], VOCAB, **shape), training_step(sides[1], VOCAB, **shape)


def _row(table: Table, name: str, seconds: Any, shape: dict[str, int], speed: bool) -> None:
    ratio = seconds[:, 1] / seconds[:, 0] if speed else seconds[:, 0] / seconds[:, 1]
    low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
    rates = shape["batch"] * shape["length"] / np.median(seconds, 0)
    table.add_row(name, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
