"""From a study to its cells: matching done, data built, every cell identified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from bench.config import CELL_SOURCE, Cell, Init, ModelConfig, TrainConfig, parse
from bench.data.task import TaskData, check_size, get_task, task_data
from bench.errors import UserError, contained, unknown
from bench.evaluate.targets import AREA, rule_of
from bench.evaluate.usable import outside_rules, usable_rules
from bench.form import TEXT, Form
from bench.model.costs import meta_model
from bench.model.freezing import freeze
from bench.model.variant import get_variant
from bench.store.environment import lock
from bench.store.manifest import CellRow, HarnessRow, HypothesisRow, Manifest, TaskRow, TuningRow, VariantRow
from bench.study.harness import harness_rows
from bench.study.hypotheses import check_bounds, resolve, usual
from bench.study.schema import Study, TaskEntry, VariantEntry
from bench.study.shapes import matched, relevant
from bench.study.start import check_start, check_tokens, external, outline_of, sizes_of, target_shape
from bench.study.sweep import ALIKE
from bench.train.depths import mean_step_flops
from bench.train.device import device_kind
from bench.train.modes import resolved
from bench.train.room import check_room

LOOKS_AHEAD = "looks at tokens to come when it is tested: its scores are not those of a language model"


@dataclass(frozen=True)
class Planned:
    """A cell and its place in the study."""

    variant: str  # labels
    task: str
    cell: Cell


@dataclass(frozen=True)
class Plan:
    """All cells of a study, in the order they run, with what the matching chose."""

    study: Study
    cells: tuple[Planned, ...]
    manifest: Manifest


def shape_of(
    study: Study, entry: VariantEntry, task: TaskEntry, vocab_size: int, length: int, form: Form = TEXT
) -> tuple[ModelConfig, str]:
    """The shape of a variant on a task after matching, and what the matching chose ('' without matching).

    form: of the task's sequences.
    """
    variant = study.variant(entry)
    model = relevant(variant, _shape_given(study, entry, task, vocab_size, length, form))
    if entry.match is None:
        return model, ""
    reference = next(other for other in study.variants if other.label == study.reference)
    other, other_model = study.variant(reference), _shape_given(study, reference, task, vocab_size, length, form)
    outside = _outside(study, reference)
    its_vocab = vocab_size if outside is None else outline_of(outside).vocab_size
    return matched(entry.match, entry.label, variant, model, other, other_model, vocab_size, length, its_vocab)


Tuned = Mapping[tuple[str, str], VariantEntry]
"""What stands for a study's variant on a task, by their labels, where tuning has changed it."""


def _of_form(model: ModelConfig, form: Form) -> ModelConfig:
    """The shape for sequences of the form. Raises UserError if it says another one itself."""
    if model.form not in (TEXT, form):
        raise UserError(f"model.form: {model.form!r} is not the task's (allowed: nothing, since the task tells it)")
    return model.model_copy(update={"form": form})


def _shape_given(
    study: Study, entry: VariantEntry, task: TaskEntry, vocab_size: int, length: int, form: Form
) -> ModelConfig:
    """The shape the study says, or the one of the model that the entry starts from with what may differ from it."""
    init, model = study.init_of(entry), _of_form(study.cell_model(entry, task), form)
    if init is None:
        return model
    start = study.init_entry(entry)
    source = shape_of(study, start, task, vocab_size, length, form)[0] if start is not None else outline_of(init).shape
    return target_shape(source, model.n_cycles, {**task.model, **entry.model}, f"variants.{entry.label}")


def _outside(study: Study, entry: VariantEntry) -> str | None:
    """The source outside the study whose vocabulary and positions the entry's models have; None: they have the task's.
    It may be that of the entry that this one starts from.
    """
    return study.init_of(study.init_entry(entry) or entry)


def _train_of(study: Study, entry: VariantEntry, task: TaskEntry, data: TaskData) -> tuple[TrainConfig, str]:
    """The training of an entry's cells, and what its budget chose ('' without one).

    With a budget in FLOPs the steps are those whose training FLOPs come nearest the reference's, at full cycles.
    """
    train = study.cell_train(entry, task)
    if entry.budget is None:
        return train, ""

    def step_flops(other: VariantEntry, config: TrainConfig) -> float:
        vocab, positions = sizes_of(_outside(study, other), data)
        shape = shape_of(study, other, task, vocab, data.length, data.form)[0]
        lm = meta_model(study.variant(other), shape, vocab, positions)
        freeze(lm, config.trained)
        return config.batch_size * mean_step_flops(lm, config, data.length)

    reference = next(other for other in study.variants if other.label == study.reference)
    config = study.cell_train(reference, task)
    target, each = config.steps * step_flops(reference, config), step_flops(entry, train)
    steps = max(1, round(target / each))
    text = f"steps {train.steps} -> {steps} ({steps * each:.4g} training FLOPs, target {target:.4g})"
    where = f"variants.{entry.label}: budget = {entry.budget!r}"
    return parse(TrainConfig, {**train.model_dump(), "steps": steps}, where), text


def _start(init: str | None, entry: VariantEntry, cell: Cell | None) -> Init | None:
    """The identity of what a cell starts from: a source outside the study, or the cell of the same task and seed."""
    if init is None:
        return None
    if cell is not None:
        return Init(source=f"{CELL_SOURCE}{cell.id}", sharing=entry.sharing)
    return external(init, entry.sharing)


def stages(cells: Iterable[Planned]) -> list[list[Planned]]:
    """The cells in an order in which each finds what it starts from: first those that start from no cell."""
    later: dict[bool, list[Planned]] = {True: [], False: []}
    for planned in cells:
        later[planned.cell.init is not None and planned.cell.init.source.startswith(CELL_SOURCE)].append(planned)
    return [stage for stage in (later[False], later[True]) if stage]


def with_values(entry: VariantEntry, values: Mapping[str, Any]) -> VariantEntry:
    """The entry with values for ``model.NAME``, ``train.NAME`` and ``options.NAME``."""
    changes = {group: dict(getattr(entry, group)) for group in ("model", "train", "options")}
    for key, value in values.items():
        group, _, name = key.partition(".")
        changes[group][name] = value
    return entry.model_copy(update=changes)


def tuned_by(study: Study, rows: Iterable[TuningRow]) -> Tuned:
    """What tuning has chosen, as ``make_plan`` takes it."""
    entries = {entry.label: entry for entry in study.variants}
    return {(row.variant, row.task): with_values(entries[row.variant], row.chosen) for row in rows}


def make_plan(study: Study, command: str, revision: str | None, tuned: Tuned | None = None) -> Plan:
    """Expand a study. Raises UserError, naming the entry, for a wrong variant, task or option."""
    tuned, harness = tuned or {}, harness_rows(study.harness, study.tasks)
    cells: list[Planned] = []
    made: dict[tuple[str, str, int], Cell] = {}
    chosen: dict[str, dict[str, str]] = {entry.label: {} for entry in study.variants}
    tasks, built = [], {}
    for task in study.tasks:
        with contained(f"task {task.name!r}"):
            check_size(get_task(task.name, task.options))  # before hours are spent on the data of another one
    for task in study.tasks:
        maker = get_task(task.name, task.options)
        task_options = maker.options.model_dump(mode="json", exclude_defaults=True)
        data = built[task.label] = task_data(task.name, task_options)
        tasks.append(TaskRow(label=task.label, task=task.name, **_about(data)))
        # What others start from comes first, since its id is part of theirs.
        for given in sorted(study.variants, key=lambda entry: study.init_entry(entry) is not None):
            entry = tuned.get((given.label, task.label), given)
            with contained(f"{entry.label} on {task.label}"):
                variant = study.variant(entry)
                model, text = shape_of(study, entry, task, data.vocab_size, data.length, data.form)
                train, steps = _train_of(study, entry, task, data)
                start, init = study.init_entry(entry), study.init_of(entry)
                if init is not None and start is None:
                    check_start(init, entry.sharing, variant, model, data)
                variant.schedule(model)  # an impossible shape or device must be refused before anything runs
                train.check(model)
                kind = device_kind(train)
                check_room(f"{entry.label} on {task.label}", variant, model, train, study.evaluation, data, kind)
                outside = init is not None and start is None
                train = resolved(train, kind, variant, model, data.vocab_size, data.length, outside)
            if text or steps:
                chosen[entry.label][task.label] = ", ".join(part for part in (text, steps) if part)
            for seed in study.seeds:
                cell = Cell(
                    variant=entry.name,
                    options=variant.options.model_dump(mode="json", exclude_defaults=True),
                    model=model,
                    train=train,
                    task=task.name,
                    task_options=task_options,
                    seed=seed,
                    evaluation=study.evaluation,
                    init=_start(init, entry, made.get((start.label, task.label, seed)) if start else None),
                    fingerprint=data.fingerprint,
                )
                made[entry.label, task.label, seed] = cell
                cells.append(Planned(entry.label, task.label, cell))
        for source in dict.fromkeys(study.init_of(entry) for entry in study.variants if not study.init_entry(entry)):
            if source is not None:  # of all variants once: it may take seconds
                with contained(f"task {task.label!r}"):
                    check_tokens(source, task, data)
    _check_alike(cells)
    hypotheses = _hypotheses(study, built, harness)
    _check_metrics(hypotheses, cells)
    manifest = Manifest(
        study=study.name,
        changed=study.changed,
        question=study.question,
        reference=study.reference,
        exit_rule=study.exit_rule,
        seeds=list(study.seeds),
        variants=[
            VariantRow(
                label=e.label,
                variant=e.name,
                match=e.match or e.budget,
                chosen=_merge(chosen[e.label]),
                **({"notes": [LOOKS_AHEAD]} if study.variant(e).looks_ahead else {}),
            )
            for e in study.variants
        ],
        tasks=tasks,
        hypotheses=hypotheses,
        cells=[CellRow(variant=p.variant, task=p.task, seed=p.cell.seed, id=p.cell.id) for p in cells],
        command=command,
        git=revision,
        lock=lock(),
        config=study.model_dump(mode="json"),
    )
    if harness:
        manifest = manifest.but(harness=harness)
    if study.decide is not None and study.decides:
        manifest = manifest.but(decide=study.decide.row(_starts(study)))
    return Plan(study, tuple(sorted(cells, key=lambda planned: planned.cell.seed)), manifest)


def _check_alike(cells: Iterable[Planned]) -> None:
    """Raises UserError if the cells of a study differ in what would be taken for a difference between variants."""
    for part, field in ALIKE:
        places: dict[str, str] = {}
        for planned in cells:
            places.setdefault(getattr(getattr(planned.cell, part), field), f"{planned.variant} on {planned.task}")
        if len(places) > 1:
            told = ", ".join(f"{value!r} for {place}" for value, place in places.items())
            raise UserError(f"{part}.{field}: {told} in one study (allowed: one for all of its cells)")


def _hypotheses(study: Study, data: Mapping[str, TaskData], harness: Sequence[HarnessRow]) -> list[HypothesisRow]:
    """The study's hypotheses, with the differences that count as none. Raises UserError for such of no claim."""
    within = study.decide.within if study.decide is not None else {}
    keys = [usual(metric) for metric in within]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"decide.within: {twice[0]!r} stands twice, under two names (allowed: once)")
    within = dict(zip(keys, within.values(), strict=True))
    rows = [resolve(hypothesis, data, within, harness) for hypothesis in study.hypotheses]
    check_bounds(within, study.hypotheses, rows)
    return rows


def _check_metrics(hypotheses: Iterable[HypothesisRow], cells: Iterable[Planned]) -> None:
    """Raises UserError for a hypothesis on an exit rule that its variant cannot be left by, or on the area under curves
    of a single point or of points at other places, and for a rule from outside that does not work.
    """
    first = {(planned.variant, planned.task): planned.cell for planned in reversed(list(cells))}

    @cache
    def usable(label: str, task: str) -> list[str]:
        cell = first[label, task]
        with contained(f"{label} on {task}"):
            return usable_rules(get_variant(cell.variant, cell.options), cell.model)

    for place in first if outside_rules() else ():
        usable(*place)  # every cell reads them all
    for row in hypotheses:
        for measure in row.measures:
            for label, metric in ((row.better, measure.metric), (row.than, measure.than_metric or measure.metric)):
                if metric == AREA and first[label, measure.task].train.validates_once:
                    raise UserError(
                        f"hypothesis {row.claim!r}: metric 'area' of {label} on {measure.task}, which is validated "
                        "once, at its end (allowed: train.eval_every below train.steps)"
                    )
                rule = rule_of(metric)
                if rule is not None and rule not in (allowed := usable(label, measure.task)):
                    none = "" if allowed else ", which has a single exit point"
                    raise UserError(
                        f"hypothesis {row.claim!r}: {unknown(f'exit rule of {label}{none}:', rule, allowed)}"
                    )
            better, than = (_validations(first[label, measure.task]) for label in (row.better, row.than))
            if AREA in (measure.metric, measure.than_metric) and better != than:
                raise UserError(
                    f"hypothesis {row.claim!r}: metric 'area' of {row.better} and {row.than} on {measure.task}, "
                    "which are validated at other places (allowed: one train.eval_every for both)"
                )


def _validations(cell: Cell) -> tuple[int, float | None]:
    """How many there are at fixed steps of a cell's training, and after how many FLOPs there are others."""
    return -(-cell.train.steps // cell.train.steps_between), cell.train.eval_every_flops


def _starts(study: Study) -> dict[str, str]:
    """The label whose cells a variant starts from, of those that start from cells, by label."""
    starts = {entry.label: study.init_entry(entry) for entry in study.variants}
    return {label: start.label for label, start in starts.items() if start is not None}


def _about(data: TaskData) -> dict[str, Any]:
    metric = asdict(data.metric)
    return {"metric": metric.pop("name"), **metric, **({"notes": list(data.notes)} if data.notes else {})}


def _merge(by_task: dict[str, str]) -> str:
    """One text if all tasks agree, else one for each."""
    if len(set(by_task.values())) <= 1:
        return next(iter(by_task.values()), "")
    return "; ".join(f"{task}: {text}" for task, text in by_task.items())
