"""What each variant of a study costs against the study's reference: counted, and timed in pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.data.task import task_data
from bench.errors import UserError
from bench.form import TEXT
from bench.model.costs import costs
from bench.model.freezing import freeze
from bench.model.language_model import build_model
from bench.perf.timing import Row, in_turns, quartiles, training_step
from bench.store.files import atomic_write
from bench.study.plan import shape_of
from bench.study.schema import Study, VariantEntry
from bench.tables import csv_text, markdown, markdown_code, markdown_text
from bench.train.device import pick_device, repeatable


def cost_rows(study: Study, rounds: int, batch: int) -> list[Row]:
    """A row for each variant on the study's first task, the reference first.

    Parameters, FLOPs and memory are counted; the step (forward, backward, AdamW, ``batch`` sequences, a cell's threads)
    is timed in turns with the reference's, ``rounds`` times, and its ratio to it is given as median and
    quartiles. Raises UserError if the study has no reference.
    """
    if study.reference is None:
        raise UserError(f"study {study.name!r} needs a reference: what its variants' costs are held against")
    task = study.tasks[0]
    data = task_data(task.name, task.options)
    if data.form != TEXT:
        raise UserError(f"bench additions: task {task.label!r} has no tokens (allowed: a study whose first task has)")
    reference = next(entry for entry in study.variants if entry.label == study.reference)
    device = pick_device(study.cell_train(reference, task))

    def counted(entry: VariantEntry) -> tuple[Row, Any]:
        variant = study.variant(entry)
        model, _ = shape_of(study, entry, task, data.vocab_size, data.length)
        trained = study.cell_train(entry, task).trained
        found = costs(variant, model, data.vocab_size, data.length, trained=trained)
        lm = build_model(variant, model, data.vocab_size, data.length)
        lm.reset_parameters(0)
        freeze(lm, trained)
        row = {
            "variant": entry.label,
            "depth": found.depth,
            "params": found.params,
            "forward_flops_per_token": found.forward_flops_per_token,
            "train_flops_per_token": found.train_flops_per_token,
            "activation_bytes_per_sequence": found.activation_bytes,
            "kv_bytes_per_token": found.kv_bytes_per_token,
        }
        return row, lm.to(device)  # type: ignore[arg-type]

    with repeatable(0, study.train.threads):
        base, base_lm = counted(reference)
        rows = []
        for entry in [reference, *(e for e in study.variants if e is not reference)]:
            row, lm = counted(entry)
            seconds = in_turns([training_step(m, data.vocab_size, batch, data.length) for m in (lm, base_lm)], rounds)
            row |= {f"added_{key}": row[key] - base[key] for key in base if key != "variant"}
            row |= {"step_seconds": float(np.median(seconds[:, 0])), "pairs": rounds}
            rows.append(row | quartiles(seconds[:, 0] / seconds[:, 1], "time_ratio"))
    return rows


def shown(row: Row) -> dict[str, str]:
    """A row of the table as it is read: what is added, the share it is of the reference, and the ratio of the times."""

    def added(key: str) -> str:
        more = row[f"added_{key}"]
        return f"{more:+,.0f} ({more / (row[key] - more):+.2%})" if more else "0"

    return {
        "variant": row["variant"],
        "parameters": added("params"),
        "forward FLOPs/token": added("forward_flops_per_token"),
        "training FLOPs/token": added("train_flops_per_token"),
        "activations, bytes/sequence": added("activation_bytes_per_sequence"),
        "KV cache, bytes/token": added("kv_bytes_per_token"),
        "step time, ratio [quartiles]": "{time_ratio:.3f} [{time_ratio_low:.3f}, {time_ratio_high:.3f}]".format(**row),
    }


def write_costs(
    study: Study, rows: list[Row], batch: int, command: str, place: dict[str, Any], out: Path
) -> list[Path]:
    """Write ``costs.csv`` and ``costs.md`` into ``out``; their paths. place: the environment, as cells record it."""
    tables = [shown(row) for row in rows]
    entry = next(entry for entry in study.variants if entry.label == study.reference)
    base, model, reference = rows[0], study.cell_model(entry, study.tasks[0]), markdown_text(entry.label)
    lines = [
        f"# What is added to {reference}",
        "",
        f"Against {reference} at {model.family}, width {model.d_model}, {model.n_blocks} blocks, "
        f"{model.n_cycles} cycles: {base['params']:,} parameters, {base['forward_flops_per_token']:,.0f} forward and "
        f"{base['train_flops_per_token']:,.0f} training FLOPs/token, {base['activation_bytes_per_sequence']:,} bytes "
        f"of activations a sequence, {base['kv_bytes_per_token']:,} bytes of KV cache a token, "
        f"{1000 * base['step_seconds']:.0f} ms a training step of {batch} sequences. The step is timed in turns with "
        f"{reference}'s own, {base['pairs']} pairs; the first row is {reference} against itself: what it "
        "is off 1 by is noise.",
        "",
        *markdown(tables[0], (row.values() for row in tables)),
        "",
        f"{markdown_code(command)}, revision {place['git'] or 'not known'}, {markdown_text(place['cpu'])}, "
        f"{markdown_text(place['device'])}, {place['threads']} "
        f"threads, Python {place['python']}, torch {place['torch']}",
        "",
    ]
    files = {"costs.csv": csv_text(rows), "costs.md": "\n".join(lines)}
    for name, content in files.items():
        atomic_write(out / name, content.encode())
    return [out / name for name in files]
