"""Every method, with every penalty, on the toy task: it really learns, and a heavy penalty holds it."""

from __future__ import annotations

import math
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from toy import ToyPolicy, ToyTask, a_batch

from robot_forgetting import configs
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.engine.train import train
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.kl import KL
from robot_forgetting.records.run_folder import RunFolder

CONFIGS = Path(configs.__file__).parent
# simpo and sdft want questions (test_text_methods.py), on_policy_distillation a teacher (test_distillation.py)
ELSEWHERE = {"simpo", "sdft", "on_policy_distillation"}
METHODS = sorted({path.stem for path in (CONFIGS / "method").glob("*.yaml")} - ELSEWHERE)
PENALTIES = sorted(path.stem for path in (CONFIGS / "penalty").glob("*.yaml"))


def configured(group: str, name: str, *overrides: str):
    """What the command line would build for a group at budget=tiny."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"{group}={name}", "budget=tiny", *overrides])
    return hydra.utils.instantiate(config[group], _convert_="all") if config[group] else None


def success(policy, task, count=100) -> float:
    return np.mean(
        [e.success for e in evaluate(policy, task, range(10**6, 10**6 + count), temperature=1.0, num_envs=16)]
    )


def learn(tmp_path, made, policy=None, penalties=(), name="run", rate=None) -> tuple[ToyPolicy, list[dict]]:
    policy = policy or ToyPolicy()
    optimiser = made.optimiser if rate is None else Optimiser(learning_rate=rate)
    with RunFolder.create(tmp_path / name, config={}) as folder:
        train(policy, ToyTask(), made, optimiser=optimiser, run=folder, seed=0, penalties=penalties)
        return policy, folder.rows("train")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "self_sft"])  # gets no better than its successes
def test_every_method_learns_the_toy(tmp_path, name):
    """Sampled success from chance (about .4) to .9 and more, in seconds, with the settings of the methods' files except
    the learning rate (tables learn faster than networks) and label smoothing (three bins are too few for it)."""
    more = ["method.label_sigma=0"] if name == "sft" else []
    more += ["budget.demonstrations=40", "budget.rl_iterations=16", "budget.reinforce_iterations=64"]
    made = configured("method", name, "seed=1", *more)
    before = success(ToyPolicy(), ToyTask())
    policy, rows = learn(tmp_path, made, rate=0.1)
    after = success(policy, ToyTask())
    assert before < 0.6 and after > before + 0.35 and after >= 0.9, (before, after)
    if "rollout_success" in rows[-1]:
        assert rows[-1]["rollout_success"] > rows[0]["rollout_success"] + 0.3


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_every_penalty(tmp_path, name, penalty):
    rider = configured("penalty", penalty)
    assert (rider is None) == (penalty == "none")
    made = configured("method", name, "budget.rl_iterations=3", "budget.reinforce_iterations=3")
    start = ToyPolicy(seed=1)
    policy, rows = learn(tmp_path, made, ToyPolicy(seed=1), [] if rider is None else [rider], rate=0.05)
    assert [row["iteration"] for row in rows][-1] == made.iterations
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] >= 0 for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), policy.parameters(), strict=True))
    penalties = [row["penalty"] for row in rows]
    assert penalties[0] == pytest.approx(0, abs=1e-6)  # nothing has moved yet
    assert (max(penalties) > 1e-4) == (rider is not None)


@pytest.mark.parametrize("penalty", [name for name in PENALTIES if name != "none"])
@pytest.mark.parametrize("name", METHODS)
def test_a_heavy_penalty_holds_the_policy_at_its_base(tmp_path, name, penalty):
    made, moved = configured("method", name, "budget.rl_iterations=5", "budget.reinforce_iterations=5"), {}
    for coefficient in (0.0, 30.0):
        rider = configured("penalty", penalty, f"penalty.coefficient={coefficient}")
        policy, _ = learn(tmp_path, made, ToyPolicy(seed=1), [rider], name=str(coefficient), rate=0.02)
        batch = a_batch()
        moved[coefficient] = KL(coefficient=1.0)(policy, batch).item()
    assert moved[30.0] < moved[0.0] / 3
