"""The forgetting law on points whose law is known: fits, intervals, held-out methods, and what is refused."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from robot_forgetting.errors import UserError
from robot_forgetting.metrics.law import (
    Points,
    band,
    fit,
    leave_one_method_out,
    predictor_rows,
    residual_rows,
    residuals,
    transfer,
)
from robot_forgetting.metrics.resampling import percentiles, run_weights

METHODS = ("sft", "oracle", "grpo")
KL, NOISE, CONSTANT = "forward_kl|new", "weight_l1|", "cka|prior"


def law(x):
    return 0.02 + 0.05 * x + 0.01 * x**2


def rows(*, seeds=(0,), methods=METHODS, runs=8, checkpoints=5, scatter=0.02, shift=(), start=0):
    generator = np.random.default_rng(start)
    found = []
    for seed in seeds:
        for method in methods:
            for run in range(runs):
                for _ in range(checkpoints):
                    x = generator.uniform(0, 4)
                    y = law(x) + scatter * generator.normal() + dict(shift).get(method, 0.0)
                    values = {KL: x, NOISE: generator.uniform(0, 9), CONSTANT: 1.0}
                    key = {"run": f"{method}-{run}", "method": method, "seed": seed}
                    found.append({**key, "forgetting": y, "predictors": values})
    return found


def test_exact_law_is_found():
    points = Points.from_rows(rows(scatter=0))
    found = fit(points, KL)
    assert found.coefficients == pytest.approx((0.02, 0.05, 0.01))
    assert found.r2 == pytest.approx(1)
    assert residuals(points, KL) == pytest.approx(np.zeros(120), abs=1e-12)
    row = predictor_rows(points, [KL], resamples=50)[0]
    assert (row["low"], row["high"], row["left_out_r2"], row["left_out_low"]) == pytest.approx((1, 1, 1, 1))


def test_rows_are_sorted_and_complete():
    table = predictor_rows(Points.from_rows(rows()), resamples=200)
    assert [(row["predictor"], row["inputs"]) for row in table] == [
        ("forward_kl", "new"),
        ("weight_l1", ""),
        ("cka", "prior"),
    ]
    good, noise, constant = table
    assert good["low"] < good["r2"] < good["high"] <= 1
    assert good["r2"] > 0.95 and good["left_out_r2"] > 0.95
    assert (good["n"], good["runs"], good["seeds"], good["over"], good["excluded"]) == (120, 24, 1, "runs", 0)
    assert good["note"] == "" and good["seed_mean"] is None
    assert noise["r2"] < 0.1 and noise["left_out_r2"] < 0.1
    assert constant["r2"] is constant["low"] is constant["left_out_r2"] is None
    assert "same at all points" in constant["note"]
    for row in table:
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in row.values())


def test_r2_of_a_resample_equals_the_plain_fit():
    """The vectorised bootstrap against one fit per resample, on the very same draws."""
    points = Points.from_rows(rows(scatter=0.1, seeds=(0, 1)))
    weights = run_weights(points.run_seeds, resamples=30, generator=np.random.default_rng(0))
    values, x, y = [], points.column(KL), points.forgetting
    for weight in weights:
        index = np.repeat(np.arange(len(x)), weight[points.run].astype(int))
        coefficients = np.polyfit(x[index], y[index], 2)
        error = y[index] - np.polyval(coefficients, x[index])
        values.append(1 - (error**2).sum() / ((y[index] - y[index].mean()) ** 2).sum())
    low, high = np.quantile(values, [0.025, 0.975])
    row = predictor_rows(points, [KL], resamples=30)[0]
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-9)
    assert row["over"] == "seeds and runs"
    values = []
    train = points.method != "grpo"
    for weight in weights:
        count = weight[points.run].astype(int)
        index, held = (np.repeat(np.arange(len(x)), count * side) for side in (train, ~train))
        error = y[held] - np.polyval(np.polyfit(x[index], y[index], 2), x[held])
        values.append(1 - (error**2).sum() / ((y[held] - y[held].mean()) ** 2).sum())
    found = transfer(points, KL, ["sft", "oracle"], ["grpo"], resamples=30)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-9)


def test_intervals_cover():
    """95 % intervals of R^2 hold the population's R^2 in most of 60 studies; much too narrow ones would not."""
    x = np.linspace(0, 4, 20001)
    truth = np.var(law(x)) / (np.var(law(x)) + 0.08**2)
    inside = 0
    for start in range(60):
        row = predictor_rows(Points.from_rows(rows(scatter=0.08, start=start)), [KL], resamples=200)[0]
        inside += row["low"] <= truth <= row["high"]
    assert inside >= stats.binom.ppf(0.001, 60, 0.9)


def test_dependent_checkpoints_widen_the_interval():
    def width(**options):
        points = Points.from_rows(rows(scatter=0.1, **options))
        row = predictor_rows(points, [KL], resamples=300)[0]
        return row["high"] - row["low"]

    assert width(runs=4, checkpoints=50) < width(runs=4, checkpoints=5)  # independent points do help
    table = rows(runs=4, checkpoints=5, scatter=0.1)
    copies = [row for row in table for _ in range(10)]  # ten copies of each checkpoint say nothing new
    one, ten = (predictor_rows(Points.from_rows(t), [KL], resamples=300)[0] for t in (table, copies))
    assert ten["high"] - ten["low"] == pytest.approx(one["high"] - one["low"])


def test_held_out_method_off_the_curve():
    points = Points.from_rows(rows(shift={"grpo": 0.5}))
    held = {row["held_out"]: row for row in leave_one_method_out(points, KL, resamples=100)}
    assert held["grpo"]["r2"] < 0  # its own mean predicts it better
    assert held["grpo"]["bias"] == pytest.approx(0.5, abs=0.02)
    assert held["grpo"]["root_mean_square"] == pytest.approx(0.5, abs=0.02)
    assert held["grpo"]["low"] < held["grpo"]["r2"] < held["grpo"]["high"]
    assert held["grpo"]["trained_on"] == ["oracle", "sft"]
    means = {row["method"]: row for row in residual_rows(points, KL)}
    assert means["grpo"]["mean"] > 0.2 and means["sft"]["mean"] < -0.1
    assert means["grpo"]["mean"] > 10 * means["grpo"]["standard_error"]
    assert sum(row["n"] * row["mean"] for row in means.values()) == pytest.approx(0, abs=1e-9)
    assert predictor_rows(points, [KL], resamples=20)[0]["left_out_r2"] < 0.2


def test_transfer_beyond_what_was_seen():
    table = rows(scatter=0.001)
    for row in table:
        if row["method"] == "grpo":
            row["predictors"] = {KL: row["predictors"][KL] + 4}
            row["forgetting"] = law(row["predictors"][KL])
    found = transfer(Points.from_rows(table), KL, ["sft"], ["grpo"], resamples=50)
    assert found["outside"] > 0.95
    assert found["r2"] > 0.99  # the law is exact, so here the guess is right


def test_band_holds_the_curve():
    points = Points.from_rows(rows(scatter=0.05))
    grid = np.linspace(0, 4, 9)
    low, high = band(points, KL, grid, resamples=300)
    assert (low < fit(points, KL)(grid)).all() and (fit(points, KL)(grid) < high).all()
    assert ((low < law(grid)) & (law(grid) < high)).mean() > 0.6
    assert high[4] - low[4] < high[8] - low[8]
    assert band(Points.from_rows(rows(methods=("sft",), runs=2)), KL, grid) is None
    assert band(points, CONSTANT, grid) is None


def test_seeds():
    points = Points.from_rows(rows(seeds=(0, 1, 2), scatter=0.05))
    row = predictor_rows(points, [KL], resamples=100)[0]
    single = [predictor_rows(Points.from_rows([r for r in rows(seeds=(0, 1, 2), scatter=0.05) if r["seed"] == s]), [KL])
              for s in range(3)]  # fmt: skip
    values = [found[0]["r2"] for found in single]
    assert row["seed_mean"] == pytest.approx(np.mean(values))
    assert row["seed_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert (row["runs"], row["seeds"]) == (72, 3)  # the same run name under another seed is another run


def test_points_that_are_not_finite_are_named():
    table = rows()
    table[0]["predictors"] = {KL: math.nan, NOISE: 1.0, CONSTANT: 1.0}
    table[1]["predictors"] = {KL: math.inf}
    table[5]["forgetting"] = None
    table[119]["predictors"] = {KL: None}
    row = predictor_rows(Points.from_rows(table), [KL], resamples=50)[0]
    assert (row["n"], row["excluded"], row["runs"]) == (116, 4, 24)
    assert row["note"] == "4 of 120 checkpoints left out, not finite: sft-0, sft-1, grpo-7"
    assert row["r2"] > 0.95 and row["low"] is not None
    assert np.isnan(residuals(Points.from_rows(table), KL)).sum() == 4


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"methods": ("sft",), "runs": 1, "checkpoints": 3}, "too few points for a fit: 3, needs 4"),
        ({"methods": ("sft",), "runs": 2}, "no interval: 2 runs, needs 3"),
        ({"methods": ("sft",)}, "one method only (sft)"),
        ({"methods": ("sft", "grpo"), "runs": 2, "checkpoints": 1}, "cannot leave sft out: too few points"),
    ],
)
def test_too_little_says_why(options, note):
    row = predictor_rows(Points.from_rows(rows(**options)), [KL], resamples=20)[0]
    assert note in row["note"]
    assert row["left_out_r2"] is None


def test_a_predictor_that_moved_in_two_runs_only():
    table = rows(runs=8, checkpoints=1)
    for i, row in enumerate(table):
        row["predictors"] = {KL: float(i) if i in (3, 9) else 0.0}
    row = predictor_rows(Points.from_rows(table), [KL], resamples=200)[0]
    assert row["r2"] is not None and row["low"] is None  # both runs are in 40 % of resamples
    assert "fewer than half of the resamples" in row["note"]


def test_similarities_that_hardly_vary():
    """CKA near 1: the values differ in the fifth digit only, which must neither warn nor be lost."""
    table = rows(scatter=0)
    for row in table:
        row["predictors"]["cka|new"] = 1 - 1e-5 * row["predictors"][KL]
        row["predictors"]["cka|prior"] = 1 - 1e-9 * row["predictors"][KL]
    points = Points.from_rows(table)
    found = {row["inputs"]: row for row in predictor_rows(points, ["cka|new", "cka|prior"], resamples=50)}
    assert found["new"]["r2"] == pytest.approx(1, abs=1e-9)
    assert found["new"]["low"] == pytest.approx(1, abs=1e-9)
    assert found["prior"]["r2"] is None


def test_the_same_forgetting_everywhere():
    table = rows()
    for row in table:
        row["forgetting"] = 0.25 if row["method"] == "grpo" else row["forgetting"]
    found = transfer(Points.from_rows(table), KL, ["sft", "oracle"], ["grpo"])
    assert found["r2"] is None and "nothing to explain" in found["note"] and found["bias"] is not None
    for row in table:
        row["forgetting"] = 0.25
    assert "nothing to explain" in predictor_rows(Points.from_rows(table), [KL])[0]["note"]
    found = transfer(Points.from_rows(table), KL, ["sft", "oracle"], ["grpo"])
    assert found["note"].startswith("no fit on oracle, sft: forgetting is the same")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Points.from_rows([]), "run a sweep first"),
        (lambda: Points.from_rows([{"run": "a", "method": "sft", "predictors": {}}]), "'a' lacks forgetting"),
        (
            lambda: Points.from_rows([{"run": "a", "method": "sft", "forgetting": math.nan, "predictors": {}}]),
            "no checkpoint has a finite forgetting",
        ),
        (lambda: fit(Points.from_rows(rows()), "kl"), "unknown predictor 'kl'"),
        (lambda: predictor_rows(Points.from_rows(rows()), ["kl"]), "unknown predictor 'kl'"),
        (lambda: transfer(Points.from_rows(rows()), KL, ["sft"], ["ppo"]), "unknown method 'ppo'"),
        (lambda: leave_one_method_out(Points.from_rows(rows(methods=("sft",))), KL), r"one method only \(sft\)"),
        (lambda: residuals(Points.from_rows(rows()), CONSTANT), "no residuals"),
    ],
)
def test_what_cannot_be_answered(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_whole_study_takes_seconds():
    generator = np.random.default_rng(0)
    names = [f"p{i}|new" for i in range(10)]
    table = rows(methods=("a", "b", "c", "d", "e"), runs=60, checkpoints=8)
    for row in table:
        row["predictors"] = dict(zip(names, generator.uniform(size=10), strict=True))
    points = Points.from_rows(table)
    start = time.process_time()
    assert len(predictor_rows(points, resamples=1000)) == 10 and len(points.run) == 2400
    assert time.process_time() - start < 3


def test_run_weights():
    generator = np.random.default_rng(0)
    weights = run_weights(["a", "a", "a", "b"], resamples=20000, generator=generator)
    assert set(np.unique(weights[:, 3])) == {0, 1, 2}  # the one run of b, as often as b is drawn
    assert (weights[:, :3].sum(1) == 3 * (2 - weights[:, 3])).all()
    assert weights.mean(0) == pytest.approx(np.ones(4), abs=0.03)
    one = run_weights([0] * 5, resamples=10, generator=generator)
    assert (one.sum(1) == 5).all() and one.std() > 0


def test_percentiles():
    assert percentiles(np.arange(101.0), 0.9) == pytest.approx((5, 95))
    assert percentiles(np.array([1.0, np.nan, 2.0]), 0.9) is not None
    assert percentiles(np.array([1.0, np.nan, np.inf]), 0.9) is None
