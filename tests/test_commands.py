"""`evaluate` and `record` on the toy task."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import ToyPolicy, ToyTask
from toy_runs import BUDGET, run, summary

from robot_forgetting.engine.one_task import evaluate_command, record_command
from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_renderer")


def evaluate_again(path: Path, **options) -> RunFolder:
    arguments = {
        "policy": ToyPolicy(seed=1), "task": ToyTask(), "run_dir": path, "checkpoint": None, "config": {}, "names": {},
        "seed": 0, "episodes": 5, "seed_start": 20, "temperature": 1.0, "num_envs": 3, "budget": BUDGET,
    }  # fmt: skip
    assert evaluate_command(**arguments | options) == 0
    return RunFolder(path)


def test_evaluate_command(tmp_path):
    finished = run(tmp_path / "whole")
    base = evaluate_again(tmp_path / "base")
    assert {row["seed"] for row in base.episodes()} == set(range(20, 25)) and len(base.episodes()) == 10
    assert {row["split"] for row in base.episodes()} == {"train"} and base.finished
    assert [line["decode"] for line in summary(base)["success"]] == ["sampled", "greedy"]
    # A finished run's weights on its own test seeds give that run's rows again.
    tuned = evaluate_again(tmp_path / "tuned", checkpoint=str(finished.path), episodes=6, seed_start=None, num_envs=4)
    expected = {
        row["seed"]: (row["success"], row["steps"])
        for row in finished.episodes()
        if (row["stage"], row["task"], row["iteration"], row["decode"]) == (1, "reach", 4, "sampled")
    }
    found = {r["seed"]: (r["success"], r["steps"]) for r in tuned.episodes() if r["decode"] == "sampled"}
    assert found == expected


def test_evaluate_an_unfinished_run(tmp_path):
    with RunFolder.create(tmp_path / "empty", config={}):
        pass
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate_again(tmp_path / "out", checkpoint=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate_again(tmp_path / "out", checkpoint=str(tmp_path / "nowhere"))


def test_record_command(tmp_path, capfd):
    record_command(ToyPolicy(seed=1), ToyTask(crashes={1_000_001: 1}), None, tmp_path, 3, None, 1.0, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3 and names[0] == "reach-base-grid.mp4"
    assert names[1].startswith("reach-seed1000000-base-") and names[2].startswith("reach-seed1000002-base-")
    said = capfd.readouterr().err
    assert "seed 1000001: no video, RuntimeError: broke at step 1" in said and "of 2 succeeded" in said
    with pytest.raises(UserError, match="no episode could be recorded"):
        record_command(ToyPolicy(), ToyTask(crashes={1_000_000: 0}), None, tmp_path, 1, None, 1.0, 2)
