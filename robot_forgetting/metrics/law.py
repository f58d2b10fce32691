"""The forgetting law: how well a quadratic of one predictor explains forgetting, over methods, runs and seeds.

RL's Razor fits forgetting on forward KL by a polynomial of degree 2, pooled over methods, and compares predictors by
R^2 (section 4, Table 1). Here every R^2 has a bootstrap interval that draws seeds and runs (all checkpoints of a run
together), and a stricter companion: R^2 on the points of a method that the fit has not seen, which may be negative.

What goes wrong with one predictor (constant, not finite, too few runs) is a note in its row, with None for the numbers:
the other rows stand. What makes every row impossible (no points, none with a finite forgetting, an unknown name) is a
UserError. Points that are not finite are left out and counted in ``excluded``, with their runs named in the note.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robot_forgetting.errors import UserError, unknown
from robot_forgetting.metrics.pareto import Fit, no_fit_reason, quadratic_fit
from robot_forgetting.metrics.resampling import LEAST_RUNS, percentiles, run_weights
from robot_forgetting.metrics.statistics import clustered_mean

RESAMPLES = 1000
DEGREE = 2
CONFIDENCE = 0.95
NO_INTERVAL = "no interval: fewer than half of the resamples can be fitted"


@dataclass(frozen=True)
class Points:
    """One point per checkpoint, as columns of length n; NaN where a value is missing.

    run: index of the point's run, 0 .. G-1; run_names, run_methods, run_seeds: [G]; predictors: {"name|inputs": [n]}
    """

    run: np.ndarray
    forgetting: np.ndarray
    predictors: Mapping[str, np.ndarray]
    run_names: tuple[str, ...]
    run_methods: tuple[str, ...]
    run_seeds: tuple

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping]) -> Points:
        """From a dict per checkpoint: {"run", "method", "seed", "forgetting", "predictors": {"name|inputs": value}}.

        forgetting: base minus fine-tuned success on the prior tasks, between -1 and 1. A run is known by its run,
        method and seed together. A seed may be missing (all points are then of one). None counts as missing.
        """
        rows = list(rows)
        if not rows:
            raise UserError("no checkpoint to fit a forgetting law to; run a sweep first")
        for row in rows:
            if missing := {"run", "method", "forgetting", "predictors"} - row.keys():
                raise UserError(f"a checkpoint of run {row.get('run')!r} lacks {', '.join(sorted(missing))}")
        keys = [(str(row["run"]), str(row["method"]), row.get("seed")) for row in rows]
        runs = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        names = dict.fromkeys(name for row in rows for name in row["predictors"])
        forgetting = _column(row["forgetting"] for row in rows)
        if not np.isfinite(forgetting).any():
            raise UserError(
                "no checkpoint has a finite forgetting; evaluate the prior tasks of base and fine-tuned policy"
            )
        predictors = {name: _column(row["predictors"].get(name) for row in rows) for name in names}
        return cls(np.array([runs[key] for key in keys]), forgetting, predictors, *zip(*runs, strict=True))

    @property
    def method(self) -> np.ndarray:
        """Method of each point, [n]."""
        return np.array(self.run_methods)[self.run]

    def column(self, predictor: str) -> np.ndarray:
        """Values of one predictor, [n]; UserError where there is no such predictor."""
        if predictor not in self.predictors:
            raise unknown("predictor", predictor, self.predictors)
        return self.predictors[predictor]

    def usable(self, predictor: str) -> np.ndarray:
        """Which points have a finite predictor and forgetting, [n] bool."""
        return np.isfinite(self.column(predictor)) & np.isfinite(self.forgetting)


def fit(points: Points, predictor: str) -> Fit:
    """The quadratic of forgetting on a predictor over all usable points; ``Fit.note`` says why there is none."""
    return quadratic_fit(points.column(predictor), points.forgetting)


def residuals(points: Points, predictor: str) -> np.ndarray:
    """Forgetting minus its fit, [n]; NaN where a point is not usable. UserError where there is no fit."""
    found = fit(points, predictor)
    if found.r2 is None:
        raise UserError(f"no residuals of forgetting on {predictor}: {found.note}")
    usable = points.usable(predictor)
    values = np.full(len(usable), np.nan)
    values[usable] = points.forgetting[usable] - found(points.column(predictor)[usable])
    return values


def residual_rows(points: Points, predictor: str) -> list[dict]:
    """Per method: {"method", "n", "runs", "mean", "standard_error", "root_mean_square"} of the residuals.

    Over all points the mean is 0 by construction; a method whose mean is far from 0 in standard errors (clustered by
    run; None with one run) does not lie on the common curve.
    """
    values, rows = residuals(points, predictor), []
    for method in dict.fromkeys(points.run_methods):
        mine = np.isfinite(values) & (points.method == method)
        if mine.any():
            mean, error = clustered_mean(values[mine], points.run[mine].tolist())
            root = float(np.sqrt((values[mine] ** 2).mean()))
            runs = len(np.unique(points.run[mine]))
            row = {"method": method, "n": int(mine.sum()), "runs": runs, "mean": mean, "standard_error": error}
            rows.append({**row, "root_mean_square": root})
    return rows


def band(
    points: Points, predictor: str, grid: Sequence[float], *, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pointwise percentile band (low, high) of the fitted curve at ``grid``; None with fewer than 3 runs or no fit."""
    drawn = _Resampled.draw(points, predictor, resamples)
    if drawn is None or fit(points, predictor).r2 is None:
        return None
    curves = drawn.solve() @ drawn.basis(np.asarray(grid, dtype=float)).T
    curves = curves[np.isfinite(curves).all(1)]
    if 2 * len(curves) < resamples:
        return None
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def transfer(
    points: Points,
    predictor: str,
    trained_on: Collection[str],
    tested_on: Collection[str],
    *,
    resamples: int = RESAMPLES,
) -> dict:
    """Does a law fitted on some methods predict others? One row: R^2 of the prediction on the methods tested.

    R^2 = 1 - sum (y - prediction)^2 / sum (y - mean of y)^2 over the points tested: negative where their own mean would
    predict better. root_mean_square and bias (mean of y minus prediction) are in units of forgetting; outside: share
    of tested points beyond the range of the predictor that the fit has seen, where a quadratic is a guess.
    """
    for method in {*trained_on, *tested_on}:
        if method not in points.run_methods:
            raise unknown("method", method, points.run_methods)
    usable, method = points.usable(predictor), points.method
    train, test = usable & np.isin(method, list(trained_on)), usable & np.isin(method, list(tested_on))
    row = {**_names(predictor), "trained_on": sorted(trained_on), "tested_on": sorted(tested_on), "r2": None}
    row |= {"low": None, "high": None, "root_mean_square": None, "bias": None, "outside": None}
    row |= {"n": int(test.sum()), "runs": len(np.unique(points.run[test])), "note": ""}
    x, y = points.column(predictor), points.forgetting
    if reason := no_fit_reason(x[train], y[train]):
        return row | {"note": f"no fit on {', '.join(sorted(trained_on))}: {reason}"}
    if not test.any():
        return row | {"note": "no usable point to test on"}
    error = y[test] - quadratic_fit(x[train], y[train])(x[test])
    row |= {
        "root_mean_square": float(np.sqrt((error**2).mean())),
        "bias": float(error.mean()),
        "outside": float(((x[test] < x[train].min()) | (x[test] > x[train].max())).mean()),
    }
    if np.ptp(y[test]) == 0:
        return row | {"note": "forgetting is the same at all points tested; R^2 has nothing to explain"}
    row["r2"] = float(1 - (error**2).sum() / ((y[test] - y[test].mean()) ** 2).sum())
    drawn = _Resampled.draw(points, predictor, resamples)
    if drawn is None or row["runs"] < LEAST_RUNS:
        return row | {"note": _too_few(row["runs"])}
    of_run = np.array(points.run_methods)
    seen, asked = np.isin(of_run, list(trained_on)), np.isin(of_run, list(tested_on))
    square, spread = drawn.errors(drawn.solve(seen), asked)
    row |= _interval(_ratio(square, spread))
    return row | ({"note": NO_INTERVAL} if row["low"] is None else {})


def leave_one_method_out(points: Points, predictor: str, *, resamples: int = RESAMPLES) -> list[dict]:
    """``transfer`` from all other methods to each method in turn, with the method as "held_out"."""
    methods = list(dict.fromkeys(points.run_methods))
    if len(methods) < 2:
        raise UserError(f"one method only ({methods[0]}): leaving it out leaves nothing; add runs of another method")
    return [
        {
            "held_out": held,
            **transfer(points, predictor, [m for m in methods if m != held], [held], resamples=resamples),
        }
        for held in methods
    ]


def predictor_rows(
    points: Points, predictors: Sequence[str] | None = None, *, resamples: int = RESAMPLES
) -> list[dict]:
    """One row per predictor (all by default), the best R^2 first and those without a fit last.

    {"predictor", "inputs", "r2", "low", "high", "n", "runs", "seeds", "over", "left_out_r2", "left_out_low",
    "left_out_high", "seed_mean", "seed_deviation", "coefficients", "excluded", "note"}

    left_out_r2: R^2 over all points when each is predicted by the fit to all other methods. seed_mean, seed_deviation:
    mean and standard deviation of R^2 over fits to one seed each; None with one seed. over: what was drawn for the
    intervals, "runs" or "seeds and runs". All predictors see the same draws, so that their intervals can be compared.
    """
    weights = _weights(points, resamples)
    rows = [_row(points, name, weights) for name in predictors or points.predictors]
    return sorted(rows, key=lambda row: (row["r2"] is None, -(row["r2"] or 0.0)))


def _row(points: Points, predictor: str, weights: np.ndarray | None) -> dict:
    usable = points.usable(predictor)
    found, runs = fit(points, predictor), np.unique(points.run[usable])
    notes = [found.note] if found.note else []
    if excluded := int((~usable).sum()):
        odd = dict.fromkeys(points.run_names[run] for run in points.run[~usable])
        named = ", ".join(list(odd)[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        notes.append(f"{excluded} of {len(usable)} checkpoints left out, not finite: {named}")
    seeds = dict.fromkeys(points.run_seeds[run] for run in runs)
    row = {**_names(predictor), "r2": found.r2, "low": None, "high": None, "n": found.n, "runs": len(runs)}
    row |= {"seeds": len(seeds), "over": None, "left_out_r2": None, "left_out_low": None, "left_out_high": None}
    row |= {"seed_mean": None, "seed_deviation": None, "coefficients": found.coefficients, "excluded": excluded}
    if found.r2 is not None:
        row |= _over_seeds(points, predictor, list(seeds))
        if weights is None or len(runs) < LEAST_RUNS:
            notes.append(_too_few(len(runs)))
            drawn = None
        else:
            drawn = _Resampled(points, predictor, weights)
            row |= _interval(_ratio(*drawn.errors(drawn.solve())))
            row["over"] = "seeds and runs" if len(set(points.run_seeds)) > 1 else "runs"
            notes += [NO_INTERVAL] if row["low"] is None else []
        left_out, note = _left_out(points, predictor, drawn)
        row |= left_out
        notes += [note] if note else []
    return {**row, "note": "; ".join(notes)}


def _left_out(points: Points, predictor: str, drawn: _Resampled | None) -> tuple[dict, str]:
    usable, x, y, method = points.usable(predictor), points.column(predictor), points.forgetting, points.method
    methods = [m for m in dict.fromkeys(points.run_methods) if (usable & (method == m)).any()]
    if len(methods) < 2:
        return {}, f"one method only ({methods[0]}), so none can be left out"
    square = 0.0
    for held in methods:
        train, test = usable & (method != held), usable & (method == held)
        if reason := no_fit_reason(x[train], y[train]):
            return {}, f"cannot leave {held} out: {reason}"
        square += float(((y[test] - quadratic_fit(x[train], y[train])(x[test])) ** 2).sum())
    spread = float(((y[usable] - y[usable].mean()) ** 2).sum())
    found: dict = {"left_out_r2": 1 - square / spread}
    if drawn is not None:
        of_run = np.array(points.run_methods)
        squares = sum(drawn.errors(drawn.solve(of_run != held), of_run == held)[0] for held in methods)
        interval = _interval(_ratio(squares, drawn.spread()))
        found |= {f"left_out_{side}": value for side, value in interval.items()}
    return found, ""


def _over_seeds(points: Points, predictor: str, seeds: list) -> dict:
    if len(seeds) < 2:
        return {}
    of_point = np.array([seeds.index(s) if s in seeds else -1 for s in points.run_seeds])[points.run]
    x, y = points.column(predictor), points.forgetting
    found = [quadratic_fit(x[of_point == i], y[of_point == i]).r2 for i in range(len(seeds))]
    if None in found:
        return {}
    return {"seed_mean": float(np.mean(found)), "seed_deviation": float(np.std(found, ddof=1))}


class _Resampled:
    """Weighted least squares for all resamples at once, from sums over the points of each run.

    A fit needs only sum u^i (i <= 4), sum u^i y (i <= 2), sum y, sum y^2 and n, where u is the predictor scaled to
    [-1, 1] and y is centred; a resample's sums are its run counts times the runs' sums.
    """

    def __init__(self, points: Points, predictor: str, weights: np.ndarray):
        usable = points.usable(predictor)
        x, y, run = points.column(predictor)[usable], points.forgetting[usable], points.run[usable]
        self.middle, self.half = (x.max() + x.min()) / 2, np.ptp(x) / 2
        self.offset = y.mean()
        phi, y = self._powers(x), y - self.offset
        columns = [phi[:, i] * phi[:, j] for i in range(DEGREE + 1) for j in range(DEGREE + 1)]
        columns += [phi[:, i] * y for i in range(DEGREE + 1)] + [y, y * y, np.ones_like(y)]
        self.sums = np.zeros((weights.shape[1], len(columns)))
        np.add.at(self.sums, run, np.stack(columns, 1))
        self.weights = weights

    @classmethod
    def draw(cls, points: Points, predictor: str, resamples: int) -> _Resampled | None:
        usable = points.usable(predictor)
        weights = _weights(points, resamples)
        if (
            weights is None
            or len(np.unique(points.run[usable])) < LEAST_RUNS
            or np.ptp(points.column(predictor)[usable]) == 0
        ):
            return None
        return cls(points, predictor, weights)

    def _powers(self, x: np.ndarray) -> np.ndarray:
        return ((x - self.middle) / self.half)[:, None] ** np.arange(DEGREE + 1)

    def basis(self, x: np.ndarray) -> np.ndarray:
        """[K, 4]: what ``solve``'s coefficients multiply; the last is forgetting's offset."""
        return np.concatenate([self._powers(x), np.full((len(x), 1), self.offset)], 1)

    def _parts(self, runs: np.ndarray | None):
        sums = self.weights @ self.sums if runs is None else self.weights[:, runs] @ self.sums[runs]
        size = DEGREE + 1
        square, slope = sums[:, : size * size].reshape(-1, size, size), sums[:, size * size : size * size + size]
        return square, slope, *sums[:, -3:].T

    def solve(self, runs: np.ndarray | None = None) -> np.ndarray:
        """Coefficients [B, 4] of the fit to some runs; NaN where a resample has too few distinct points."""
        square, slope, _, _, n = self._parts(runs)
        good = (n >= 4) & (np.linalg.cond(square + (n == 0)[:, None, None] * np.eye(DEGREE + 1)) < 1e12)
        found = np.full((len(square), DEGREE + 2), np.nan)
        found[good, :-1] = np.linalg.solve(square[good], slope[good][:, :, None])[:, :, 0]
        found[good, -1] = 1.0
        return found

    def errors(self, coefficients: np.ndarray, runs: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sums of squared errors of a prediction of some runs, and of squares about their own mean, each [B]."""
        square, slope, total, squares, n = self._parts(runs)
        c = coefficients[:, :-1]
        error = squares - 2 * (c * slope).sum(1) + np.einsum("bi,bij,bj->b", c, square, c)
        return np.maximum(error, 0.0), np.maximum(squares - total**2 / np.maximum(n, 1), 0.0)

    def spread(self) -> np.ndarray:
        """Sum of squares of forgetting about its mean, all runs, [B]."""
        _, _, total, squares, n = self._parts(None)
        return squares - total**2 / np.maximum(n, 1)


def _weights(points: Points, resamples: int) -> np.ndarray | None:
    if len(points.run_names) < LEAST_RUNS:
        return None
    return run_weights(points.run_seeds, resamples=resamples, generator=np.random.default_rng(0))


def _ratio(error: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return 1 - np.divide(error, spread, out=np.full_like(error, np.nan), where=spread > 1e-12)


def _interval(values: np.ndarray) -> dict:
    low, high = percentiles(values, CONFIDENCE) or (None, None)
    return {"low": low, "high": high}


def _too_few(runs: int) -> str:
    return f"no interval: {runs} run{'' if runs == 1 else 's'}, needs {LEAST_RUNS}"


def _names(predictor: str) -> dict[str, str]:
    name, _, inputs = predictor.partition("|")
    return {"predictor": name, "inputs": inputs}


def _column(values: Iterable) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in values])
