"""Losses, advantages and penalties against values by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from toy import CHOICES, ToyPolicy, ToyTask, a_batch

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch
from robot_forgetting.methods.distillation import OnPolicyDistillation
from robot_forgetting.methods.grpo import GRPO, group_advantages
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.on_policy import RolloutPlan, Rollouts, minibatches, sample_rollouts
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT, encode_demonstrations, smoothed_nll, take
from robot_forgetting.policy import Action
from robot_forgetting.rollout import Episode, EpisodeKey

# ---- SFT


def test_smoothed_nll_against_a_written_out_gaussian():
    logits = torch.tensor([[[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 0.0, -2.0]]], dtype=torch.float64)
    tokens, sigma = torch.tensor([[1, 3]]), 0.7
    for position, token in enumerate([1, 3]):
        row = logits[0, position].numpy()
        log_p = row - math.log(sum(math.exp(value) for value in row))
        weights = [math.exp(-((bin - token) ** 2) / (2 * sigma**2)) for bin in range(4)]
        expected = -sum(weight / sum(weights) * value for weight, value in zip(weights, log_p, strict=True))
        assert smoothed_nll(logits, tokens, sigma)[0, position].item() == pytest.approx(expected, rel=1e-6)
        assert smoothed_nll(logits, tokens, 0)[0, position].item() == pytest.approx(-log_p[token])


def test_sft_loss_counts_unmasked_tokens_only():
    policy, batch = ToyPolicy(seed=1), a_batch()
    mask = torch.ones_like(batch.action.mask)
    mask[:, 1] = False
    masked = Batch(batch.obs, Action(batch.action.tokens, mask))
    sft = SFT(iterations=1, steps_per_iteration=1, batch_size=1, demonstrations=1, optimiser=None)
    expected = -policy.log_prob(batch.obs, batch.action)[:, 0].mean()
    assert sft.loss(policy, masked).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sft_data_are_the_experts_and_belong_to_the_seed():
    task, policy = ToyTask(), ToyPolicy()
    data = {}
    for seed in (0, 1):
        sft = SFT(iterations=1, steps_per_iteration=2, batch_size=5, demonstrations=20, optimiser=None, seed=seed)
        sft.begin(policy, task, [])
        first, second = sft.collect(policy, task, 3)
        assert len(first) == len(second) == 5 and sft.collect(policy, task, 3)[0].action.tokens.equal(
            first.action.tokens
        )
        assert not np.array_equal(sft.collect(policy, task, 4)[0].obs["image"], first.obs["image"])
        assert (first.action.tokens[:, 1] == 2).all()  # the toy's expert always says "right" there
        data[seed] = sft._data.obs["image"]
    assert data[0].shape != data[1].shape or not np.array_equal(data[0], data[1])


@pytest.mark.parametrize("seed", [0, 39, 40, 99, 100, 12345])
def test_every_seed_has_demonstrations_apart_from_rollouts_and_measurement(seed):
    """RL starts in the second half of the training seeds; divergence is measured on states from 400,000 on."""
    seen = []

    class Listening(ToyTask):
        def demonstrations(self, count, *, split="train", start=0):
            seen.extend([split, start, start + count])
            return super().demonstrations(count, split=split, start=start)

    SFT(iterations=1, steps_per_iteration=1, batch_size=1, demonstrations=600, optimiser=None, seed=seed).begin(
        ToyPolicy(), Listening(), []
    )
    split, start, end = seen
    assert split == "train" and 0 <= start < end <= 400_000


def test_no_demonstrations_no_sft():
    class Silent(ToyTask):
        def demonstrations(self, count, **options):
            return []

    with pytest.raises(UserError, match="no demonstrations"):
        encode_demonstrations(ToyPolicy(), Silent(), Silent().demonstrations(3))


def test_take_keeps_rows_together():
    batch = a_batch()
    batch = Batch(batch.obs, batch.action, torch.arange(len(batch)), {"x": torch.arange(len(batch)) * 10})
    some = take(batch, torch.tensor([3, 0, 3]))
    assert some.advantage.tolist() == [3, 0, 3] and some.extra["x"].tolist() == [30, 0, 30]
    assert np.array_equal(some.obs["image"], batch.obs["image"][[3, 0, 3]])
    assert some.obs["instruction"] == [batch.obs["instruction"][i] for i in (3, 0, 3)]
    part = batch[1:3]
    assert len(part) == 2 and part.extra["x"].tolist() == [10, 20] and len(part.obs["instruction"]) == 2


# ---- advantages


@pytest.mark.parametrize(
    "rewards, scaled, expected",
    [
        ([1, 0, 0, 1], True, [1, -1, -1, 1]),
        ([1, 0, 0, 1], False, [0.5, -0.5, -0.5, 0.5]),
        ([1, 0, 0, 0], False, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], True, [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ([1, 1, 1, 1], True, [0, 0, 0, 0]),
        ([0, 0, 0, 0], True, [0, 0, 0, 0]),
        ([1, 1, 1, 1, 0, 1, 0, 1], True, [0, 0, 0, 0, -1, 1, -1, 1]),
    ],
)
def test_group_advantages(rewards, scaled, expected):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float32), torch.arange(len(rewards)) // 4, scaled)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_group_advantages_where_episodes_are_missing():
    """As if the group had been smaller; one that is left alone teaches nothing."""
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 1])
    found = group_advantages(rewards, torch.tensor([0, 0, 0, 2, 3, 3, 3]), False)
    assert found.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 1 / 3, -2 / 3, 1 / 3])
    assert group_advantages(rewards, torch.tensor([0, 0, 0, 2, 3, 3, 3]), True)[3] == 0


class Crashing(ToyTask):
    """Breaks off every episode of a training state that the first iteration meets and ``broken`` chooses."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def make_env(self, num_envs, *, render=False):
        task, env = self, super().make_env(num_envs, render=render)

        class Env(type(env)):
            def _answer(self, slot):
                found = super()._answer(slot)
                task.count += found.done
                if found.done and task.broken(task.count):
                    return dataclasses.replace(found, success=False, reward=0.0, error="RuntimeError: broke")
                return found

        env.__class__, task.count = Env, 0
        return env


@pytest.mark.parametrize("kind", ["grpo", "reinforce", "iterative", "distillation"])
def test_crashed_episodes_teach_nothing(kind):
    arguments = {"iterations": 1, "optimiser": None, "num_envs": 4}
    made = {
        "grpo": lambda: GRPO(groups=6, group_size=4, **arguments),
        "reinforce": lambda: Reinforce(groups=6, group_size=4, **arguments),
        "iterative": lambda: SelfSFT(
            states=6, samples=4, iterative=True, steps_per_iteration=1, batch_size=50, **arguments
        ),
        "distillation": lambda: OnPolicyDistillation(groups=6, group_size=4, teacher=ToyPolicy(seed=2), **arguments),
    }[kind]
    trained = []
    for broken in (lambda count: count % 3 == 0, lambda count: False):
        task, method, policy = Crashing(broken), made(), ToyPolicy(seed=1)
        method.begin(policy, task, [])
        batches = method.collect(policy, task, 0)
        trained.append((batches, method.metrics()))
    (less, some), (all_of_them, none) = trained
    assert some["episodes"] == none["episodes"] == 24 and some["errors"] == 8 and none["errors"] == 0
    rows = [sum(len(batch) for batch in batches) for batches in (less, all_of_them)]
    assert rows[0] < rows[1] or kind == "iterative"
    if kind in ("grpo", "reinforce"):  # statistics are those of the 16: without the crashed, advantages sum to 0
        rollouts = sample_rollouts(ToyPolicy(seed=1), Crashing(lambda count: count % 3 == 0), method.plan, 0)
        assert len(rollouts.rewards) == 16 and some["rollout_success"] == rollouts.rewards.mean().item()
        sums = [group_advantages(rollouts.rewards, rollouts.state, True)[rollouts.state == s].sum() for s in range(6)]
        assert torch.stack(sums).abs().max() < 1e-5
    with pytest.raises(UserError, match="every episode of iteration 1 on task 'reach' was broken off .*broke"):
        made_all = made()
        made_all.begin(ToyPolicy(seed=1), task, [])
        made_all.collect(ToyPolicy(seed=1), Crashing(lambda count: True), 0)


def an_episode(seed: int, steps: int, won: bool) -> Episode:
    row = {"image": np.full((4, 4, 3), seed, np.uint8), "instruction": "reach"}
    one = Action(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-0.5, -0.7]]))
    return Episode(EpisodeKey(seed), success=won, observations=[row] * (steps + 1), actions=[one] * steps)


def test_an_instruction_may_change_within_an_episode():
    episode = an_episode(0, 2, True)
    episode.observations[2:] = [{**episode.observations[2], "instruction": "put"}]
    assert episode.instructions("move") == ["reach", "reach", "put"]
    episode.observations[:2] = [{"image": row["image"]} for row in episode.observations[:2]]
    assert episode.instructions("move") == ["move", "move", "put"]


def test_episodes_without_signal_are_dropped():
    rollouts = Rollouts(
        [an_episode(seed, steps, won) for seed, steps, won in ((0, 2, True), (1, 3, False), (2, 1, True))]
    )
    assert rollouts.rewards.tolist() == [1, 0, 1] and rollouts.lengths.tolist() == [2, 3, 1]
    batch = rollouts.batch(torch.tensor([0.5, 0.0, -1.0]))
    assert batch.advantage.tolist() == [0.5, 0.5, -1.0]
    assert batch.obs["image"][:, 0, 0, 0].tolist() == [0, 0, 2] and len(batch.obs["instruction"]) == 3
    assert rollouts.batch(torch.zeros(3)) is None and minibatches(None, size=2, epochs=3, seed=[0]) == []
    never_began = Rollouts([an_episode(0, 0, False)])
    assert never_began.batch(torch.tensor([-1.0])) is None
    assert rollouts.metrics() == {"rollout_success": pytest.approx(2 / 3), "episodes": 3, "env_steps": 6, "errors": 0}


@pytest.mark.parametrize("size, epochs, sizes", [(4, 1, [4, 3, 3]), (100, 2, [10, 10]), (10, 1, [10])])
def test_minibatches_use_every_row_once_per_epoch(size, epochs, sizes):
    batch = Batch({"i": list(range(10))}, Action(torch.arange(10).view(10, 1), torch.ones(10, 1, dtype=torch.bool)))
    parts = minibatches(batch, size=size, epochs=epochs, seed=[0, 1])
    assert [len(part) for part in parts] == sizes
    assert sorted(i for part in parts for i in part.obs["i"]) == sorted(list(range(10)) * epochs)
    assert [part.obs["i"] for part in parts] == [
        part.obs["i"] for part in minibatches(batch, size=size, epochs=epochs, seed=[0, 1])
    ]


def test_rollout_plan():
    plan, task = RolloutPlan(3, 4, seed=5), ToyTask()
    keys = plan.keys(task, 7)
    assert keys == plan.keys(task, 7) and keys != plan.keys(task, 8) and keys != RolloutPlan(3, 4, seed=6).keys(task, 7)
    assert len(set(keys)) == 12
    seeds = [key.seed for key in keys]
    assert [len(set(seeds[group * 4 : group * 4 + 4])) for group in range(3)] == [1, 1, 1] and len(set(seeds)) == 3
    assert all(500_000 <= seed < 1_000_000 for seed in seeds)
    with pytest.raises(UserError, match="groups=0 is not a whole number from 1"):
        RolloutPlan(0, 4)


class Bandit(ToyPolicy):
    """One state, one token, three arms: pi = softmax(theta)."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def logits(self, obs, action):
        return self.theta.expand(len(action), action.tokens.shape[1], 3)


def arms(tokens, advantage, log_prob=None, mask=None) -> Batch:
    tokens = torch.tensor(tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.tensor(mask)
    action = Action(tokens, mask, None if log_prob is None else torch.tensor(log_prob, dtype=torch.float64))
    return Batch({"image": [0] * len(tokens)}, action, torch.tensor(advantage, dtype=torch.float64))


def method(kind, **arguments):
    return kind(iterations=1, groups=2, group_size=2, optimiser=None, **arguments)


def test_reinforce_gradient_is_the_policy_gradient_of_a_softmax_bandit():
    """d/dtheta_k of -mean A log pi(a) = -mean A (1[a = k] - pi_k)."""
    policy, actions, advantage = Bandit([0.2, -0.4, 1.0]), [0, 2, 2, 1], [1.0, -0.5, 2.0, 0.25]
    method(Reinforce).loss(policy, arms([[a] for a in actions], advantage)).backward()
    pi = np.exp([0.2, -0.4, 1.0]) / np.exp([0.2, -0.4, 1.0]).sum()
    expected = -np.mean([a * (np.eye(3)[arm] - pi) for a, arm in zip(advantage, actions, strict=True)], axis=0)
    assert policy.theta.grad.numpy() == pytest.approx(expected, rel=1e-9)


def test_reinforce_in_expectation_climbs_the_expected_reward():
    """Summed over all arms with their probabilities, the estimator is the exact gradient of sum_k pi_k r_k."""
    theta, reward = [0.2, -0.4, 1.0], np.array([1.0, 0.0, 0.0])
    pi = np.exp(theta) / np.exp(theta).sum()
    total = 0
    for arm in range(3):
        policy = Bandit(theta)
        method(Reinforce).loss(policy, arms([[arm]], [reward[arm] - pi @ reward])).backward()
        total = total - pi[arm] * policy.theta.grad.numpy()
    assert total == pytest.approx(pi * (reward - pi @ reward), abs=1e-12)


def test_masked_tokens_do_not_count():
    policy = Bandit([0.2, -0.4, 1.0])
    full = method(Reinforce).loss(policy, arms([[0], [2]], [1.0, -0.5]))
    padded = method(Reinforce).loss(policy, arms([[0, 1], [2, 1]], [1.0, -0.5], mask=[[True, False]] * 2))
    assert padded.item() == pytest.approx(full.item())


@pytest.mark.parametrize(
    "ratio, advantage, gain, slope",
    [  # loss per token is -gain; slope = d gain / d log pi
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # clipped from above
        (0.5, 2.0, 1.0, 1.0),  # a good action that became rarer is never clipped
        (0.5, -2.0, -1.6, 0.0),  # clipped from below
        (1.5, -2.0, -3.0, -3.0),  # a bad action that became likelier is never clipped
    ],
)
def test_grpo_loss_on_two_tokens(ratio, advantage, gain, slope):
    policy = Bandit([0.2, -0.4, 1.0])
    pi = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64).softmax(0)
    # Token 0 was sampled by a policy that gave it pi / ratio, token 1 by the present one.
    old = [[math.log(pi[2] / ratio), math.log(pi[0])]]
    loss = method(GRPO, clip=0.2).loss(policy, arms([[2, 0]], [advantage], old))
    assert loss.item() == pytest.approx(-(gain + advantage) / 2)
    loss.backward()
    one_hot = np.eye(3)
    expected = -(slope * (one_hot[2] - pi.numpy()) + advantage * (one_hot[0] - pi.numpy())) / 2
    assert policy.theta.grad.numpy() == pytest.approx(expected, abs=1e-9)


def test_grpo_on_fresh_rollouts_is_reinforce_with_group_advantages():
    policy = Bandit([0.2, -0.4, 1.0])
    old = policy.theta.detach().log_softmax(0)[[0, 2]].view(2, 1).tolist()
    gradients = []
    for kind in (GRPO, Reinforce):
        policy.theta.grad = None
        method(kind).loss(policy, arms([[0], [2]], [1.0, -1.0], old)).backward()
        gradients.append(policy.theta.grad.numpy().copy())
    assert gradients[0] == pytest.approx(gradients[1])


@pytest.mark.parametrize("kind", [GRPO, Reinforce])
def test_collect_repeats_itself_and_carries_the_samplers_log_prob(kind):
    policy, task = ToyPolicy(seed=1), ToyTask()
    made = kind(iterations=1, groups=6, group_size=4, optimiser=None, minibatch_size=10**6)
    (batch,) = made.collect(policy, task, 2)
    (again,) = made.collect(policy, task, 2)
    assert batch.action.tokens.equal(again.action.tokens) and batch.advantage.equal(again.advantage)
    assert torch.allclose(policy.log_prob(batch.obs, batch.action), batch.action.log_prob, atol=1e-6)
    metrics = made.metrics()
    assert metrics["episodes"] == 24 and 0 < metrics["rollout_success"] < 1
    if kind is GRPO:
        assert metrics["used_decisions"] == len(batch) < metrics["env_steps"]  # groups without signal are gone


@pytest.mark.parametrize("kind", [GRPO, Reinforce])
def test_nothing_to_learn_from_equal_rewards(kind):
    class Unfair(ToyTask):
        def goal(self, mark):
            return -1  # nobody ever gets there

    made = kind(iterations=1, groups=3, group_size=4, optimiser=None)
    assert list(made.collect(ToyPolicy(), Unfair(), 0)) == []
    assert made.metrics()["rollout_success"] == 0


# ---- penalties


def two_policies() -> tuple[ToyPolicy, Batch]:
    """A policy that has moved from its base, and states with tokens."""
    policy = ToyPolicy(seed=1, dtype=torch.float64)
    batch = a_batch(policy=ToyPolicy(seed=1))
    with torch.no_grad():
        policy.table += torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return policy, batch


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_penalty_against_scipy(direction):
    policy, batch = two_policies()
    own = policy.logits(batch.obs, batch.action).softmax(-1).detach().numpy()
    with policy.base():
        base = policy.logits(batch.obs, batch.action).softmax(-1).numpy()
    p, q = (base, own) if direction == "forward" else (own, base)
    expected = 0.3 * entropy(p, q, axis=-1).mean()
    assert KL(coefficient=0.3, direction=direction)(policy, batch).item() == pytest.approx(expected, rel=1e-6)
    mask = torch.ones_like(batch.action.mask)
    mask[1:, 1] = False
    masked = Batch(batch.obs, Action(batch.action.tokens, mask))
    expected = 0.3 * (entropy(p, q, axis=-1) * mask.numpy()).sum() / mask.sum().item()
    assert KL(coefficient=0.3, direction=direction)(policy, masked).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_gradient_pulls_towards_the_base(direction):
    policy, batch = two_policies()
    penalty, values = KL(coefficient=1.0, direction=direction), []
    with policy.base():
        before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimiser = torch.optim.SGD(policy.parameters(), lr=1.0)
    for _ in range(60):
        optimiser.zero_grad()
        value = penalty(policy, batch)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert values[-1] < values[0] / 4
    with policy.base():  # and the base stays where it was
        assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_gradient_by_finite_differences(direction):
    policy, batch = two_policies()
    penalty, step = KL(coefficient=0.7, direction=direction), 1e-5
    penalty(policy, batch).backward()
    with torch.no_grad():
        for index in range(CHOICES):
            policy.bias[index] += step
            up = penalty(policy, batch).item()
            policy.bias[index] -= 2 * step
            down = penalty(policy, batch).item()
            policy.bias[index] += step
            # logits are float64 here, but the penalty's base is too: central differences are exact to 1e-9
            assert policy.bias.grad[index].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)


def test_forward_and_reverse_differ_and_the_base_has_none():
    policy, batch = two_policies()
    forward, reverse = (KL(coefficient=1.0, direction=name)(policy, batch).item() for name in ("forward", "reverse"))
    assert abs(forward - reverse) > 0.01
    still = ToyPolicy(seed=1)
    for name in ("forward", "reverse"):
        value = KL(coefficient=1.0, direction=name)(still, batch)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert max(parameter.grad.abs().max() for parameter in still.parameters()) < 1e-6


def test_bad_penalties():
    with pytest.raises(UserError, match="forward, reverse"):
        KL(coefficient=1, direction="up")
