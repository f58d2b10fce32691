"""Intervals against published values, scipy, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from robot_forgetting.metrics.statistics import (
    bootstrap,
    clustered_mean,
    mean_over_runs,
    minimum_detectable_difference,
    paired_difference,
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


def test_mean_over_runs():
    mean, low, high = mean_over_runs([0.6, 0.7, 0.8])
    expected = stats.t.interval(0.95, 2, loc=0.7, scale=0.1 / math.sqrt(3))
    assert (mean, low, high) == pytest.approx((0.7, *expected))
    assert mean_over_runs([0.6]) == (0.6, None, None)
    _, low, high = mean_over_runs([0.5, 0.5, 0.5], [0.0025] * 3)  # equal by luck: the episodes' own error remains
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, loc=0.5, scale=0.05 / math.sqrt(3)))


def test_minimum_detectable_difference():
    # 2.8016 * sqrt(2 * 0.25 / 200)
    assert minimum_detectable_difference(200, 0.5) == pytest.approx(0.14008, abs=1e-4)
    assert minimum_detectable_difference(200, 0.5, correlation=0.75) == pytest.approx(0.07004, abs=1e-4)
