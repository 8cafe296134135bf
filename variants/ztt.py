"""The Zero Token Transformer (arXiv 2502.12214; again as Efficient Transformer Parameter Reuse via Zero-Token
Mechanism, Findings of ACL 2026, pages 14498-14515): Head-Tail Cycling with zero tokens and gates.

Of the paper this suite knows what is public text. It says: the first and the last layer are outside of the cycle; at
each cycle a zero token, with a trainable key and the value zero, is taken from a pool into the attention; a gate is
beside it; much attention to it means that no more computation is needed, and the cycle may be left. A figure shows a
stack of six layers and two cycles in which each layer has a zero token.

All else is a choice of ours, and an option where it can matter: the gate's form (``gating``), the pool's size and who
takes which entry (``lookup``, ``pool_size``, ``zero_tokens``), in which layers and from which cycle on there are zero
tokens (``where``, ``from_cycle``), how keys are drawn (``bench.model.zero_tokens``), over what the attention to them
is averaged and at which threshold a sequence leaves (``bench.evaluate.rules``). Numbers of this suite are none of the
paper's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bench.config import ModelConfig
from bench.model.gates import Gating, make_gate
from bench.model.parts import Gate
from bench.model.schedule import Schedule, Step
from bench.model.variant import register
from bench.model.zero_tokens import PoolLookup, ZeroTokenPool
from variants.htc import HeadTailCycling


@register("ztt")
class ZeroTokenTransformer(HeadTailCycling):
    """Zero Token Transformer: Head-Tail Cycling with a zero-token pool and a gate."""

    # At one cycle the converted model is the original: a trained first pass has no use for a token it never saw.
    pretrained_options: ClassVar[dict[str, Any]] = {"from_cycle": 1}

    class Options(HeadTailCycling.Options):
        """The choices that the paper's public text leaves open, each an ablation axis.

        Attributes:
            zero_tokens: how many a step takes (0: none, the control "gate without zero token").
            lookup: which pool entry a step takes, hence the pool's size, which is pool_size for the lookup ``routed``.
            gating: what gates a step.
            value: ``zero``, or ``learned`` (the control that turns the zero token into an ordinary attention sink).
            key: ``trained``, or ``frozen`` at its random start.
            where: zero tokens and gates in the ``recurrent`` steps, or in ``all`` (the control: in prelude and coda
                too).
            from_cycle: the first cycle that has them (1 leaves the first pass over the blocks plain).
        """

        zero_tokens: int = Field(1, ge=0, le=64)
        lookup: PoolLookup = "step"
        pool_size: int | None = Field(None, ge=2, le=4096)
        gating: Gating = "attention"
        value: Literal["zero", "learned"] = "zero"
        key: Literal["trained", "frozen"] = "trained"
        where: Literal["recurrent", "all"] = "recurrent"
        from_cycle: int = Field(0, ge=0, le=1)

        @model_validator(mode="after")
        def _consistent(self) -> ZeroTokenTransformer.Options:
            if self.zero_tokens == 0 and self.gating == "attention":
                raise ValueError("gating = 'attention' needs zero_tokens of at least 1, not 0")
            for field, control in (("value", "learned"), ("key", "frozen")):
                if self.zero_tokens == 0 and getattr(self, field) == control:
                    raise ValueError(f"{field} = {control!r} needs zero_tokens of at least 1, not 0")
            if (self.lookup == "routed") != (self.pool_size is not None):
                raise ValueError(f"pool_size = {self.pool_size} must be given with lookup = 'routed', and only with it")
            return self

    def _steps(self, schedule: Schedule) -> tuple[Step, ...]:
        steps = schedule.recurrent if self.options.where == "recurrent" else schedule.steps
        return tuple(step for step in steps if step.cycle >= self.options.from_cycle)

    def attention_prefix(self, model: ModelConfig, schedule: Schedule) -> ZeroTokenPool | None:
        chosen = self.options
        if not chosen.zero_tokens:
            return None
        return ZeroTokenPool(
            model,
            self._steps(schedule),
            chosen.lookup,
            chosen.zero_tokens,
            chosen.pool_size or 1,
            chosen.value == "learned",
            chosen.key == "frozen",
        )

    def gate(self, model: ModelConfig, schedule: Schedule) -> Gate | None:
        return make_gate(self.options.gating, model, self._steps(schedule))
