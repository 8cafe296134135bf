"""The variant interface and its registry: a variant is one small class in one file.

It names a schedule and, if need be, up to four parts, each attached to a different place of the walk over the schedule
(see ``bench.model.parts``):

* ``attention_prefix``: keys and values before the real tokens of a step (``ztt``);
* ``adapter``: what a step adds to its shared block's input or matrices (``relaxed``);
* ``recurrence``: what happens before, between and after the cycles: injected input and context (``recurrent``,
  ``anchor``, ``residual``), memory (``mesh``), halting (``universal``), routing of tokens (``mor``);
* ``gate``: how a step's updates are merged into the residual stream (``ztt``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bench.config import ModelConfig, Strict, parse
from bench.model.named import NAMED
from bench.model.schedule import Schedule
from bench.registry import Registry

if TYPE_CHECKING:  # the parts are torch modules: listing variants must not wait for torch
    from bench.model.parts import Adapter, AttentionPrefix, Gate, Recurrence


class Variant:
    """A way of reusing parameters. Subclass it, decorate it with ``@register("name")``, override what differs.

    The docstring's first line is shown by ``cyclebench list``; ``Options`` holds the variant's own ablation axes.
    """

    name: ClassVar[str]
    cycled: ClassVar[bool] = True  # whether n_cycles means anything to it; if not, its cells are stored with 1
    elastic: ClassVar[bool] = False  # whether a cycle does another thing where another number of cycles is run
    tunable: ClassVar[Mapping[str, tuple[float, float]]] = {}  # options a study may tune: (low, high), on a log scale

    pretrained_options: ClassVar[Mapping[str, Any]] = {}  # defaults that differ when it starts from a pretrained model
    shared_options: ClassVar[Mapping[str, Any]] = {}  # the same, when its blocks are shared among fewer

    class Options(Strict):
        """No options."""

    def __init__(self, options: Any) -> None:
        """options: an instance of this class's ``Options``."""
        self.options = options

    @property
    def looks_ahead(self) -> bool:
        """Whether what a token predicts in a test depends on tokens to come: its scores are not those of a language
        model, and it generates in another way than it is tested.
        """
        return False

    def schedule(self, model: ModelConfig) -> Schedule:
        """Which block runs when."""
        raise NotImplementedError

    def remembered(self, schedule: Schedule) -> tuple[int, ...]:
        """For each further slot of the KV cache, in which a recurrence remembers something: numbers kept of a token."""
        return ()

    def cache_slots(self, schedule: Schedule) -> int:
        """Slots in the KV cache: one for every step, then those of ``remembered``."""
        return schedule.depth + len(self.remembered(schedule))

    def attention_prefix(self, model: ModelConfig, schedule: Schedule) -> AttentionPrefix | None:
        """Keys and values put before the real tokens of a step's attention (for example zero tokens)."""
        return None

    def adapter(self, model: ModelConfig, schedule: Schedule) -> Adapter | None:
        """What a step adds to its shared block's input or matrices (a cycle embedding, low-rank updates)."""
        return None

    def recurrence(self, model: ModelConfig, schedule: Schedule) -> Recurrence | None:
        """What happens between the cycles (the input re-injected, a memory, halting)."""
        return None

    def gate(self, model: ModelConfig, schedule: Schedule) -> Gate | None:
        """How a step's updates are merged into the residual stream."""
        return None


PUBLISHED = (name for name, named in NAMED.items() if named.variant != name)
variants: Registry[type[Variant]] = Registry(
    "variant",
    "cyclebench.variants",
    "variants",
    dict.fromkeys(PUBLISHED, "is the name of a published configuration"),
    Variant,
)
register, variant_class = variants.register, variants.get


def get_variant(
    name: str, options: Mapping[str, Any] | None = None, pretrained: bool = False, shared: bool = False
) -> Variant:
    """A variant with validated options. Raises UserError naming the option, its value and what is allowed.

    pretrained: what is not given is as suits a start from a pretrained model (``pretrained_options``); shared: whose
    blocks are shared among fewer (``shared_options``).
    """
    kind = variants.get(name)
    defaults = {**(kind.pretrained_options if pretrained else {}), **(kind.shared_options if shared else {})}
    given = {**defaults, **(options or {})}
    return kind(parse(kind.Options, given, f"{name}.options"))
