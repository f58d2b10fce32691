"""Fronts, prior-task success at a level of new-task success, and the fit of forgetting on divergence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from robot_forgetting.metrics.resampling import LEAST_RUNS, percentiles, run_weights

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
    by the tolerance would leave the point undominated, and it is not further than that below the whole front (else a
    policy that forgot everything would be kept for its new-task success).
    """
    edge = [points[i] for i in front(points)]
    if not edge:
        return []

    def dominated(x: float, y: float) -> bool:
        return any(u >= x and v >= y and (u > x or v > y) for u, v in edge)

    slack = tolerance + 1e-9  # success rates are multiples of 1/n, and 0.8 - 0.78 is a little above 0.02
    lowest = edge[-1][1] - slack
    return [i for i, (x, y) in enumerate(points) if y >= lowest and not dominated(x + slack, y + slack)]


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


def no_fit_reason(x: np.ndarray, y: np.ndarray) -> str:
    """Why a quadratic of y on x would say nothing, for finite x and y; "" where it would say something."""
    if len(x) < 4:
        return f"too few points for a fit: {len(x)}, needs 4"
    if np.ptp(x) <= 1e-6 * np.abs(x).max():  # float32 measures carry no more; their noise would be fitted
        return "the predictor is the same at all points: it needs 3 distinct values"
    if len(np.unique(((x - x.min()) / np.ptp(x)).round(9))) < 3:
        return "too few distinct values of the predictor for a fit: needs 3"
    if np.ptp(y) == 0:
        return "forgetting is the same at all points; nothing to explain"
    return ""


def quadratic_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least-squares polynomial of degree 2 and R^2 = 1 - SS_res / SS_tot, as RL's Razor fits forgetting on forward KL.

    Points that are not finite are left out. Needs 4 points with at least 3 distinct x: three always fit perfectly and
    say nothing; otherwise the note of the fit says why there is none.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} x and {len(y)} y")
    fine = np.isfinite(x) & np.isfinite(y)
    x, y = x[fine], y[fine]
    n = len(x)
    if reason := no_fit_reason(x, y):
        return Fit(n, None, None, reason)
    # In a variable of size 1: x may be divergences of 1e-4, or similarities that all lie near 1.
    fitted = np.polynomial.Polynomial.fit(x, y, 2)
    residual, total = float(((y - fitted(x)) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    coefficients = np.pad(fitted.convert().coef, (0, 3))[:3]  # convert drops trailing zeros
    return Fit(n, tuple(map(float, coefficients)), 1 - residual / total)


RATES = np.geomspace(0.05, 200, 240)  # nearly straight ... nearly a corner, over the width of the kept points
GRID = 60  # points of a curve


@dataclass(frozen=True)
class FrontCurve:
    """y = level - drop exp(rate (x - right) / width), the trade-off curve through the points near a front.

    kept: indices of the points fitted; right, width: their largest x and the width of their range; rate > 0 and
    drop >= 0, so y falls ever faster towards the right. x, y: the curve; low, high: its band, None at an x where fewer
    than half of the resamples have a point as far out. Without a fit all is empty and ``note`` says why.
    """

    n: int
    runs: int
    kept: tuple[int, ...]
    level: float | None = None
    drop: float | None = None
    rate: float | None = None
    right: float | None = None
    width: float | None = None
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    over: str | None = None
    note: str = ""

    def __call__(self, x) -> np.ndarray:
        return self.level - self.drop * np.exp(self.rate * (np.asarray(x, dtype=float) - self.right) / self.width)


def front_curve(
    points: Sequence[Point],
    runs: Sequence[Hashable] | None = None,
    seeds: Sequence[Hashable] | None = None,
    *,
    tolerance: float = 0.02,
    resamples: int = 1000,
) -> FrontCurve:
    """The paper's protocol (RL's Razor, App. B.1): keep the points within 2 points of the front, fit an exponential.

    The paper does not give its form. With y = level - drop exp(rate (x - right) / width) least squares has a closed
    form for each rate, so a scan and a bounded minimisation find the best: no start value, nothing to diverge.
    points: (new-task, prior-task) success; runs, seeds: the run and the seed of each point. The band draws seeds and
    runs with replacement (all checkpoints of a run together), keeps and fits anew each time, and takes percentiles.
    Points that are not finite are left out. At least 4 kept points with 3 distinct x, and for a band 3 runs.
    """
    runs = list(range(len(points))) if runs is None else list(runs)
    seeds = [None] * len(points) if seeds is None else list(seeds)
    if not len(points) == len(runs) == len(seeds):
        raise ValueError(f"{len(points)} points, {len(runs)} runs, {len(seeds)} seeds")
    fine = [i for i, point in enumerate(points) if np.isfinite(point).all()]
    kept = tuple(fine[i] for i in near_front([points[i] for i in fine], tolerance))
    count = len({(runs[i], seeds[i]) for i in kept})
    x, y = (np.array([points[i][axis] for i in kept], dtype=float) for axis in (0, 1))
    if len(kept) < 4 or len(np.unique(x.round(9))) < 3:
        distinct = len(np.unique(x.round(9)))
        note = f"no curve: {len(kept)} points near the front with {distinct} distinct new-task values, needs 4 with 3"
        return FrontCurve(len(kept), count, kept, note=note)
    right, width = float(x.max()), float(np.ptp(x))
    where = (x - right) / width

    from scipy.optimize import minimize_scalar  # imported here: it takes half a second

    def error(log_rate: float) -> float:
        return float(_exponentials(where, y, np.ones((1, len(y))), np.exp([log_rate]))[2][0, 0])

    best = int(_exponentials(where, y, np.ones((1, len(y))), RATES)[2].argmin())
    around = np.log(RATES[[max(best - 1, 0), min(best + 1, len(RATES) - 1)]])
    rate = float(np.exp(minimize_scalar(error, bounds=tuple(around), method="bounded").x))
    level, drop, _ = (float(v[0, 0]) for v in _exponentials(where, y, np.ones((1, len(y))), np.array([rate])))
    note = "the points near the front do not fall: a level line" if drop == 0 else ""
    curve = FrontCurve(len(kept), count, kept, level, drop, rate, right, width, note=note)
    grid = np.linspace(x.min(), right, GRID)
    low, high, over = [None] * GRID, [None] * GRID, None
    clusters = {key: i for i, key in enumerate(dict.fromkeys((runs[i], seeds[i]) for i in fine))}
    if len(clusters) >= LEAST_RUNS:
        generator = np.random.default_rng(0)
        weights = run_weights([s for _, s in clusters], resamples=resamples, generator=generator)
        weights = weights[:, [clusters[runs[i], seeds[i]] for i in fine]]
        low, high = _band(np.array([points[i] for i in fine], dtype=float), weights, tolerance, curve, grid)
        over = "seeds and runs" if len({s for _, s in clusters}) > 1 else "runs"
    else:
        note = f"{note}; " * bool(note) + f"no band: {len(clusters)} runs, needs {LEAST_RUNS}"
    x, y = tuple(map(float, grid)), tuple(map(float, curve(grid)))
    return replace(curve, x=x, y=y, low=tuple(low), high=tuple(high), over=over, note=note)


def _exponentials(where: np.ndarray, y: np.ndarray, weights: np.ndarray, rates: np.ndarray):
    """(level, drop, squared error), each [B, rates]: weighted least squares of y on exp(rate * where), drop >= 0."""
    powers = np.exp(where[:, None] * rates)  # where <= 0: between 0 and 1
    n = weights.sum(1, keepdims=True)
    mean_e, mean_y = weights @ powers / n, (weights @ y)[:, None] / n
    squares = np.maximum(weights @ powers**2 / n - mean_e**2, 0.0)
    slope = np.minimum((weights @ (powers * y[:, None]) / n - mean_e * mean_y), 0.0)
    slope = np.divide(slope, squares, out=np.zeros_like(slope), where=squares > 1e-15)
    total = (weights @ y**2)[:, None] / n - mean_y**2
    return mean_y - slope * mean_e, -slope, np.maximum(total - slope**2 * squares, 0.0) * n


def _near_fronts(points: np.ndarray, weights: np.ndarray, tolerance: float) -> np.ndarray:
    """``near_front`` among the points of positive weight, for all resamples at once: [B, n] bool."""
    order = np.argsort(points[:, 0], kind="stable")
    x, y = points[order].T
    slack = tolerance + 1e-9
    present = np.where(weights[:, order] > 0, y, -np.inf)
    best = np.maximum.accumulate(present[:, ::-1], axis=1)[:, ::-1]  # largest y at this x or further right
    best = np.concatenate([best, np.full((len(best), 1), -np.inf)], 1)
    right = np.searchsorted(x, x + slack)
    end = np.where(present > -np.inf, x, -np.inf).max(1, keepdims=True)
    lowest = np.where(x == end, present, -np.inf).max(1, keepdims=True) - slack
    kept = np.empty(weights.shape, dtype=bool)
    kept[:, order] = (best[:, right] < y + slack) & (present >= lowest)
    return kept


def _band(points: np.ndarray, weights: np.ndarray, tolerance: float, curve: FrontCurve, grid: np.ndarray):
    weights = weights * _near_fronts(points, weights, tolerance)
    there = weights > 0
    x, y = points.T
    where = (x - curve.right) / curve.width
    curves = np.full((len(weights), len(grid)), np.nan)
    usable = np.array([len(np.unique(x[row].round(9))) >= 3 for row in there])
    level, drop, error = _exponentials(where, y, weights[usable], RATES)
    best = error.argmin(1)[:, None]
    level, drop = (np.take_along_axis(v, best, 1) for v in (level, drop))
    curves[usable] = level - drop * np.exp(RATES[best] * (grid - curve.right) / curve.width)
    reach = np.where(there, x, -np.inf).max(1)
    curves[grid[None] > reach[:, None] + 1e-12] = np.nan
    found = [percentiles(column, 0.95) or (None, None) for column in curves.T]
    return zip(*found, strict=True)
