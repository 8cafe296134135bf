"""Statistics over seeds, on scipy: intervals, paired contrasts, verdicts, power, fronts, aggregates over tasks."""

from bench.stats.aggregate import Profile, interquartile_mean, performance_profile, probability_of_improvement
from bench.stats.contrasts import Paired, hedges_g, holm, over_tasks, paired, smallest_p
from bench.stats.fronts import Band, Dominance, dominance, hypervolume, median_front, pareto_front
from bench.stats.intervals import FEWEST_FOR_BCA, Interval, bca_interval, mean_interval, sd_interval
from bench.stats.power import detectable, power_of, seeds_needed
from bench.stats.verdicts import SIGNIFICANT, Contrast, Verdict, judge

__all__ = [
    "FEWEST_FOR_BCA",
    "SIGNIFICANT",
    "Band",
    "Contrast",
    "Dominance",
    "Interval",
    "Paired",
    "Profile",
    "Verdict",
    "bca_interval",
    "detectable",
    "dominance",
    "hedges_g",
    "holm",
    "hypervolume",
    "interquartile_mean",
    "judge",
    "mean_interval",
    "median_front",
    "over_tasks",
    "paired",
    "pareto_front",
    "performance_profile",
    "power_of",
    "probability_of_improvement",
    "sd_interval",
    "seeds_needed",
    "smallest_p",
]
