"""Divergence on distributions known in closed form, test seeds, and rows of evaluated episodes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from toy import CELLS, CHOICES, ToyPolicy, ToyTask, picture
from toy_runs import DISTANCES

from robot_forgetting.engine.drift_rows import demonstration_states, policy_states
from robot_forgetting.engine.evaluate import (
    check_conventions,
    episode_row,
    evaluate,
    success_line,
)
from robot_forgetting.errors import UserError
from robot_forgetting.measure import States, measured
from robot_forgetting.policy import Action, ConventionSpec


def moved_policy() -> ToyPolicy:
    policy = ToyPolicy(seed=1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return policy


def repeated(walker: int, mark: int, count: int, episodes: int) -> States:
    """One state, ``count`` times, spread over episodes."""
    obs = {"image": np.stack([picture(walker, mark)] * count), "instruction": ["reach"] * count}
    return States(obs, np.arange(count) % episodes)


def joint(policy: ToyPolicy, walker: int, mark: int) -> np.ndarray:
    """[token 0, token 1] probabilities, written out from the tables."""
    table, bias = policy.table[0, walker * CELLS + mark].double(), policy.bias.double()
    first = (table[0] + bias).softmax(-1)
    second = torch.stack([(table[1] + bias + policy.coupling[k].double()).softmax(-1) for k in range(CHOICES)])
    return (first.unsqueeze(1) * second).detach().numpy()


def test_divergence_against_distributions_written_out():
    """The first token's terms are exact; the second's are averaged over the sampled first, hence the tolerance."""
    policy, states = moved_policy(), repeated(1, 2, 4000, 50)
    own = joint(policy, 1, 2)
    with policy.base():
        base = joint(policy, 1, 2)
    found = {(row["measure"], row["unit"]): row for row in measured(DISTANCES, policy, states)}
    assert set(found) == {
        ("forward_kl", "nats/token"), ("forward_kl", "nats/decision"), ("reverse_kl", "nats/token"),
        ("reverse_kl", "nats/decision"), ("total_variation", "1/token"), ("l2", "1/token"),
    }  # fmt: skip
    decision = {"forward_kl": entropy(base.ravel(), own.ravel()), "reverse_kl": entropy(own.ravel(), base.ravel())}
    for measure, exact in decision.items():
        row = found[measure, "nats/decision"]
        assert row["value"] == pytest.approx(exact, abs=4 * row["standard_error"] + 1e-6)
        assert 0 < row["standard_error"] < 0.05 * exact
        assert found[measure, "nats/token"]["value"] == pytest.approx(row["value"] / 2)
        assert row["n"] == 4000 and row["episodes"] == 50

    def mean_over_tokens(distance) -> float:
        """The first token's distance, and the second's in expectation over the base's first token."""
        p, q = base.sum(1), own.sum(1)
        later = sum(p[k] * distance(base[k] / p[k], own[k] / q[k]) for k in range(CHOICES))
        return (distance(p, q) + later) / 2

    for measure, distance in (
        ("total_variation", lambda p, q: np.abs(p - q).sum() / 2),
        ("l2", lambda p, q: math.sqrt(((p - q) ** 2).sum())),
    ):
        row = found[measure, "1/token"]
        assert row["value"] == pytest.approx(mean_over_tokens(distance), abs=4 * row["standard_error"] + 1e-6)


def test_no_divergence_from_itself():
    states = policy_states(ToyPolicy(seed=1), ToyTask(), range(10), num_envs=4, limit=100)
    for row in measured(DISTANCES, ToyPolicy(seed=1), states):
        assert row["value"] == pytest.approx(0, abs=1e-6) and row["standard_error"] == pytest.approx(0, abs=1e-6)


def test_divergence_repeats_itself_in_chunks_of_any_size():
    policy = moved_policy()
    states = policy_states(policy, ToyTask(), range(20), num_envs=4, limit=50)
    torch.manual_seed(0)
    whole = measured(DISTANCES, policy, states)
    torch.manual_seed(1)
    for rows in (7, 256):
        policy.most_rows = rows
        other = measured(DISTANCES, policy, states)
        for a, b in zip(whole, other, strict=True):
            assert a.keys() == b.keys()
            assert a["value"] == pytest.approx(b["value"], rel=1e-5)
    assert measured(DISTANCES, policy, replace(states, seed=1))[0]["value"] != whole[0]["value"]


def test_standard_errors_are_clustered_by_episode():
    """The same 40 values as 40 episodes, as 4 and as one: SE by the formula of CR1, and none from one episode."""
    policy = moved_policy()
    states = policy_states(policy, ToyTask(), range(30), num_envs=4, limit=40)

    def row(clusters: np.ndarray) -> dict:
        return measured(DISTANCES, policy, States(states.obs, clusters))[0]

    count = len(states)
    alone, four, one = row(np.arange(count)), row(np.arange(count) // 10), row(np.zeros(count, int))
    assert alone["value"] == four["value"] == one["value"] and one["standard_error"] is None
    assert (alone["episodes"], four["episodes"], one["episodes"]) == (count, 4, 1)
    # States that are all alike within a cluster: the error is that of the clusters' means, however often repeated.
    few = States({k: v[:3] for k, v in states.obs.items()}, np.arange(3))
    many = States({"image": few.obs["image"].repeat(5, 0), "instruction": ["reach"] * 15}, np.arange(3).repeat(5))
    first_token_only = ToyPolicy(seed=1)  # no randomness in the second token's terms: only token 0 moves
    with torch.no_grad():
        first_token_only.table[:, :, 0] += torch.randn(2, 16, CHOICES, generator=torch.Generator().manual_seed(2))
    a, b = (measured(DISTANCES, first_token_only, s)[0] for s in (few, many))
    assert a["value"] == pytest.approx(b["value"], rel=1e-5)
    assert a["standard_error"] == pytest.approx(b["standard_error"], rel=1e-4) and b["n"] == 15 and b["episodes"] == 3
    values = [entropy(*pair) for pair in first_token_pairs(first_token_only, few)]
    assert a["value"] == pytest.approx(np.mean(values) / 2, rel=1e-4)
    assert a["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3) / 2, rel=1e-4)


def first_token_pairs(policy: ToyPolicy, states: States) -> list[tuple]:
    action = Action(torch.zeros(len(states), 2, dtype=torch.int64), torch.ones(len(states), 2, dtype=torch.bool))
    own = policy.logits(states.obs, action)[:, 0].softmax(-1).detach().numpy()
    with policy.base():
        base = policy.logits(states.obs, action)[:, 0].softmax(-1).numpy()
    return list(zip(base, own, strict=True))


def test_masked_tokens_do_not_count():
    class Short(ToyPolicy):
        def act(self, obs, **options):
            action = super().act(obs, **options)
            action.mask[:, 1] = False
            return action

    policy = Short(seed=1)
    with torch.no_grad():
        policy.coupling += 5 * torch.eye(CHOICES)  # only the second token has moved
    for row in measured(DISTANCES, policy, repeated(1, 2, 8, 2)):
        assert row["value"] == pytest.approx(0, abs=1e-6)


# ---- states


def test_states_of_a_policy():
    policy, task = ToyPolicy(seed=1), ToyTask()
    episodes = sorted(evaluate(policy, task, range(5), temperature=1.0, num_envs=2), key=lambda e: e.key.seed)
    states = policy_states(policy, task, range(5), num_envs=2, limit=1000)
    assert len(states) == sum(e.steps for e in episodes) == len(states.obs["instruction"])
    assert states.episode.tolist() == [e.key.seed for e in episodes for _ in range(e.steps)]
    expected = np.stack([row["image"] for e in episodes for row in e.observations[:-1]])
    assert np.array_equal(states.obs["image"], expected)
    few = policy_states(policy, task, range(5), num_envs=3, limit=4)
    assert len(few) == 4 and few.episode[0] == states.episode[0] and few.episode[-1] == states.episode[-1]


def test_states_of_demonstrations():
    task = ToyTask()
    states = demonstration_states(task, 6, limit=1000)
    demonstrations = list(task.demonstrations(6, start=400_000))
    assert len(states) == sum(len(d.commands) for d in demonstrations)
    assert set(states.episode) == {d.seed for d in demonstrations} == set(range(400_000, 400_006))


# ---- evaluation


def test_evaluation_is_paired_and_complete():
    """The same seed is the same test for every policy: same initial state, same noise."""
    found = [
        {e.key.seed: (e.observations[0]["image"].tolist(), e.success, e.steps) for e in episodes}
        for episodes in (
            evaluate(ToyPolicy(seed=1), ToyTask(), range(40), temperature=1.0, num_envs=3),
            evaluate(ToyPolicy(seed=1), ToyTask(), range(39, -1, -1), temperature=1.0, num_envs=16),
        )
    ]
    assert found[0] == found[1] and len(found[0]) == 40


def test_episode_row():
    task = ToyTask(crashes={1_000_003: 1})
    rows = {
        episode.key.seed: episode_row(episode, stage=0, task="reach")
        for episode in evaluate(ToyPolicy(), task, range(1_000_000, 1_000_005), temperature=1.0, num_envs=2)
    }
    assert sorted(rows) == list(range(1_000_000, 1_000_005))
    broken = rows[1_000_003]
    assert broken["error"] == "RuntimeError: broke at step 1" and broken["success"] is False and broken["steps"] == 1
    keys = ["stage", "task", "seed", "success", "reward", "steps", "seconds", "flags", "error", "video", "source"]
    assert list(broken) == keys
    assert success_line("reach", [{"success": True}, {"success": False}]) == "reach: 1/2 = 0.50 [0.09, 0.91]"
    assert success_line("reach", []) == "reach: 0/0 = 0.00 [0.00, 1.00]"


@pytest.mark.parametrize(
    "episodes, start, expected",
    [
        (3, None, [10**6, 10**6 + 1, 10**6 + 2]),
        (2, 0, [0, 1]),
        (1, 1_999_999, [1_999_999]),
        (2, 999_998, [999_998, 999_999]),
    ],
)
def test_test_seeds(episodes, start, expected):
    assert ToyTask().evaluation_seeds(episodes, start) == expected


@pytest.mark.parametrize(
    "episodes, start, words",
    [
        (0, None, "episodes must be at least 1, not 0"),
        (-3, None, "at least 1"),
        (1, -1, "seed_start must not be negative: -1"),
        (2, 1_999_999, "test states 1000000 to 1999999"),
        (1_000_001, None, "test states 1000000 to 1999999"),
        (2, 999_999, "training states are 0 to 999999"),
    ],
)
def test_test_seeds_out_of_bounds(episodes, start, words):
    with pytest.raises(UserError, match=words):
        ToyTask().evaluation_seeds(episodes, start)


def test_train_and_test_seeds_never_meet():
    task = ToyTask()
    train, test = task.seeds("train"), task.seeds("test")
    assert train.stop <= test.start and len(train) == len(test) == 1_000_000
    with pytest.raises(UserError, match="unknown split 'validation'; choose one of: test, train"):
        task.seeds("validation")


# ---- conventions


def test_conventions_are_compared_field_by_field():
    with pytest.raises(UserError, match="'toy' and task 'mirror' disagree on image_size: 4 against 64"):
        check_conventions(ToyPolicy(), [ToyTask(), ToyTask("mirror", image_size=64)])
    check_conventions(ToyPolicy(image_size=None), [ToyTask(image_size=64)])  # None takes any
    mine = ConventionSpec(7, "delta", "euler_xyz", "+1 opens", 64, 20.0, "panda")
    assert mine.mismatches(mine) == [] and mine.mismatches(ConventionSpec()) == []
    assert mine.mismatches(ConventionSpec(6, "absolute", "axis_angle", "+1 closes", 32, 5.0, "widowx")) == [
        "action_dimensions: 7 against 6",
        "action_mode: 'delta' against 'absolute'",
        "rotation: 'euler_xyz' against 'axis_angle'",
        "gripper: '+1 opens' against '+1 closes'",
        "image_size: 64 against 32",
        "control_hz: 20.0 against 5.0",
        "statistics: 'panda' against 'widowx'",
    ]
