"""A whole run on the toy tasks, as the tests of experiments and commands make it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from toy import ToyPolicy, ToyTask

from robot_forgetting.engine import experiment
from robot_forgetting.engine.experiment import Setup
from robot_forgetting.measure import TEXT, WEIGHTS, States, measured
from robot_forgetting.measures.distributions import L2, ForwardKL, ReverseKL, TotalVariation
from robot_forgetting.measures.layer_states import CKA, CKNNA, ActivationL2
from robot_forgetting.measures.weights import RelativeL2
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.sft import SFT
from robot_forgetting.records.run_folder import RunFolder

DISTANCES = [ForwardKL(), TotalVariation(), L2(), ReverseKL()]
LAYERS = [CKA(), CKNNA("intersection", k=3), CKNNA("union", k=3), ActivationL2(), RelativeL2()]
BUDGET = {
    "episodes": 6, "greedy_episodes": 3, "interim_points": 1, "interim_episodes": 3, "divergence_episodes": 3,
    "divergence_states": 12, "videos": 0,
}  # fmt: skip


def run(path: Path, method: str = "grpo", *, policy=None, task=None, budget=(), penalty=None, **options) -> RunFolder:
    optimiser, made = Optimiser(learning_rate=0.05), options.pop("made", None)
    if method == "grpo":
        made = made or GRPO(iterations=4, groups=6, group_size=4, optimiser=optimiser, minibatch_size=40, seed=0)
    else:
        made = SFT(iterations=4, steps_per_iteration=2, batch_size=8, demonstrations=5, optimiser=optimiser)
    arguments = {
        "policy": policy or ToyPolicy(seed=1), "sequence": [task or ToyTask()], "method": made, "penalty": penalty,
        "prior": [ToyTask("mirror")], "held_out": [], "budget": BUDGET | dict(budget),
        "names": {"policy": "toy", "method": method, "penalty": "none"}, "config": {"method": method},
        "run_dir": path, "seed": 0, "temperature": 1.0, "episodes": None, "seed_start": None, "num_envs": 4,
        "processes": 1, "measures": DISTANCES,
    }  # fmt: skip
    assert experiment.run(Setup(**arguments | options)) == 0
    return RunFolder(path)


def by_layer(policy, texts: list[str]) -> list[dict]:
    """Rows of ``LAYERS`` on texts, and of the weights."""
    states = [States({"text": texts}, np.arange(len(texts)), TEXT), States(name=WEIGHTS)]
    return [row for each in states for row in measured(LAYERS, policy, each)]


def summary(folder: RunFolder) -> dict:
    return json.loads((folder.path / "summary.json").read_text())


def rows(folder: RunFolder, table: str) -> list[str]:
    """Rows without durations, in a fixed order (episodes end in any order)."""
    return sorted(
        json.dumps({key: value for key, value in row.items() if "seconds" not in key}) for row in folder.rows(table)
    )


def same(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.status == "finished" and summary(folder) == summary(expected)
    for table in ("episodes", "train", "divergence"):
        assert rows(folder, table) == rows(expected, table)


def sources(folder: RunFolder) -> set:
    return {row["source"] for row in folder.episodes() if row["stage"] == 0}
