"""One-step tasks: all at once agrees with the rollout loop, labels, epochs, noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_labels import Sums

from robot_forgetting.errors import UserError
from robot_forgetting.method import mean_over_tokens
from robot_forgetting.methods.labels import FixedLabels, OracleLabels, TeacherLabels, WrongLabels, correct
from robot_forgetting.methods.on_policy import RolloutPlan, sample_rollouts
from robot_forgetting.one_step import Repeated, answer, repeated, uniforms
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.rollout import EpisodeKey, rollout
from robot_forgetting.tasks.digits.parity_mnist import parity_labels


def small(seed: int = 0, scale: float = 3.0) -> MLPPolicy:
    torch.manual_seed(seed)
    weights = {key: value * scale for key, value in MLPPolicy(sizes=(3, 8, 5, 4)).network().items()}
    return MLPPolicy(sizes=(3, 8, 5, 4), weights=weights)


def test_uniforms_are_even_and_depend_on_seed_and_stream_only():
    seeds, streams = np.repeat(np.arange(500), 100), np.tile(np.arange(100), 500)
    drawn = uniforms(seeds, streams)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert abs(counts - 2500).max() < 5 * np.sqrt(2500)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:-100], drawn[100:])[0, 1]) < 0.02
    assert drawn[205] == uniforms(np.array([2]), np.array([5]))[0]


@pytest.mark.parametrize("times", [1, 3])
def test_repeated_is_what_numpy_would_repeat(times):
    values = np.arange(8).reshape(4, 2)
    plain = values.repeat(times, 0)
    column = Repeated(values, times)
    assert len(column) == len(plain)
    assert np.array_equal(column[[0, len(plain) - 1, 1]], plain[[0, -1, 1]])
    assert np.array_equal(column[1:3], plain[1:3])
    assert column[0 : len(plain)] is column


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_at_once_agrees_with_the_rollout_loop(temperature):
    policy, task = small(), Sums()
    seeds, streams = np.arange(5), np.arange(15).reshape(5, 3) + 100
    at_once = answer(policy, task, seeds, streams, temperature=temperature)
    keys = [EpisodeKey(int(s), int(stream)) for s, row in zip(seeds, streams, strict=True) for stream in row]
    episodes = {e.key: e for e in rollout(policy, task, keys, num_envs=4, temperature=temperature)}
    loop = [episodes[key] for key in keys]
    assert at_once.action.tokens[:, 0].tolist() == [int(e.commands[0]) for e in loop]
    assert at_once.rewards.tolist() == [e.reward for e in loop] == [float(e.success) for e in loop]
    assert all(e.steps == 1 for e in loop)
    torch.testing.assert_close(at_once.action.log_prob, torch.cat([e.action().log_prob for e in loop]))


def test_rollouts_of_a_method_are_the_episodes_of_its_plan():
    policy, task, plan = small(), Sums(), RolloutPlan(groups=4, group_size=3, seed=5)
    rollouts = sample_rollouts(policy, task, plan, iteration=2)
    episodes = {e.key: e for e in rollout(policy, task, plan.keys(task, 2), num_envs=4)}
    assert rollouts.rewards.tolist() == [episodes[key].reward for key in plan.keys(task, 2)]
    assert len(rollouts.batch(rollouts.rewards)) == 12


def test_an_epoch_shows_every_item_once_in_an_order_of_its_own():
    task = Sums(items=12)
    first = np.concatenate([task.training_seeds(step, 5, seed=0) for step in (0, 1)])
    second = np.concatenate([task.training_seeds(step, 5, seed=0) for step in (2, 3)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 10  # 12 items: the last batch of 2 is dropped
    assert first.tolist() != second.tolist()
    assert first.tolist() != np.concatenate([task.training_seeds(step, 5, seed=1) for step in (0, 1)]).tolist()


def test_seeds_beyond_the_data_repeat_it():
    task = Sums(items=12)
    assert task.items(np.array([3, 15]))[1].tolist() == [3, 3]
    assert task.items(np.array([1_000_003]))[0] == "test"


def test_fixed_labels_choose_evenly_and_of_the_right_class():
    task, seeds = Sums(items=4000), np.arange(4000)
    labels = FixedLabels([[0, 2], [1], [0], [1, 3]]).label(None, task, seeds, 0).labels
    assert set(labels[0::4]) == {0, 2} and set(labels[1::4]) == {1} and set(labels[3::4]) == {1, 3}
    assert abs((labels[0::4] == 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(1000)
    assert (labels == FixedLabels([[0, 2], [1], [0], [1, 3]]).label(None, task, seeds, 0).labels).all()


def test_oracle_labels_follow_the_base_among_the_right_answers():
    task, policy = Sums(items=4), small()
    seeds = np.arange(4)
    found = OracleLabels(soft=True).label(policy, task, seeds, 0)
    with torch.no_grad():
        base = policy.activations(task.observations(seeds)["features"])[1].softmax(-1)
    right = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]).repeat(2, 1)
    expected = base * right / (base * right).sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities, expected)
    many = np.stack([OracleLabels().label(policy, task, seeds, stream).labels for stream in range(4000)])
    frequencies = np.stack([(many == label).mean(0) for label in range(4)], 1)
    assert abs(frequencies - expected.numpy()).max() < 5 * 0.5 / np.sqrt(4000)
    assert (frequencies[right.numpy() == 0] == 0).all()


def test_a_teachers_labels_are_its_own_answers():
    task, teacher = Sums(), small(seed=3, scale=40.0)  # nearly deterministic
    labels = TeacherLabels(teacher).label(small(), task, np.arange(12), 0).labels
    expected = teacher.activations(task.observations(np.arange(12))["features"])[1].argmax(-1)
    assert (labels == expected.numpy()).mean() > 0.8


def test_wrong_labels_are_wrong_and_all_of_them_occur():
    task = Sums(items=4000)
    labels = WrongLabels().label(None, task, np.arange(4000), 0).labels
    assert task.rewards(np.arange(4000), labels).sum() == 0
    assert set(labels[0::4]) == {1, 3}


def test_correct_lists_the_reward_of_every_answer():
    assert correct(Sums(), np.array([0, 1])).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("even, odd, says", [([1], [1], "even"), ([0], [], "odd"), ([0], [12], "odd")])
def test_parity_labels_of_the_wrong_parity_are_refused(even, odd, says):
    with pytest.raises(UserError, match=f"'{says}' must list"):
        parity_labels(even, odd)


def test_mean_over_tokens():
    values = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    mask = torch.tensor([[True], [True], [True], [False]])
    assert mean_over_tokens(values, mask).item() == pytest.approx(14 / 3)
    assert mean_over_tokens(values, mask, 0.5).item() == pytest.approx(14 / 2)
    assert mean_over_tokens(values, torch.zeros_like(mask)).item() == 0.0


def test_repeated_leaves_plain_columns_alone():
    obs = {"features": np.zeros((2, 3))}
    assert repeated(obs, 1) is obs
