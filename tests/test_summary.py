"""summary.json from rows, by hand."""

from __future__ import annotations

import pytest

from robot_forgetting.metrics.statistics import paired_difference, wilson
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import summarise


def row(stage, iteration, task, role, seed, success, **more):
    return {
        "stage": stage,
        "iteration": iteration,
        "task": task,
        "role": role,
        "decode": "sampled",
        "episode": seed,
        "seed": seed,
        "success": success,
        "error": None,
    } | more


def test_summary_by_hand(tmp_path):
    with RunFolder.create(tmp_path / "a", config={}) as folder:
        folder.append("episodes", *(row(0, 0, "pick", "prior", seed, seed < 9) for seed in range(10)))
        folder.append("episodes", *(row(0, 0, "stack", "new", seed, seed < 2) for seed in range(10)))
        # 8 common seeds with the base (2..9), of which seed 9 failed before; seed 3 crashes now
        folder.append("episodes", *(row(1, 5, "pick", "prior", seed, True) for seed in range(2, 12) if seed != 3))
        folder.append("episodes", row(1, 5, "pick", "prior", 3, True, error="environment crashed"))
        folder.append("episodes", row(1, 5, "lift", "held_out", 0, True))
        folder.append("episodes", row(1, 5, "pick", "prior", 2, True), row(1, 5, "pick", "prior", 2, True))  # repeated
        for value in (1.0, 2.0):
            where = {"stage": 1, "iteration": 5, "task": "pick", "states": "base"}
            folder.append("divergence", {**where, "measure": "l2", "unit": "1/token", "value": value})
        summary = summarise(folder)

    success = {(r["stage"], r["task"]): r for r in summary["success"]}
    assert list(success) == [(0, "stack"), (0, "pick"), (1, "pick"), (1, "lift")]
    assert (success[0, "stack"]["rate"], success[0, "stack"]["low"], success[0, "stack"]["high"]) == (
        0.2,
        *wilson(2, 10),
    )
    assert (success[1, "pick"]["n"], success[1, "pick"]["successes"]) == (10, 9)

    (forgetting,) = summary["forgetting"]
    pair = paired_difference([True] * 7 + [False], [True, False] + [True] * 6)
    assert (forgetting["n"], forgetting["lost"], forgetting["gained"]) == (8, 1, 1)
    assert forgetting["base"] == forgetting["fine_tuned"] == 7 / 8
    assert forgetting["forgetting"] == 0
    assert forgetting["retention"] == 1
    assert (forgetting["low"], forgetting["high"]) == pytest.approx((pair.low, pair.high))

    assert [r["value"] for r in summary["divergence"]] == [2.0]
    assert [(r["seed"], r["error"]) for r in summary["errors"]] == [(3, "environment crashed")]


def test_empty_run(tmp_path):
    with RunFolder.create(tmp_path / "a", config={}) as folder:
        assert summarise(folder) == {
            "schema_version": 1,
            "success": [],
            "forgetting": [],
            "divergence": [],
            "errors": [],
            "no_signal": [],
            "cut": [],
        }
