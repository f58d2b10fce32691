"""Intervals and errors of success rates, paired differences and aggregates over runs. Plain Python and numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


def normal_quantile(confidence: float) -> float:
    """The two-sided standard normal quantile, 1.96 at 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion; (0, 1) where nothing was tried.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    z, p = normal_quantile(confidence), successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


@dataclass(frozen=True)
class PairedDifference:
    """``difference`` = rate of the first minus rate of the second, over the same seeds.

    only_first, only_second: the discordant pairs; with both = neither = n - discordant they are all there is to know.
    """

    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """The difference of two success rates measured on the same n >= 1 seeds, with Newcombe's interval.

    With Wilson limits (l, u) of each rate p and the correlation phi of the 2x2 table (continuity-corrected towards 0),
    low = d - sqrt((p1-l1)^2 - 2 phi (p1-l1)(u2-p2) + (u2-p2)^2), high likewise with (u1-p1) and (p2-l2). Newcombe,
    "Improved confidence intervals for the difference between binomial proportions based on paired data", 1998, method
    10. It keeps its coverage at rates near 0 and 1 and with no discordant pair, where the usual interval has width 0.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} outcomes cannot be paired")
    n = len(first)
    both = sum(bool(a) and bool(b) for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(map(bool, first)) - both, sum(map(bool, second)) - both
    neither = n - both - only_first - only_second
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (l1, u1), (l2, u2) = (wilson(both + only_first, n, confidence), wilson(both + only_second, n, confidence))
    margins = math.prod((both + only_first, neither + only_second, both + only_second, neither + only_first))
    cross = both * neither - only_first * only_second
    if cross > 0:
        cross = max(cross - n / 2, 0)
    phi = cross / math.sqrt(margins) if margins else 0.0

    def root(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = (only_first - only_second) / n
    low, high = difference - root(p1 - l1, u2 - p2), difference + root(u1 - p1, p2 - l2)
    return PairedDifference(n, p1, p2, difference, low, high, only_first, only_second)


def retention(base: float, fine_tuned: float) -> float | None:
    """fine-tuned / base success; None where the base never succeeded."""
    return fine_tuned / base if base > 0 else None


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float | None]:
    """Mean and its standard error where values of one cluster (an episode) are dependent; None with one cluster.

    SE^2 = G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2 over G clusters (CR1, as inspect_ai and Miller 2024).
    """
    values = np.asarray(values, dtype=float)
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values, {len(clusters)} cluster labels")
    mean = values.mean()
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values - mean, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    groups = len(sums)
    if groups < 2:
        return float(mean), None
    variance = groups / (groups - 1) * sum(total * total for total in sums.values()) / len(values) ** 2
    return float(mean), math.sqrt(variance)


def bootstrap(
    runs: Sequence,
    statistic: Callable[[list], float] = lambda values: float(np.mean(values)),
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Percentile interval of a statistic over runs drawn with replacement.

    Resamples where the statistic is not finite are left out. (None, None) with fewer than 3 runs, or when fewer
    than half of the resamples give a number.
    """
    if len(runs) < 3:
        return None, None
    generator = np.random.default_rng(seed)
    values = []
    for index in generator.integers(len(runs), size=(resamples, len(runs))):
        value = statistic([runs[i] for i in index])
        if value is not None and math.isfinite(value):
            values.append(value)
    if 2 * len(values) < resamples:
        return None, None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_of_intervals(intervals: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent estimates (value, low, high), with their limits squared and added (MOVER, Zou 2008).

    low = mean - sqrt(sum (value - low)^2) / T, and likewise high. Used for the mean over prior tasks.
    """
    values = np.asarray(intervals, dtype=float)
    mean, count = values[:, 0].mean(), len(values)
    low = mean - math.sqrt(((values[:, 0] - values[:, 1]) ** 2).sum()) / count
    high = mean + math.sqrt(((values[:, 2] - values[:, 0]) ** 2).sum()) / count
    return float(mean), float(low), float(high)


def crossed_mean(
    tasks: Sequence[np.ndarray], single: Sequence[tuple[float, float, float]], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over runs (training seeds) and initial states, where all runs are tested on the same initial states.

    tasks: per task a matrix [k runs, n initial states] of outcomes or differences; the mean is over tasks, then runs
    single: (value, low, high) of each run alone; from one run its interval is returned

    SE^2 = s_runs^2 / k + (1/T^2) sum_t s_states,t^2 / n_t, from the variances of the run means and of the state means.
    Neither the runs nor the states are taken for the only ones possible (crossed random effects; conservative,
    as the interaction counts twice). Student's t with Welch-Satterthwaite degrees. A spread of zero by luck does not
    give a narrow interval: half a width is at least the single runs' mean one over sqrt(k).
    """
    singles = np.asarray(single, dtype=float)
    k = len(singles)
    if k == 1:
        return tuple(map(float, singles[0]))
    mean = float(singles[:, 0].mean())
    runs = float(singles[:, 0].var(ddof=1)) / k
    states, freedom = 0.0, 0.0
    for matrix in tasks:
        n = matrix.shape[1]
        if n > 1:
            part = float(matrix.mean(0).var(ddof=1)) / n / len(tasks) ** 2
            states, freedom = states + part, freedom + part**2 / (n - 1)
    total, freedom = runs + states, freedom + runs**2 / (k - 1)
    half = _t_quantile(confidence, total**2 / freedom) * math.sqrt(total) if freedom else 0.0
    below = float((singles[:, 0] - singles[:, 1]).mean()) / math.sqrt(k)
    above = float((singles[:, 2] - singles[:, 0]).mean()) / math.sqrt(k)
    return mean, mean - max(half, below), mean + max(half, above)


def ratio_interval(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float | None, float | None]:
    """Limits of first / second from (value, low, high) of two rates, as if independent (MOVER-R, Donner and Zou 2012).

    Outcomes on the same initial states go together, so for paired rates these limits are too wide rather than too
    narrow. None where there is no finite limit, as when the second rate may be 0.
    """
    (p, low, high), (q, base_low, base_high) = first, second

    def limit(edge: float, base_edge: float, sign: int) -> float | None:
        denominator = base_edge * (2 * q - base_edge)
        root = (p * q) ** 2 - edge * base_edge * (2 * p - edge) * (2 * q - base_edge)
        if denominator <= 1e-12 or root < 0:
            return None
        return max((p * q + sign * math.sqrt(root)) / denominator, 0.0)

    return limit(low, base_high, -1), limit(high, base_low, 1)


def _t_quantile(confidence: float, degrees: float) -> float:
    from scipy.special import stdtrit  # imported here: it takes a while; scipy.stats, whose t calls it, takes a second

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def minimum_detectable_difference(
    n: int, rate: float, *, correlation: float = 0.0, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The smallest difference of two rates near ``rate`` that n (paired) episodes each show with the given power.

    (z_{confidence} + z_{power}) sqrt(2 p (1-p) (1 - correlation) / n); correlation between the paired outcomes.
    """
    if n < 1:
        raise ValueError("no episodes, no detectable difference")
    z = normal_quantile(confidence) + NormalDist().inv_cdf(power)
    return z * math.sqrt(2 * rate * (1 - rate) * (1 - correlation) / n)
