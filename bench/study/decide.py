"""A study that adds seeds until its hypotheses are decided: what is declared before it runs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from bench.config import FIRST_PILOT, LARGE, LARGEST, Strict
from bench.stats import SIGNIFICANT, Looks
from bench.store.manifest import DecideRow

PLAIN = Looks()


class Decide(Strict):
    """When the study looks at its data, what each look may spend, and when it stops; see ``bench.stats.Looks``.

    Attributes:
        looks: numbers of pairs of seeds, rising.
        shares: of alpha, one for each look, at most 1 together. By default those of ``Looks`` for its own looks; for
            others in proportion to the pairs that are new at a look (Kim & DeMets 1987, with exponent 1).
        alpha: the probability of any wrong verdict, whatever the truth, is at most this.
        within: a mean difference up to this counts as none, by metric and in its unit. A hypothesis on several tasks
            whose metrics have different units has no such bounds, and cannot end as equivalent.
        max_flops: training FLOPs of all cells of the study, as planned; None: no limit.
        max_cells: number of all cells of the study; None: no limit.
    """

    looks: tuple[Annotated[int, Field(ge=0, le=LARGEST)], ...] = PLAIN.pairs
    shares: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = ()
    alpha: float = Field(SIGNIFICANT, ge=0.0, le=1.0)
    within: dict[str, Annotated[float, Field(gt=0.0, le=LARGE)]] = Field(default_factory=dict)
    max_flops: float | None = Field(None, gt=0, le=LARGE)
    max_cells: int | None = Field(None, ge=1, le=LARGEST)

    @model_validator(mode="after")
    def _possible(self) -> Decide:
        self.design  # noqa: B018  (its complaints are this one's)
        if self.looks[-1] > FIRST_PILOT:
            raise ValueError(f"looks {self.looks} must end at {FIRST_PILOT} pairs or before: later seeds are pilots")
        return self

    @property
    def design(self) -> Looks:
        """The looks with their levels. Raises ValueError if they are none."""
        shares = self.shares
        if not shares and self.looks == PLAIN.pairs:
            shares = PLAIN.shares
        elif not shares and self.looks and self.looks[-1] > 0:
            new = [n - before for before, n in zip((0, *self.looks), self.looks, strict=False)]
            Looks(self.looks, (1 / len(new),) * len(new), self.alpha)  # do they rise? said of them, not of the shares
            shares = tuple(n / self.looks[-1] for n in new)
        return Looks(self.looks, shares, self.alpha)

    def check(self, seeds: tuple[int, ...], family: int) -> None:
        """Raises ValueError if the study has no hypothesis, too many for these looks, or seeds of its own that are not
        all pilots.
        """
        if seeds != tuple(range(self.looks[-1])) and min(seeds) < FIRST_PILOT:
            raise ValueError(
                f"seeds = {_short(seeds)} cannot be chosen beside decide, which takes 0, 1, 2, ... in order (allowed: "
                f"no seeds; for a pilot seeds from {FIRST_PILOT} on)"
            )
        if not family:
            raise ValueError("decide needs hypotheses: without one there is nothing to decide")
        if self.design.earliest(family) is None:
            raise ValueError(
                f"decide: no look can decide one of {family} hypotheses: {self.looks[-1]} pairs cannot be significant "
                f"at {self.design.alpha * self.design.shares[-1] / family:.2g} (allowed: more pairs, fewer looks)"
            )

    def row(self, starts: dict[str, str]) -> DecideRow:
        """As the manifest holds it. starts: see there."""
        design = self.design
        return DecideRow(
            looks=list(design.pairs),
            shares=list(design.shares),
            alpha=design.alpha,
            max_flops=self.max_flops,
            max_cells=self.max_cells,
            starts=starts,
        )


def with_seeds(study: dict[str, Any]) -> dict[str, Any]:
    """A study's mapping with the seeds that its looks may use, if it gives none; what is wrong is told by others."""
    if study.get("seeds") is not None:
        return study
    decide = study["decide"]
    looks = decide.get("looks", PLAIN.pairs) if isinstance(decide, dict) else getattr(decide, "looks", ())
    last = looks[-1] if isinstance(looks, list | tuple) and looks else None
    if not isinstance(last, int) or not 1 <= last <= FIRST_PILOT:
        last = 1
    return {**study, "seeds": tuple(range(last))}


def _short(seeds: tuple[int, ...]) -> str:
    return str(list(seeds)) if len(seeds) <= 4 else f"[{seeds[0]}, {seeds[1]}, ..., {seeds[-1]}]"
