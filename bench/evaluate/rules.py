"""Exit rules: when may the cycles end? A rule makes a signal of what an exit point shows and leaves by a threshold.

A signal at token t reads what cycles up to the exit point computed from tokens up to t, and no label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from bench.errors import UserError, shown, typed_line, unknown
from bench.model.network import Network
from bench.model.walk import Walk
from bench.registry import Registry

Aggregate = Literal["mean", "last", "max"]
Leave = Literal["above", "below"]
ORACLES = {"oracle": "correct", "oracle.loss": "loss"}  # the bounds, and the scores they know
R = TypeVar("R", bound="Rule")


class Prediction:
    """What the coda and the LM head would predict at an exit point. log_probs: [B, T, V], float32; [B, 1, V] where a
    sequence is judged once.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    @cached_property
    def entropy(self) -> Tensor:
        """Of each token's distribution [B, T], nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    @cached_property
    def token(self) -> Tensor:
        """The likeliest token [B, T]."""
        return self.log_probs.argmax(-1)


@dataclass(frozen=True)
class View:
    """What a rule may read at an exit point.

    Attributes:
        number: cycles done, 1, 2, ...
        hidden, before: [B, T, D], the state now and at the start of the cycle.
        now, then: the predictions at this exit point and the one before, None where no rule asked for them (then: also
            at the first).
        zero_attention: [S, B, H, T] of the cycle's S steps with zero tokens, None without any.
        halting: [B, T], the chance of having halted by now, None if nothing halts.
        rows: [B], which sequences of the data these are.
    """

    number: int
    hidden: Tensor
    before: Tensor
    now: Prediction | None
    then: Prediction | None
    zero_attention: Tensor | None
    halting: Tensor | None
    rows: Tensor

    @cached_property
    def change(self) -> Tensor:
        """What the cycle has changed, h_t - h_{t-1} [B, T, D]."""
        return (self.hidden - self.before).float()


class Rule:
    """A criterion for leaving the cycles. Subclass it and decorate it with ``@register("name")``.

    Attributes:
        leave: ``above`` leaves where the signal is at or above the threshold, ``below`` where it is at or below it.
        low, high: the signal's range.
        aggregates: how the tokens' signals may become the sequence's.
        reads_logits: the coda and the LM head run at every exit point looked at.
        reads_zero_attention: it is read in every cycle looked at.
    """

    name: ClassVar[str]
    leave: ClassVar[Leave]
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = math.inf
    aggregates: ClassVar[tuple[Aggregate, ...]] = ("mean", "last")
    reads_logits: ClassVar[bool] = False
    reads_zero_attention: ClassVar[bool] = False

    def __init__(self, aggregate: Aggregate = "mean") -> None:
        """Raises UserError if the rule does not know the aggregate."""
        if aggregate not in self.aggregates:
            raise unknown(f"aggregate of rule {self.name}", aggregate, self.aggregates)
        self.aggregate = aggregate

    @property
    def key(self) -> str:
        """``name`` for the first of the aggregates, ``name.aggregate`` for another: what ``get_rule`` takes."""
        return self.name if self.aggregate == self.aggregates[0] else f"{self.name}.{self.aggregate}"

    def usable(self, view: View) -> bool:
        """Whether the model shows what the rule reads."""
        return True

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        """Of every token [B, T]; previous: the rule's own signal at the exit point before, None at the first."""
        raise NotImplementedError

    def pool(self, signal: Tensor, real: Tensor | None = None) -> Tensor:
        """Of every sequence [B] from its tokens' [B, T]; real: [B, T], 1 for real tokens and 0 for padding. What is
        judged once a sequence has one signal, [B, 1], where predictions are read.
        """
        if real is None or signal.shape[1] != real.shape[1]:
            real = torch.ones_like(signal)
        if self.aggregate == "last":
            last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1, keepdim=True)
            return signal.gather(1, last).squeeze(1)
        if self.aggregate == "max":
            return signal.masked_fill(real == 0, -torch.inf).amax(1)
        return (signal * real).sum(1) / real.sum(1)

    def leaves(self, signal: Any, threshold: Any) -> Any:
        """Where a signal (a tensor or an array) says "leave"; an infinite threshold on the far side means never."""
        return signal >= threshold if self.leave == "above" else signal <= threshold


rules: Registry[type[Rule]] = Registry(
    "exit rule", "cyclebench.exit_rules", "bench.evaluate.builtin", dict.fromkeys(ORACLES, "is that of a bound"), Rule
)


def register(name: str) -> Callable[[type[R]], type[R]]:
    """Decorator: make a class an exit rule.

    Raises UserError as ``Registry.register`` does, for a name that is a bound's, and for a class that does not say on
    which side of its threshold a sequence leaves, or pools its signal in ways that there are not.
    """

    def add(kind: type[R]) -> type[R]:
        rules.check_base(name, kind)
        if (leave := getattr(kind, "leave", None)) not in (sides := get_args(Leave)):
            raise UserError(f"exit rule {name!r}: leave = {shown(leave)} (allowed: {', '.join(sides)})")
        ways, known = kind.aggregates, get_args(Aggregate)
        if not isinstance(ways, tuple) or not ways or not set(ways) <= {*known}:
            raise UserError(f"exit rule {name!r}: aggregates = {shown(ways)} (allowed: a tuple of {', '.join(known)})")
        return rules.register(name)(kind)

    return add


@contextmanager
def named(rule: Rule) -> Iterator[None]:
    """Tell whatever is raised inside with the rule's name."""
    try:
        yield
    except Exception as error:
        flags = [name for name in ("reads_logits", "reads_zero_attention") if not getattr(rule, name)]
        hint = f" (the view has no predictions or zero attention without {' and '.join(flags)} = True)"
        unread = flags and isinstance(error, AttributeError | TypeError) and "NoneType" in str(error)
        raise RuntimeError(f"exit rule {rule.key!r}: {typed_line(error)}{hint if unread else ''}") from error


def get_rule(key: str) -> Rule:
    """The rule of a key, ``name`` or ``name.aggregate``. Raises UserError, with the nearest key, if there is none."""
    name, _, aggregate = key.partition(".") if isinstance(key, str) else ("", "", "")
    if name not in rules.items():
        raise unknown("exit rule", key, (rule.key for rule in all_rules()))
    kind = rules.get(name)
    return kind(aggregate or kind.aggregates[0])  # type: ignore[arg-type]


def all_rules() -> list[Rule]:
    """Every rule with every aggregate."""
    return [rules.get(name)(aggregate) for name in rules.names() for aggregate in rules.get(name).aggregates]


def _shown(view: View, logits: bool, zero_attention: bool) -> View:
    """What rules see that read the predictions, or do not, and the zero attention, or do not."""
    hidden: dict[str, Any] = {} if logits else {"now": None, "then": None}
    hidden |= {} if zero_attention else {"zero_attention": None}
    return replace(view, **hidden)


def _signal(rule: Rule, view: View, previous: Tensor | None) -> Tensor | None:
    """A rule's signal, None where the model does not show what it reads. Raises RuntimeError with the rule's name."""
    with named(rule):
        if not rule.usable(view):
            return None
        found = rule.signal(view, previous)
        batch, length, _ = view.hidden.shape
        shape = tuple(getattr(found, "shape", ()))
        if shape not in ((batch, length), (batch, 1)):  # what is judged once a sequence is predicted once
            raise ValueError(f"its signal has the shape {shape} (allowed: {batch, length}, [B, T])")
        return found


class SignalWatch:
    """What rules remember from one exit point of a pass to the next.

    rules: those watched; rows: [B], which sequences of the data the pass is made of (0, 1, ... by default).
    """

    def __init__(self, rules: Iterable[Rule], rows: Tensor | None = None) -> None:
        self.rules, self.rows = tuple(rules), rows
        self.reads = {rule.key: (rule.reads_logits, rule.reads_zero_attention) for rule in self.rules}
        self.reads_logits = any(logits for logits, _ in self.reads.values())
        self._then: Prediction | None = None
        self._signals: dict[str, Tensor] = {}

    def look(
        self, lm: Network, state: Walk, number: int, logits: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """At the end of cycle ``number`` of a pass: the logits [B, T, V], None if no rule reads them, and by rule the
        tokens' signals [B, T]. A rule that cannot be used with the model is left out.

        logits: what coda and head give here, where the caller knows it already.
        """
        if logits is None and self.reads_logits:
            logits = lm.lm_head(lm.read_out(state)).float()
        if self.rows is None:
            self.rows = torch.arange(len(state.hidden), device=state.hidden.device)
        masses = [state.zero_attention.get(step.depth) for step in state.schedule.cycles[number - 1]]
        seen = [mass for mass in masses if mass is not None]
        if not seen and lm.prefix is not None:  # a cycle without zero tokens, of a model with some: none is attended to
            batch, length, _ = state.hidden.shape
            seen = [state.hidden.new_zeros(batch, lm.model_shape.n_heads, length)]
        assert state.before is not None  # set where the cycle started
        view = View(
            number,
            state.hidden,
            state.before,
            Prediction(logits.log_softmax(-1)) if logits is not None else None,
            self._then,
            torch.stack(seen).float() if seen else None,
            state.memory.get("halting"),
            self.rows,
        )
        # A rule sees what it is charged for. Those that read the same share a view, and what is made from it once.
        views = {reads: _shown(view, *reads) for reads in self.reads.values()}
        found = {
            rule.key: _signal(rule, views[self.reads[rule.key]], self._signals.get(rule.key)) for rule in self.rules
        }
        self._signals = {key: signal for key, signal in found.items() if signal is not None}
        self._then = view.now
        return logits, self._signals

    def keep(self, index: Tensor) -> None:
        """Go on with these sequences of the batch only; index: positions or a mask [B]."""
        self.rows = None if self.rows is None else self.rows[index]
        self._then = None if self._then is None else Prediction(self._then.log_probs[index])
        self._signals = {key: signal[index] for key, signal in self._signals.items()}
