"""Statistics over seeds, on scipy: intervals, paired contrasts, verdicts, deciding studies, power, targets, fronts,
aggregates over tasks, the worth of a cycle.
"""

from bench.stats.aggregate import Profile, interquartile_mean, performance_profile, probability_of_improvement
from bench.stats.contrasts import Paired, equivalence_p, hedges_g, over_tasks, paired, smallest_p
from bench.stats.decide import Decision, Looks, Outlook, expected, replay
from bench.stats.fronts import Band, Dominance, dominance, hypervolume, median_front, pareto_front
from bench.stats.intervals import (
    COVERAGE,
    FEWEST_FOR_INTERVAL,
    SIZES,
    Interval,
    coverage,
    interval,
    over_seeds,
    sd_interval,
)
from bench.stats.power import detectable, equivalence_power, power_of, seeds_for_equivalence, seeds_needed
from bench.stats.recurrence import Recurrence, fit_phi
from bench.stats.targets import area_under_curve, cost_to, restricted
from bench.stats.verdicts import SIGNIFICANT, Contrast, Outcome, Verdict, judge, step_down

__all__ = [
    "COVERAGE",
    "FEWEST_FOR_INTERVAL",
    "SIGNIFICANT",
    "SIZES",
    "Band",
    "Contrast",
    "Decision",
    "Dominance",
    "Interval",
    "Looks",
    "Outcome",
    "Outlook",
    "Paired",
    "Profile",
    "Recurrence",
    "Verdict",
    "area_under_curve",
    "cost_to",
    "coverage",
    "detectable",
    "dominance",
    "equivalence_p",
    "equivalence_power",
    "expected",
    "fit_phi",
    "hedges_g",
    "hypervolume",
    "interquartile_mean",
    "interval",
    "judge",
    "median_front",
    "over_seeds",
    "over_tasks",
    "paired",
    "pareto_front",
    "performance_profile",
    "power_of",
    "probability_of_improvement",
    "replay",
    "restricted",
    "sd_interval",
    "seeds_for_equivalence",
    "seeds_needed",
    "smallest_p",
    "step_down",
]
