"""Tables of a controlled study as plain rows, each beside what the paper and its replication report.

Nothing is estimated here that is not in ``robot_forgetting.metrics``; a number that cannot be had is None with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from robot_forgetting.metrics import published
from robot_forgetting.metrics.pareto import at_level, front, front_curve
from robot_forgetting.metrics.resampling import LEAST_RUNS, percentiles, run_weights
from robot_forgetting.metrics.statistics import bootstrap, clustered_mean
from robot_forgetting.studies.digits.study_law import MAIN, OTHER_RULES
from robot_forgetting.studies.digits.study_runs import Study, points_of

TWO_BY_TWO = ("grpo", "reinforce_1_0", "simpo", "sft_1")
SIMILARITY = ("cka|prior", "cknna_intersection|prior", "cknna_union|prior", "cka|new", "cknna_intersection|new")
RESAMPLES = 200  # of fronts, which are slow
LEVELS = (0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98)
WINDOW = 0.01  # new-task accuracy around the level at which similarities are averaged


def base_rows(study: Study) -> list[dict]:
    """Accuracy of the base policies, one each seed, beside the replication's."""
    rows = []
    for role in ("new", "prior"):
        of_seed = {point["seed"]: point[f"base_{role}"] for point in study.points}
        task = study.tasks.get(role, role)
        known = next((row["value"] for row in published.BASE_ACCURACY if row["task"] == task), None)
        values = list(of_seed.values())
        rows.append(
            {
                "task": task,
                "role": role,
                "mean": float(np.mean(values)) if values else None,
                "per_seed": [{"seed": seed, "rate": value} for seed, value in of_seed.items()],
                "paper": None,
                "replication": known,
            }
        )
    return rows


def success_rows(study: Study) -> list[dict]:
    """Per method the best new-task accuracy that a run ended with, and the prior-task accuracy there."""
    rows = []
    for method in study.methods:
        final = [point for point in study.of(method) if point["final"]]
        if not final:  # all its runs ended with a policy that is not finite; ``left_out`` names them
            continue
        best = max(final, key=lambda point: (point["new"], point["prior"]))
        row = {"method": method, "runs": len(final), "seeds": len({point["seed"] for point in final})}
        row |= {"checkpoints": len(study.of(method)), "run": best["run"], "new": best["new"], "prior": best["prior"]}
        rows.append(row | {"forgetting": best["forgetting"], "forward_kl": best["predictors"].get(MAIN)})
    return rows


def divergence_rows(study: Study) -> list[dict]:
    """Every measure of each run's last checkpoint."""
    return [
        {"run": point["run"], "method": point["method"], "seed": point["seed"], "measure": name, "inputs": role}
        | {"value": value, "new": point["new"], "prior": point["prior"]}
        for point in study.points
        if point["final"]
        for (name, _, role), value in ((key.partition("|"), value) for key, value in point["predictors"].items())
    ]


def front_rows(study: Study) -> list[dict]:
    """Per method the points within 2 points of its front, and the exponential through them with its band."""
    rows = []
    for method in study.methods:
        mine = study.of(method)
        pairs = [(point["new"], point["prior"]) for point in mine]
        curve = front_curve(pairs, [p["run"] for p in mine], [p["seed"] for p in mine])
        keys = ("run", "iteration", "new", "prior")
        rows.append(
            {
                "method": method,
                "checkpoints": len(mine),
                "runs": len({point["run"] for point in mine}),
                "kept": [{key: mine[i][key] for key in keys} for i in curve.kept],
                **{
                    key: getattr(curve, key) for key in ("n", "level", "drop", "rate", "right", "width", "over", "note")
                },
                "curve": [
                    {"new": x, "prior": y, "low": low, "high": high}
                    for x, y, low, high in zip(curve.x, curve.y, curve.low, curve.high, strict=True)
                ],
            }
        )
    return rows


# ---- at the same new-task accuracy


def common_level(study: Study, methods: Sequence[str]) -> float | None:
    """The largest whole percent of new-task accuracy that all the methods reach, above every base; None without one."""
    tops = [max((point["new"] for point in study.of(method)), default=0.0) for method in methods]
    if not tops or not all(tops):
        return None
    level = int(min(tops) * 100 + 1e-9) / 100
    base = max(point["base_new"] for method in methods for point in study.of(method))
    return level if level > base else None


def matched_rows(study: Study, methods: Sequence[str], level: float) -> list[dict]:
    """Per method at one new-task accuracy: prior-task accuracy on its front, least forward KL, similarities to base.

    The front is read by ``pareto.at_level``, over all runs of the method; the least KL is the front of (accuracy, -KL).
    Similarities are means over the checkpoints within 1 point of the level. Intervals: seeds and runs drawn, 95 %.
    """
    rows = []
    for method in methods:
        mine = study.of(method)
        prior = _at(mine, lambda p: p["prior"], level)
        nearest = _at(mine, lambda p: _minus(p["predictors"].get(MAIN)), level)
        near = [point for point in mine if abs(point["new"] - level) <= WINDOW + 1e-9]
        row = {"method": method, "level": level, "runs": len({point["run"] for point in mine})}
        row |= {"seeds": len({point["seed"] for point in mine}), "prior": prior[0], "low": prior[1], "high": prior[2]}
        row |= {"forward_kl": _minus(nearest[0]), "kl_low": _minus(nearest[2]), "kl_high": _minus(nearest[1])}
        row["near"] = len(near)
        row["similarity"] = {name: _clustered(near, name) for name in SIMILARITY}
        top = max((point["new"] for point in mine), default=None)
        row["note"] = ""
        if prior[0] is None:
            row["note"] = "no checkpoint" if top is None else f"reaches {100 * top:.1f} % only"
        elif prior[1] is None:
            row["note"] = f"no interval: needs {LEAST_RUNS} runs that reach the level"
        rows.append(row)
    return rows


def level_rows(study: Study, methods: Sequence[str]) -> list[dict]:
    """Prior-task accuracy on each method's front at round levels of new-task accuracy that two methods reach."""
    base = max((point["base_new"] for point in study.points), default=1.0)
    found = []
    for level in LEVELS:
        able = [m for m in methods if max(point["new"] for point in study.of(m)) >= level > base]
        for method in able if len(able) > 1 else ():
            value, low, high = _at(study.of(method), lambda p: p["prior"], level)
            found.append({"method": method, "level": level, "prior": value, "low": low, "high": high})
    return found


def _at(points: list[dict], value: Callable[[dict], float | None], level: float):
    """(value on the front at the level, low, high); None where there is none."""
    of_run: dict[tuple, list[tuple[float, float]]] = {}
    for point in points:
        if (y := value(point)) is not None:
            of_run.setdefault((point["run"], point["seed"]), []).append((point["new"], y))
    found = _reading([pair for pairs in of_run.values() for pair in pairs], level)
    reach = [key for key, pairs in of_run.items() if max(x for x, _ in pairs) >= level]
    if found is None or len(reach) < LEAST_RUNS:
        return found, None, None
    # A point that its own run beats is on no front.
    of_run = {key: [pairs[i] for i in front(pairs)] for key, pairs in of_run.items()}
    generator = np.random.default_rng(0)
    weights = run_weights([seed for _, seed in of_run], resamples=RESAMPLES, generator=generator)
    values = []
    for row in weights:
        drawn = [pair for pairs, w in zip(of_run.values(), row, strict=True) if w for pair in pairs]
        read = _reading(drawn, level)
        values.append(np.nan if read is None else read)
    low, high = percentiles(np.array(values), 0.95) or (None, None)
    return found, low, high


def _reading(pairs: Sequence[tuple[float, float]], level: float) -> float | None:
    """``at_level``; a method all of whose checkpoints are further on is read at its leftmost."""
    if not pairs:
        return None
    return at_level(pairs, max(level, min(x for x, _ in pairs)))


def _clustered(points: list[dict], name: str) -> dict | None:
    used = [point for point in points if point["predictors"].get(name) is not None]
    if not used:
        return None
    mean, error = clustered_mean([p["predictors"][name] for p in used], [p["run"] for p in used])
    return {"mean": mean, "standard_error": error, "n": len(used)}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


# ---- dynamics, precision, theorem


def dynamics_rows(study: Study) -> list[dict]:
    """Per method, or pooled: correlation over measured steps of |KL change| with each cosine.

    Spearman's rank correlation; its interval draws runs (at least 3).
    """
    runs = {run.id: _steps(run) for run in study.dynamics}
    groups = {"all": [steps for steps in runs.values() if steps]}
    for method in dict.fromkeys(run.method for run in study.dynamics):
        groups[method] = [runs[run.id] for run in study.dynamics if run.method == method and runs[run.id]]
    rows = []
    for name, members in groups.items():
        row = {"method": name, "runs": len(members), "n": sum(map(len, members))}
        for role in ("prior", "new"):
            value = _correlation(members, role)
            low, high = bootstrap(
                members, lambda drawn, role=role: _nan(_correlation(drawn, role)), resamples=RESAMPLES
            )
            row |= {f"{role}_correlation": value, f"{role}_low": low, f"{role}_high": high}
            if value is None:
                row[f"{role}_low"] = row[f"{role}_high"] = None
        rows.append(row)
    return rows


def _steps(run) -> list[dict]:
    keys = ("kl_change", "cosine_prior", "cosine_new")
    return [row for row in run.dynamics if all(row.get(key) is not None for key in keys)]


def _correlation(members: Sequence[Sequence[dict]], role: str) -> float | None:
    x, y = (np.array([row[key] for steps in members for row in steps]) for key in ("kl_change", f"cosine_{role}"))
    if len(x) < 3 or np.ptp(np.abs(x)) == 0 or np.ptp(y) == 0:
        return None
    from scipy.stats import spearmanr  # imported here: it takes a second

    return float(spearmanr(np.abs(x), y).statistic)


def _nan(value: float | None) -> float:
    return np.nan if value is None else value


def precision_rows(study: Study) -> list[dict]:
    """Per method and weight precision, at the end of training: unchanged weights by three rules, rank, accuracies."""
    rows = []
    for run in study.precision:
        points = points_at_end(run)
        if points is None:
            continue
        values = points["predictors"]
        row = {"method": run.method, "dtype": run.config.get("dtype") or "float32", "seed": run.seed}
        row |= {name: values.get(f"{name}|") for name in ("weight_sparsity", "weight_rank", *OTHER_RULES)}
        rows.append(row | {"new": points["new"], "prior": points["prior"]})
    return sorted(rows, key=lambda row: (row["method"], row["dtype"] != "float32"))


def points_at_end(run) -> dict | None:
    found = points_of(run, [])
    return found[-1] if found else None


def theorem_rows(study: Study) -> list[dict]:
    """Per process: largest difference of a probability from argmin KL(pi || pi_0) at its end, and the KL there."""
    last = {}
    for row in study.theorem:
        last[row["process"]] = row
    keys = ("process", "iteration", "distance", "success", "kl")
    return [{key: row.get(key) for key in keys} | {"arrives": _small(row.get("distance"))} for row in last.values()]


def _small(distance: float | None) -> bool:
    return distance is not None and distance < 1e-6
