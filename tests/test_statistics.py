"""Intervals against published values, scipy, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from robot_forgetting.metrics.statistics import (
    bootstrap,
    clustered_mean,
    crossed_mean,
    mean_of_intervals,
    minimum_detectable_difference,
    paired_difference,
    ratio_interval,
    retention,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (170, 200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_edges():
    # Newcombe 1998 (two-sided intervals for the single proportion), 81 of 263: 0.2553 to 0.3662
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson(6, 5)


def outcomes(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Fagerland, Lydersen, Laake 2014 (Statistics in Medicine 33), airway hyper-responsiveness before and after
        # stem cell transplantation: Newcombe square-and-add -0.507 to -0.026
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_paired_difference_published(table, low, high):
    result = paired_difference(*outcomes(*table))
    assert (result.low, result.high) == pytest.approx((low, high), abs=6e-4)
    assert result.difference == pytest.approx((table[1] - table[2]) / sum(table))
    assert (result.only_first, result.only_second) == table[1:3]


def test_paired_difference_edges():
    same = paired_difference(*outcomes(50, 0, 0, 50))
    assert same.difference == 0
    assert -0.1 < same.low < 0 < same.high < 0.1
    perfect = paired_difference(*outcomes(20, 0, 0, 0))
    assert perfect.difference == 0
    assert (perfect.low, perfect.high) == pytest.approx((-0.1611, 0.1611), abs=1e-4)  # 1 - wilson(20, 20)[0]
    lost = paired_difference(*outcomes(0, 30, 0, 0))
    assert lost.difference == 1
    assert lost.high == pytest.approx(1)
    swapped = paired_difference(*reversed(outcomes(7, 5, 2, 9)))
    result = paired_difference(*outcomes(7, 5, 2, 9))
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([], [])


def test_paired_interval_covers():
    """About 95 % of the intervals hold the true difference, with correlated outcomes like those of shared seeds."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        cells = generator.multinomial(60, [0.6, 0.25, 0.05, 0.1])
        result = paired_difference(*outcomes(*cells))
        hits += result.low <= 0.2 <= result.high
    assert 0.92 <= hits / 400 <= 0.985


def test_retention():
    assert retention(0.8, 0.4) == 0.5
    assert retention(0.0, 0.4) is None


def test_clustered_mean_by_hand():
    mean, error = clustered_mean([1, 1, 0, 0], ["a", "a", "b", "b"])  # two clusters, sums +1 and -1, 2/1 * 2 / 16
    assert (mean, error) == (0.5, 0.5)
    values = np.random.default_rng(0).normal(size=30)
    assert clustered_mean(values, range(30)) == pytest.approx((values.mean(), stats.sem(values)))
    assert clustered_mean([1.0, 2.0], [0, 0]) == (1.5, None)


def test_bootstrap():
    values = np.random.default_rng(1).normal(3, 1, size=100)
    low, high = bootstrap(list(values))
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * stats.sem(values), values.mean() + 1.96 * stats.sem(values)), abs=0.05
    )
    assert bootstrap(list(values)) == (low, high)  # the seed is fixed
    assert bootstrap([1.0, 2.0]) == (None, None)
    assert bootstrap([1.0, 2.0, 3.0], lambda _: math.nan) == (None, None)


def test_mean_of_intervals():
    assert mean_of_intervals([(0.5, 0.4, 0.7)]) == pytest.approx((0.5, 0.4, 0.7))
    assert mean_of_intervals([(0.5, 0.2, 0.6), (0.7, 0.3, 0.7)]) == pytest.approx((0.6, 0.35, 0.65))  # 3-4-5 below


def rate(outcomes):
    return (np.mean(outcomes), *wilson(int(np.sum(outcomes)), len(outcomes)))


def test_crossed_mean_of_one_run_is_its_own_interval():
    outcomes = np.array([[1.0, 0, 1, 1]])
    assert crossed_mean([outcomes], [rate(outcomes[0])]) == rate(outcomes[0])


def test_crossed_mean_by_hand():
    matrix = np.array([[1.0, 1, 0, 0], [1, 1, 1, 0]])  # runs 0.5, 0.75; states 1, 1, 0.5, 0
    runs, states = 0.03125 / 2, (0.6875 / 3) / 4  # variances of the means
    degrees = (runs + states) ** 2 / (runs**2 / 1 + states**2 / 3)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(runs + states)
    assert crossed_mean([matrix], [rate(row) for row in matrix]) == pytest.approx((0.625, 0.625 - half, 0.625 + half))


def test_crossed_mean_never_has_no_width():
    matrix = np.ones((3, 50))
    mean, low, high = crossed_mean([matrix], [rate(row) for row in matrix])
    assert (mean, high) == (1, 1)
    assert low == pytest.approx(1 - (1 - wilson(50, 50)[0]) / math.sqrt(3))


def test_crossed_interval_covers():
    """Runs differ, initial states differ, and both are new in every repetition."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        chance = 0.6 + generator.normal(0, 0.05, size=(3, 1)) + generator.normal(0, 0.15, size=(1, 50))
        matrix = (generator.random((3, 50)) < chance).astype(float)
        _, low, high = crossed_mean([matrix], [rate(row) for row in matrix])
        hits += low <= 0.6 <= high
    assert hits / 300 >= 0.94


def test_ratio_interval():
    assert ratio_interval((0.5, 0.5, 0.5), (0.8, 0.8, 0.8)) == pytest.approx((0.625, 0.625))
    # Without error in the base it is the numerator's interval divided by it.
    assert ratio_interval((0.5, 0.4, 0.6), (0.8, 0.8, 0.8)) == pytest.approx((0.5, 0.75))
    # Large samples: the delta method on the logarithm
    p, q, n = 0.5, 0.8, 10_000
    error = 1.96 * math.sqrt((1 - p) / (p * n) + (1 - q) / (q * n))
    expected = p / q * math.exp(-error), p / q * math.exp(error)
    assert ratio_interval((p, *wilson(5000, n)), (q, *wilson(8000, n))) == pytest.approx(expected, rel=1e-3)
    low, high = ratio_interval((0.5, 0.2, 0.8), (0.0, *wilson(0, 10)))
    assert (low, high) == (None, None)


def test_minimum_detectable_difference():
    # 2.8016 * sqrt(2 * 0.25 / 200)
    assert minimum_detectable_difference(200, 0.5) == pytest.approx(0.14008, abs=1e-4)
    assert minimum_detectable_difference(200, 0.5, correlation=0.75) == pytest.approx(0.07004, abs=1e-4)
