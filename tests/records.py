"""Stored results as the runner writes them, for tests of what reads them: two variants, two tasks, two seeds."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bench.config import Cell, ModelConfig, TrainConfig
from bench.evaluate.trace import ORACLES
from bench.store.manifest import CellRow, Manifest, TaskRow, VariantRow
from bench.store.records import Failure, Outcome, Record
from bench.study.plan import Planned

VARIANTS = ["htc", "ztt"]
TASKS = [
    TaskRow(label="p_hop", task="p_hop", metric="accuracy", higher_is_better=True, levels={"chance": 0.38}),
    TaskRow(label="kjv", task="kjv", metric="bits_per_byte", higher_is_better=False, levels={"unigram": 4.42}),
]


def _id(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


MANIFEST = Manifest(
    study="sample",
    question="Is <this> & that shown?",
    reference="htc",
    seeds=[0, 1],
    variants=[
        VariantRow(label="htc", variant="htc", match=None, chosen=""),
        VariantRow(label="ztt", variant="ztt", match="flops", chosen="as given (1,000 forward FLOPs/token)"),
    ],
    tasks=TASKS,
    cells=[
        CellRow(variant=variant, task=task.label, seed=seed, id=_id(variant, task.label, seed))
        for task in TASKS
        for seed in (0, 1)
        for variant in VARIANTS
    ],
    command="cyclebench run sample",
    git="0" * 40,
    config={},
)
FAILED = MANIFEST.cells[1].id  # ztt on p_hop, seed 0


def planned(cell: CellRow) -> Planned:
    """A manifest's cell with its configuration."""
    config = Cell(
        variant=cell.variant,
        options={"gating": "attention"} if cell.variant == "ztt" else {},
        model=ModelConfig(d_model=64, n_blocks=3, n_cycles=2),
        train=TrainConfig(steps=20),
        task=cell.task,
        task_options={"length": 32},
        seed=cell.seed,
        fingerprint="f" * 64,
    )
    return Planned(cell.variant, cell.task, config)


def record(cell: CellRow) -> Outcome:
    """The record of a manifest's cell; one of them has failed."""
    config = planned(cell).cell.model_dump(mode="json")
    environment = {
        "python": "3.11",
        "torch": "2",
        "transformers": "5",
        "platform": "Linux",
        "cpu": "a CPU",
        "device": "cpu",
    }
    environment |= {"threads": 1, "git": None}  # type: ignore[dict-item]
    common = {"schema": 1, "id": cell.id, "cell": config, "environment": environment}
    if cell.id == FAILED:
        why = {"reason": "loss is nan within steps 11-20", "kind": "cell", "at": 1.7e9, "traceback": None}
        return Failure.model_validate({**common, "status": "failed", **why})
    shift, is_ztt = 0.01 * cell.seed, cell.variant == "ztt"
    text = cell.task == "kjv"

    def scores(cycles: int) -> dict[str, float]:
        found = {"loss": 2.0 - 0.2 * cycles + shift, "accuracy": 0.5 + 0.1 * cycles - shift}
        return {**found, "bits_per_byte": found["loss"] / 0.69} if text else found

    points = [{"cycles": c, "flops_per_token": 1e6 * c, **scores(c), "valid": scores(c)} for c in (1, 2)]
    spread: list[float | None] = [0.1, 0.25, 0.5, None]  # thresholds, the last: none leaves early
    later = [0.0, 0.25, 0.5, 1.0]  # shares of the sequences that run both cycles
    curve = {
        "threshold": spread,
        "flops_per_token": [1e6 * (1 + t) for t in later],
        "mean_cycles": [1 + t for t in later],
        **{name: [value] * 4 for name, value in scores(1).items()},
        "share": [[1 - t, t] for t in later],
    }
    tuned = [
        {"budget": b, "threshold": 0.25, "share": [0.75, 0.25]}
        | {s: {"flops_per_token": 1.2e6, **scores(1)} for s in ("valid", "test")}
        for b in (0.7, 0.8)
    ]
    rule = {"leave": "above", "curve": curve, "gain": 0.01, "area": 0.02 - shift, "tuned": tuned, "rank": [0.3, None]}
    sure = {"calibration": {"signal": [0.2, 0.8], "accuracy": [0.3, 0.7]}}
    bounds = {name: {key: rule[key] for key in ("leave", "curve", "gain", "area")} for name in ("random", *ORACLES)}
    rules = {"confidence": rule | sure, **bounds, **({"zero_attention": rule} if is_ztt else {})}
    history = [
        {"step": s, "tokens": 1024 * s, "flops": 3e9 * s, "seconds": 0.1 * s, "lr": 1e-3, "train_loss": 3.0 - 0.1 * s}
        | {f"valid_{name}": value for name, value in scores(1).items()}
        for s in (5, 10, 20)
    ]
    costs = {"depth": 4, "n_blocks": 3, "length": 32, "params": 160000, "params_non_embedding": 150000}
    costs |= {"forward_flops_per_token": 2e6, "train_flops_per_token": 6e6, "train_flops": 6e10}  # type: ignore[dict-item]
    costs |= {"kv_bytes_per_token": 2048, "activation_bytes": 1 << 20}
    zero = [{"step": s, "block": 1, "cycle": s - 1, "mean": 0.1 * s} for s in (1, 2)] if is_ztt else None
    told = {
        **common,
        "status": "done",
        "schedule": "0 1 1 2",
        "metrics": {f"test_{name}": value for name, value in scores(2).items()} | {"test_accuracy@64": 0.5},
        "valid_metrics": {f"valid_{name}": value for name, value in scores(2).items()},
        "slices": {} if text else {"hops": {"1": {"accuracy": 0.9, "exact_match": 0.25, "n": 100}}},
        "costs": costs,
        "additions": {
            "gate": {"params": 0, "flops_per_token": 0.0},
            "zero tokens": {"params": 64, "flops_per_token": 512.0},
        }
        if is_ztt
        else {},
        "history": history,
        "exits": {"points": points, "rules": rules},
        "cycles": [{"cycles": c, "flops_per_token": 1e6 * c, **scores(c)} for c in (1, 2, 3, 4)],
        "loops": [
            {"cycle": c, "state_norm": (5.0 if is_ztt else 1.0) ** c + shift, "relative_change": 0.5 / c}
            | {"spectral_radius": 0.9}
            for c in (1, 2, 3, 4)
        ],
        "zero_attention": zero,
        "timing": {"started": 1.7e9, "train_seconds": 2.0, "seconds": 2.5, "tokens_per_second": 10240.0},
    }
    return Record.model_validate(told)


RESULTS = {cell.id: record(cell) for cell in MANIFEST.cells[:-1]}  # the last one is missing
ONE_TASK = MANIFEST.but(tasks=TASKS[:1], cells=[cell for cell in MANIFEST.cells if cell.task == "p_hop"])


def of_seeds(n: int, noise: Callable[[str, str, int], float] = lambda variant, task, seed: 0.0) -> tuple[Manifest, Any]:
    """The sample study with n seeds, all finished. noise: added to the accuracy at every exit point, and taken from
    the bits per byte, by variant, task and seed.
    """
    rows = [
        CellRow(variant=variant, task=task.label, seed=seed, id=_id(n, variant, task.label, seed))
        for task in TASKS
        for seed in range(n)
        for variant in VARIANTS
    ]
    manifest = MANIFEST.but(seeds=list(range(n)), cells=rows)
    made = {cell.id: _encoded(cell.variant, cell.task, cell.seed, cell.id) for cell in rows}
    return manifest, {c.id: shifted(pickle.loads(made[c.id]), noise(c.variant, c.task, c.seed)) for c in rows}


@lru_cache(maxsize=256)
def _encoded(variant: str, task: str, seed: int, id: str) -> bytes:
    """A record, to be copied in less time than it takes to make one."""
    return pickle.dumps(record(CellRow(variant=variant, task=task, seed=seed, id=id)))


def shifted(made: Any, by: float) -> Any:
    """A record whose accuracy is higher by so much at every exit point, and its bits per byte lower."""

    def moved(scores: dict[str, float]) -> dict[str, float]:
        signs = {"accuracy": 1.0, "bits_per_byte": -1.0}
        return {key: value + by * signs.get(key.removeprefix("test_"), 0.0) for key, value in scores.items()}

    points = []
    for point in made.exits.points:
        scores = {key: value for key, value in point.dump().items() if key in ("accuracy", "bits_per_byte")}
        points.append(point.but(**moved(scores), valid=moved(point.valid)))
    return made.but(metrics=moved(made.metrics), exits=made.exits.but(points=points))
