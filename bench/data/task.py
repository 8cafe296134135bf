"""The task interface, its registry, and the data a task yields."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.config import IGNORED, Strict, parse
from bench.data.columns import pieces
from bench.data.tokenizers import Tokens, number_tokenizer
from bench.errors import UserError, contained, shown
from bench.form import TEXT, Form
from bench.limits import check_memory, check_time, machine_memory
from bench.registry import Registry

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SPLITS = ("train", "valid", "test")  # of every task; whatever else it has are further tests
INPUTS = ("input_ids", "vectors")  # what the column of inputs is called: of tokens, of vectors
COLUMNS = (*INPUTS, "targets")  # of every split, with one of the first two; what else a test split has are its slices


class Processor(Protocol):
    """What makes a model's inputs of what users have: a tokeniser, an image processor."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Save it in a folder."""
        ...


class Sample(NamedTuple):
    """Sequences of a split as they are generated.

    Attributes:
        ids: tokens [N, T], or vectors [N, T, F].
        targets: [N, T], or [N, 1] of what is judged once a sequence.
        slices: labels [N] of the sequences by axis, for accuracy by slice.
    """

    ids: NDArray[Any]
    targets: Tokens
    slices: Mapping[str, NDArray[Any]] = {}


@dataclass(frozen=True)
class Metric:
    """How a task is judged.

    Attributes:
        name: the primary metric, ``accuracy`` (micro share of scored targets predicted right) or ``bits_per_byte``.
        levels: trivial levels in the metric's unit, to be drawn beside the results and to normalise them by.
        solvers: levels in the metric's unit of solvers that do a part of the task, from the least to the most, to tell
            how much of it a result amounts to. No part of the data's fingerprint.
    """

    name: str
    higher_is_better: bool
    levels: dict[str, float]
    solvers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskData:
    """A task's data. Each split has the columns ``input_ids`` and ``targets``, lists of ``length`` ints; of vectors it
    has ``vectors``, lists of ``length`` lists of ``form.features`` numbers, instead of the former.

    ``targets[t]`` is what the logits at position t must predict, -100 where nothing is scored; what is judged once a
    sequence has one target. A test split may have more columns, one for each axis it is sliced by: a string for each
    sequence.

    Attributes:
        vocab_size: different tokens, or classes.
        fingerprint: SHA-256 of every example and of the metric with its trivial levels.
        bytes_per_token: UTF-8 bytes of a target token by split, None for generated tasks.
        tokenizer: makes the tokeniser that is saved beside a model, whose ids are those of the data; of vectors what
            makes these, or None.
        tests: further test splits by name, of a length of their own each, such as sequences longer than those trained
            on.
        notes: what there is to know of how the data were made, a sentence each: what was left out, what two splits
            have in common. No part of the fingerprint.
        folder: where they lie in the form of ``bench.data.prepared``, if they do.
        form: of the sequences. Part of the fingerprint.
        augment: see ``Task.augment``. No part of the fingerprint: the task's options tell it.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    vocab_size: int
    length: int
    fingerprint: str
    metric: Metric
    bytes_per_token: dict[str, float] | None
    tokenizer: Callable[[], Any]
    tests: dict[str, Dataset] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    form: Form = TEXT
    augment: Augment | None = None

    @property
    def splits(self) -> dict[str, Dataset]:
        """All splits by name, the further tests last."""
        return {**{name: getattr(self, name) for name in SPLITS}, **self.tests}

    @property
    def max_length(self) -> int:
        """Tokens in a sequence of the longest split: positions that a model needs."""
        return max([self.length, *(split.data.column(0).type.list_size for split in self.tests.values())])

    @property
    def class_names(self) -> dict[int, str]:
        """What the classes are called that a test split of one class a sequence has; of tokens none."""
        if self.form.judged == "tokens" or "class" not in self.test.column_names:
            return {}
        return dict(zip(np.ravel(self.test["targets"]).tolist(), self.test["class"], strict=True))

    def bytes_of(self, split: str) -> float | None:
        """UTF-8 bytes of a target token of the split, None for generated tasks."""
        return self.bytes_per_token[split] if self.bytes_per_token else None


class TaskSize(NamedTuple):
    """What data take to make. bytes: of memory, at once, at least; seconds: about, on one core."""

    bytes: float
    seconds: float


Augment = Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]


class Task:
    """What a model is trained and judged on. Subclass it and decorate it with ``@register("name")``."""

    name: ClassVar[str]

    class Options(Strict):
        """No options."""

    def __init__(self, options: Any) -> None:
        """options: an instance of this class's ``Options``."""
        self.options = options

    def build(self) -> TaskData:
        """Make or load the data. Raises UserError if the options cannot be met."""
        raise NotImplementedError(f"{type(self).__name__} has no build()")

    def size(self) -> TaskSize:
        """An estimate, from the options alone. By default nothing is known before the data are there."""
        return TaskSize(0.0, 0.0)

    @property
    def augment(self) -> Augment | None:
        """What changes a batch of inputs, a copy [B, ...], each time that it is trained on, with the generator of its
        step; None: nothing.
        """
        return None

    @property
    def told(self) -> str:
        """The task and its options, as messages call them."""
        values = ", ".join(f"{name} = {shown(value)}" for name, value in self.options.model_dump(mode="json").items())
        return f"{self.name}.options: {values}"


tasks: Registry[type[Task]] = Registry("task", "cyclebench.tasks", "bench.data.builtin", base=Task)
register, task_class = tasks.register, tasks.get


def get_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """A task with validated options. Raises UserError naming the option, its value and what is allowed."""
    kind = tasks.get(name)
    return kind(parse(kind.Options, dict(options or {}), f"{name}.options"))


def check_size(task: Task) -> None:
    """Raises UserError if the task's data are more than this machine can hold, or take too long to make."""
    size, relief = task.size(), "fewer or smaller sequences"
    check_memory(size.bytes, machine_memory(), f"{task.told}:", relief)
    check_time(size.seconds, f"{task.told}:", relief)


def build(task: Task) -> TaskData:
    """A task's data, made. Raises UserError if they are too large or the options cannot be met."""
    with contained(f"task {task.name!r}: its data cannot be made"):
        check_size(task)
        found = task.build()
        if not isinstance(found, TaskData):
            raise TypeError(f"build() returns {shown(found)}, which is no TaskData")
        return with_augmentation(found, task)


def forget() -> None:
    """Have data made anew: their files, or the class of their task, may be others by now."""
    _build.cache_clear()


@lru_cache(maxsize=8)
def _build(name: str, options: str) -> TaskData:
    return build(get_task(name, json.loads(options)))


def task_data(name: str, options: dict[str, Any]) -> TaskData:
    """A task's data, built once in a process. options: those that are left out are at their defaults."""
    given = get_task(name, options).options.model_dump(mode="json", exclude_defaults=True)
    return _build(name, json.dumps(given, sort_keys=True))


def with_augmentation(data: TaskData, task: Task) -> TaskData:
    """The data with what their task's options do to them in training."""
    return data if task.augment is None else replace(data, augment=task.augment)


def make_data(
    splits: Mapping[str, Sample | tuple[Tokens, Tokens]],
    vocab_size: int,
    metric: Metric,
    bytes_per_token: dict[str, float] | None = None,
    tokenizer: Callable[[], Processor | None] | None = None,
    notes: Sequence[str] = (),
    form: Form = TEXT,
) -> TaskData:
    """Task data from the arrays of the splits train, valid, test and, under any other name, further tests.

    tokenizer: makes the data's tokeniser; None where token ids are all there is, and are written out as numbers, or
    where nothing makes vectors of anything.
    notes: what there is to know of how the data were made. Arrays that are mapped from files stay there.
    form: of the sequences, where it is not that of text.
    """
    scored = ("accuracy", "loss", *(("bits_per_byte",) if bytes_per_token else ()))
    if metric.name not in scored:
        raise UserError(f"the metric {shown(metric.name)} is not scored (allowed: {', '.join(scored)})")
    told = {key: value for key, value in asdict(metric).items() if key != "solvers"}  # what ids of cells were made of
    digest = hashlib.sha256(
        json.dumps([vocab_size, told, bytes_per_token, {k: v[0].shape for k, v in splits.items()}]).encode()
    )
    if form != TEXT:
        digest.update(form.model_dump_json(exclude_defaults=True).encode())
    samples = {name: Sample(*splits[name]) for name in (*SPLITS, *(name for name in splits if name not in SPLITS))}
    for name, sample in samples.items():
        check_sample(name, sample, vocab_size, form)
        for column, kind in ((sample.ids, "<i8" if form.features is None else "<f4"), (sample.targets, "<i8")):
            for part in pieces(len(column), math.prod(column.shape[1:])):
                digest.update(np.ascontiguousarray(column[part], dtype=kind).tobytes())
        for axis, labels in sample.slices.items():
            digest.update(json.dumps([axis, labels.astype(str).tolist()]).encode())
    fingerprint = digest.hexdigest()
    made = {name: dataset(_table(sample, vocab_size, form), name, fingerprint) for name, sample in samples.items()}
    return TaskData(
        **{name: made.pop(name) for name in SPLITS},
        vocab_size=vocab_size,
        length=samples["train"].ids.shape[1],
        fingerprint=fingerprint,
        metric=metric,
        bytes_per_token=bytes_per_token,
        tokenizer=tokenizer or (partial(number_tokenizer, vocab_size) if form.features is None else lambda: None),
        tests=made,
        notes=tuple(notes),
        form=form,
    )


def check_sample(name: str, sample: Sample, vocab_size: int, form: Form = TEXT) -> None:
    """Raises ValueError for a split that is not of the form, or that no model can be trained on."""
    if not len(sample.ids):
        raise ValueError(f"split {name!r} has no sequence")
    none = np.iinfo(sample.targets.dtype).max
    scored = sample.targets.min(initial=none, where=sample.targets != IGNORED)
    if scored == none:
        raise ValueError(f"split {name!r} has no target that is scored: all are {IGNORED}")
    if name != "train" and (bare := np.flatnonzero((sample.targets == IGNORED).all(1))).size:
        raise ValueError(
            f"split {name!r}, sequence {bare[0]} has no target that is scored (allowed: one at least; only to be "
            "trained on it may have none)"
        )
    tokens = [sample.targets.max(), scored]
    if form.features is None:
        tokens += [sample.ids.min(), sample.ids.max()]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"split {name!r} has the token {token} (allowed: 0 to {vocab_size - 1})")
    if form.features is not None and (sample.ids.ndim, sample.ids.shape[-1]) != (3, form.features):
        raise ValueError(f"split {name!r} has inputs {sample.ids.shape}, no [N, T, {form.features}]")
    if sample.targets.shape != (len(sample.ids), form.places(sample.ids.shape[1])):
        raise ValueError(f"split {name!r} has targets {sample.targets.shape} for inputs {sample.ids.shape}")
    padding = np.isnan(sample.ids).all(-1) if form.padded else np.zeros(sample.ids.shape[:2], bool)
    if padding[:, 0].any() or (padding[:, :-1] & ~padding[:, 1:])[:, : -1 if form.judged == "last" else None].any():
        raise ValueError(f"split {name!r} has padding before a sequence's end")
    if form.features is not None and not np.isfinite(sample.ids[~padding]).all():
        raise ValueError(f"split {name!r} has numbers that are not finite")


def dataset(table: pa.Table, name: str, fingerprint: str) -> Dataset:
    """A split from its columns; fingerprint: of the task's data, since ``datasets`` would pickle it all to make one."""
    from datasets import Dataset  # start-up

    return Dataset(table, fingerprint=f"{fingerprint[:16]}-{name}")


def token_kind(vocab_size: int) -> type[np.signedinteger[Any]]:
    """Tokens take two bytes, four where there are too many different ones: training reads them from the disk."""
    return np.int16 if vocab_size - 1 <= np.iinfo(np.int16).max else np.int32


def _table(sample: Sample, vocab_size: int, form: Form) -> pa.Table:
    import pyarrow as pa  # start-up

    kind = token_kind(vocab_size)

    def column(values: NDArray[Any], kind: Any = kind) -> pa.FixedSizeListArray:
        found = pa.array(values.astype(kind, copy=False).ravel())
        for size in values.shape[:0:-1]:
            found = pa.FixedSizeListArray.from_arrays(found, size)
        return found

    slices = {axis: pa.array(labels.astype(str).tolist()) for axis, labels in sample.slices.items()}
    tokens, vectors = INPUTS
    inputs = {tokens: column(sample.ids)} if form.features is None else {vectors: column(sample.ids, np.float32)}
    return pa.table({**inputs, COLUMNS[-1]: column(sample.targets), **slices})


def sequences_as_values(ids: Tokens) -> NDArray[np.void]:
    """The sequences [N, T] as N opaque values that can be compared and looked up whole."""
    ids = np.ascontiguousarray(ids)
    return ids.view(np.dtype((np.void, ids.dtype.itemsize * ids.shape[1]))).ravel()
