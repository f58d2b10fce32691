"""Fronts, prior-task success at a level of new-task success, and the fit of forgetting on divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]  # (new-task success, prior-task success), both the larger the better


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising first coordinate; equal points count once."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    kept, best = [], -np.inf
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept[::-1]


def near_front(points: Sequence[Point], tolerance: float = 0.02) -> list[int]:
    """Indices of the points within ``tolerance`` (0.02 = 2 points of success) of the front, in the order given.

    RL's Razor, App. B.1: models within 2 accuracy points of the frontier are kept. Read as: raising both coordinates
    by the tolerance would leave the point undominated.
    """
    edge = [points[i] for i in front(points)]

    def dominated(x: float, y: float) -> bool:
        return any(u >= x and v >= y and (u > x or v > y) for u, v in edge)

    slack = tolerance + 1e-9  # success rates are multiples of 1/n, and 0.8 - 0.78 is a little above 0.02
    return [i for i, (x, y) in enumerate(points) if not dominated(x + slack, y + slack)]


def at_level(points: Sequence[Point], level: float) -> float | None:
    """Prior-task success at a level of new-task success: on the upper front, linear between its points.

    None outside the range of new-task success that the points cover: nothing is extrapolated. Inside it, the front is
    extended to the left at the height of its leftmost point, since a checkpoint that does better on both is as good.
    """
    if not points or level > max(x for x, _ in points) or level < min(x for x, _ in points):
        return None
    edge = [points[i] for i in front(points)]
    return float(np.interp(level, [x for x, _ in edge], [y for _, y in edge]))


@dataclass(frozen=True)
class Fit:
    """y = coefficients[0] + coefficients[1] x + coefficients[2] x^2. None where it was not fitted."""

    n: int
    coefficients: tuple[float, ...] | None
    r2: float | None
    note: str = ""

    def __call__(self, x) -> np.ndarray:
        return np.polynomial.polynomial.polyval(x, self.coefficients)


def quadratic_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least-squares polynomial of degree 2 and R^2 = 1 - SS_res / SS_tot, as RL's Razor fits forgetting on forward KL.

    Needs 4 points with at least 3 distinct x: three always fit perfectly and say nothing.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} x and {len(y)} y")
    fine = np.isfinite(x) & np.isfinite(y)
    x, y = x[fine], y[fine]
    n = len(x)
    if n < 4:
        return Fit(n, None, None, f"too few points for a fit: {n}, needs 4")
    if len(np.unique(x)) < 3:
        return Fit(n, None, None, "too few distinct divergences for a fit: needs 3")
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return Fit(n, None, None, "forgetting is the same at all points; nothing to explain")
    scale = float(np.abs(x).max())  # a divergence of 1e-4 squared would ruin the conditioning
    coefficients = np.polynomial.polynomial.polyfit(x / scale, y, 2) / scale ** np.arange(3)
    residual = float(((y - np.polynomial.polynomial.polyval(x, coefficients)) ** 2).sum())
    return Fit(n, tuple(map(float, coefficients)), 1 - residual / total)
