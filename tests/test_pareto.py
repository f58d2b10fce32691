"""Fronts, levels and fits on points small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest

from robot_forgetting.metrics.pareto import at_level, front, near_front, quadratic_fit


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(0.5, 0.5)], [0]),
        ([(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)], [0, 1, 2]),
        ([(0.9, 0.1), (0.5, 0.5), (0.4, 0.4)], [1, 0]),
        ([(0.5, 0.5), (0.5, 0.5), (0.5, 0.4)], [0]),
        ([(0.2, 0.9), (0.6, 0.9), (0.6, 0.3)], [1]),
    ],
)
def test_front(points, expected):
    assert front(points) == expected


def test_front_is_the_undominated_set():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 20, size=(60, 2)) / 20]
    kept = {points[i] for i in front(points)}
    for point in points:
        dominated = any(q != point and q[0] >= point[0] and q[1] >= point[1] for q in points)
        assert (point in kept) == (not dominated)


def test_near_front_keeps_two_points():
    points = [(0.50, 0.80), (0.48, 0.78), (0.47, 0.77), (0.60, 0.70), (0.20, 0.79)]
    assert near_front(points) == [0, 1, 3, 4]  # 0.79 is within 0.02 of 0.80, though far to the left
    assert near_front(points, 0.0) == front(points)
    assert near_front([]) == []


def test_at_level():
    points = [(0.2, 0.9), (0.6, 0.7), (0.4, 0.1)]
    assert at_level(points, 0.6) == 0.7
    assert at_level(points, 0.4) == pytest.approx(0.8)
    assert at_level(points, 0.7) is None
    assert at_level(points, 0.1) is None
    assert at_level([(0.2, 0.5), (0.6, 0.7)], 0.3) == 0.7  # (0.6, 0.7) is better on both
    assert at_level([], 0.5) is None


def test_quadratic_fit():
    x = np.array([0.0, 1e-4, 2e-4, 3e-4, 4e-4])
    y = 0.1 + 2 * (x * 1e4) - 0.3 * (x * 1e4) ** 2
    fit = quadratic_fit(x, y)
    assert fit.r2 == pytest.approx(1)
    assert fit(x) == pytest.approx(y)
    noisy = quadratic_fit([0, 1, 2, 3], [0, 1, 0, 1])
    assert noisy.r2 == pytest.approx(0.2)  # residuals -+0.2, -+0.6: SS 0.8 of 1
    assert noisy.n == 4


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([1, 2, 3], [1, 2, 3], "too few points"),
        ([1, 2, 3, np.nan], [1, 2, 3, 4], "too few points"),
        ([1, 1, 2, 2], [1, 2, 3, 4], "distinct"),
        ([1, 2, 3, 4], [1, 1, 1, 1], "nothing to explain"),
    ],
)
def test_no_fit_says_why(x, y, note):
    fit = quadratic_fit(x, y)
    assert fit.r2 is None
    assert note in fit.note
