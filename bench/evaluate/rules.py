"""Exit rules: when may the cycles end? A rule makes a signal of what an exit point shows and leaves by a threshold.

A signal at token t reads what cycles up to the exit point computed from tokens up to t, and no label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from bench.errors import UserError, shown, typed_line, unknown
from bench.model.network import Network
from bench.model.walk import Walk
from bench.registry import Registry

Aggregate = Literal["mean", "last", "max"]
Leave = Literal["above", "below"]
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


rules: Registry[type[Rule]] = Registry("exit rule", "cyclebench.exit_rules", "bench.evaluate.rules")


def register(name: str) -> Callable[[type[R]], type[R]]:
    """Decorator: make a class an exit rule.

    Raises UserError as ``Registry.register`` does, and for a class that does not say on which side of its threshold a
    sequence leaves.
    """

    def add(kind: type[R]) -> type[R]:
        if (leave := getattr(kind, "leave", None)) not in (sides := get_args(Leave)):
            raise UserError(f"exit rule {name!r}: leave = {shown(leave)} (allowed: {', '.join(sides)})")
        return rules.register(name)(kind)

    return add


def get_rule(key: str) -> Rule:
    """The rule of a key, ``name`` or ``name.aggregate``. Raises UserError, with the nearest key, if there is none."""
    name, _, aggregate = key.partition(".")
    if name not in rules.items():
        raise unknown("exit rule", key, (rule.key for rule in all_rules()))
    kind = rules.get(name)
    return kind(aggregate or kind.aggregates[0])  # type: ignore[arg-type]


def all_rules() -> list[Rule]:
    """Every rule with every aggregate."""
    return [rules.get(name)(aggregate) for name in rules.names() for aggregate in rules.get(name).aggregates]


def _signal(rule: Rule, view: View, previous: Tensor | None) -> Tensor:
    """A rule's signal. What is wrong with it is told with the rule's name."""
    try:
        found = rule.signal(view, previous)
    except Exception as error:
        raise RuntimeError(f"exit rule {rule.key!r}: {typed_line(error)}") from error
    batch, length, _ = view.hidden.shape
    shape = tuple(getattr(found, "shape", ()))
    if shape not in ((batch, length), (batch, 1)):  # what is judged once a sequence is predicted once
        raise ValueError(f"exit rule {rule.key!r}: its signal has the shape {shape} (allowed: {batch, length}, [B, T])")
    return found


class SignalWatch:
    """What rules remember from one exit point of a pass to the next.

    rules: those watched; rows: [B], which sequences of the data the pass is made of (0, 1, ... by default).
    """

    def __init__(self, rules: Iterable[Rule], rows: Tensor | None = None) -> None:
        self.rules, self.rows = tuple(rules), rows
        self.reads_logits = any(rule.reads_logits for rule in self.rules)
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
        self._signals = {
            rule.key: _signal(rule, view, self._signals.get(rule.key)) for rule in self.rules if rule.usable(view)
        }
        self._then = view.now
        return logits, self._signals

    def keep(self, index: Tensor) -> None:
        """Go on with these sequences of the batch only; index: positions or a mask [B]."""
        self.rows = None if self.rows is None else self.rows[index]
        self._then = None if self._then is None else Prediction(self._then.log_probs[index])
        self._signals = {key: signal[index] for key, signal in self._signals.items()}


@register("zero_attention")
class ZeroAttention(Rule):
    """The attention on the zero tokens of the last cycle's steps, averaged over steps and heads (arXiv 2502.12214);
    aggregate ``max`` takes the largest over steps, heads and queries.
    """

    leave, high = "above", 1.0
    aggregates = ("mean", "last", "max")
    reads_zero_attention = True

    def usable(self, view: View) -> bool:
        return view.zero_attention is not None

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.zero_attention is not None
        return view.zero_attention.amax((0, 2)) if self.aggregate == "max" else view.zero_attention.mean((0, 2))


class _Reader(Rule):
    """A rule on what would be predicted if the cycles ended here."""

    reads_logits = True

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.now is not None
        return self.compare(view.now, view.then, previous)

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        """The signal [B, T] from this exit point's prediction and the one before, None at the first."""
        raise NotImplementedError


@register("confidence")
class Confidence(_Reader):
    """The largest probability (CALM: Schuster et al. 2022, arXiv 2207.07061, softmax response)."""

    leave, high = "above", 1.0

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return now.log_probs.amax(-1).exp()


@register("entropy")
class Entropy(_Reader):
    """The entropy of the prediction, nats (BranchyNet: Teerapittayanon et al. 2016, arXiv 1709.01686)."""

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return now.entropy


@register("kl")
class KullbackLeibler(_Reader):
    """KL(p_{t-1} || p_t) of successive predictions, nats, p_0 being uniform (Geiping et al. 2025, arXiv 2502.05171)."""

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        if then is None:
            return -now.log_probs.mean(-1) - math.log(now.log_probs.shape[-1])
        return (then.log_probs.exp() * (then.log_probs - now.log_probs)).sum(-1)


@register("entropy_diff")
class EntropyDifference(_Reader):
    """|H_t - H_{t-1}| of successive predictions, nats, H_0 being that of the uniform distribution (Geiping et al.
    2025, arXiv 2502.05171).
    """

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return (now.entropy - (math.log(now.log_probs.shape[-1]) if then is None else then.entropy)).abs()


@register("patience")
class Patience(_Reader):
    """For how many cycles the likeliest token has not changed (PABEE: Zhou et al. 2020, arXiv 2006.04152)."""

    leave = "above"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        if then is None or previous is None:
            return torch.zeros_like(now.token, dtype=torch.float)
        return torch.where(now.token == then.token, previous + 1, 0.0)


@register("latent_diff")
class LatentDifference(Rule):
    """||h_t - h_{t-1}|| / ||h_t||, the relative change of the state (Geiping et al. 2025, arXiv 2502.05171)."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.norm(dim=-1) / view.hidden.float().norm(dim=-1)


@register("latent_norm")
class LatentNorm(Rule):
    """||h_t - h_{t-1}||, not normalised (the static delta-h baseline of Ouro, arXiv 2510.25741)."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.norm(dim=-1)


@register("latent_rms")
class LatentRms(Rule):
    """The root mean square of h_t - h_{t-1} over channels and, for a sequence, over its tokens as well."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.square().mean(-1).sqrt()

    def pool(self, signal: Tensor, real: Tensor | None = None) -> Tensor:
        return super().pool(signal.square(), real).sqrt()


@register("cosine")
class Cosine(Rule):
    """1 - cos(h_t, h_{t-1}), the turn of the state."""

    leave, high = "below", 2.0

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return 1 - torch.cosine_similarity(view.hidden.float(), view.before.float(), dim=-1)


@register("halting")
class Halting(Rule):
    """The chance of having halted by now, as a trained halting module says (the gate CDF of Ouro, arXiv 2510.25741; ACT
    leaves where the remainder is below 0.001, hence at a threshold of 0.999).
    """

    leave, high = "above", 1.0

    def usable(self, view: View) -> bool:
        return view.halting is not None

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.halting is not None
        return view.halting.float()


@register("fixed")
class Fixed(Rule):
    """The number of cycles done: every sequence leaves after the same one."""

    leave, low = "above", 1.0
    aggregates = ("mean",)

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return torch.full(view.hidden.shape[:2], float(view.number), device=view.hidden.device)


@register("random")
class Random(Rule):
    """A uniform number drawn for every sequence and exit point: at each of them the same share of those still there
    leaves. What it gives is what the numbers of cycles alone are worth, without knowing whom to give them to.
    """

    leave, high = "above", 1.0
    aggregates = ("mean",)

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        rows = view.rows.cpu().numpy()
        drawn = np.random.default_rng([0xE817, view.number]).random(int(rows.max()) + 1, dtype=np.float32)[rows]
        return torch.from_numpy(drawn).to(view.hidden.device)[:, None].expand(view.hidden.shape[:2])
