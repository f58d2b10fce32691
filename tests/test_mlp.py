"""The MLP policy, and that a stack of networks trains each of them as it would train alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_onestep import small
from torch.nn.functional import cross_entropy
from toy_labels import Sums

from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.labels import OracleLabels
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT
from robot_forgetting.methods.simpo import SimPO
from robot_forgetting.one_step import answer, repeated
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import Action
from robot_forgetting.records.run_folder import RunFolder

STEPS = {"optimiser": None, "steps_per_iteration": 2, "batch_size": 5}
METHODS = {
    "sft": lambda: SFT(iterations=4, demonstrations=1, seed=1, **STEPS),
    "sft_soft_oracle": lambda: SFT(iterations=4, demonstrations=1, seed=1, labels=OracleLabels(soft=True), **STEPS),
    "grpo": lambda: GRPO(iterations=8, groups=5, group_size=4, optimiser=None, seed=1),
    "grpo_two_epochs": lambda: GRPO(iterations=4, groups=5, group_size=4, epochs=2, optimiser=None, seed=1),
    "reinforce": lambda: Reinforce(iterations=8, groups=5, group_size=4, optimiser=None, seed=1),
    "one_zero": lambda: Reinforce(iterations=8, groups=5, group_size=4, advantage="one_zero", optimiser=None, seed=1),
    "simpo": lambda: SimPO(iterations=4, seed=1, **STEPS),
    "self_sft": lambda: SelfSFT(iterations=4, seed=1, **STEPS),
    "iterative_sft": lambda: SelfSFT(iterations=4, iterative=True, seed=1, **STEPS),
}


def tokens(values) -> Action:
    chosen = torch.tensor(values).view(-1, 1)
    return Action(chosen, torch.ones_like(chosen, dtype=torch.bool))


def reference(policy: MLPPolicy, run: int, features: torch.Tensor) -> torch.Tensor:
    """Logits by plain torch, with gradients in the policy's own parameters."""
    row = torch.cat([parameter.flatten() for parameter in policy.run_parameters()[run]])
    w1, b1, w2, b2, w3, b3 = (values[0] for values in policy.layers(row.unsqueeze(0)).values())
    return (((features @ w1 + b1).relu() @ w2 + b2).relu()) @ w3 + b3


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_logits_and_gradients_are_those_of_plain_torch(runs, shared):
    policy = small(runs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    values = torch.randn(4, 3) if shared else torch.randn(runs * 4, 3)
    obs = repeated({"features": values.numpy()}, inner=2, outer=runs) if shared else {"features": values.numpy()}
    rows = runs * (8 if shared else 4)
    action = tokens([i % 4 for i in range(rows)])
    logits = policy.logits(obs, action)
    assert logits.shape == (rows, 1, 4)
    cross_entropy(logits[:, 0], action.tokens[:, 0], reduction="sum").backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    each = values.repeat_interleave(2, 0) if shared else values
    parts = [each if shared else each[4 * r : 4 * r + 4] for r in range(runs)]
    expected = torch.cat([reference(policy, r, part) for r, part in enumerate(parts)])
    torch.testing.assert_close(logits[:, 0], expected)
    cross_entropy(expected, action.tokens[:, 0], reduction="sum").backward()
    for ours, parameter in zip(gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_a_kept_forward_pass_is_not_used_after_a_step():
    policy = small()
    obs = {"features": np.ones((2, 3), np.float32)}
    adam = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    before = policy.logits(obs, tokens([0, 1]))
    before.sum().backward()
    adam.step()
    after = policy.logits(obs, tokens([0, 1]))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after[:, 0], reference(policy, 0, torch.ones(2, 3)))
    with torch.no_grad():
        next(policy.parameters()).zero_()  # loading weights counts too
    torch.testing.assert_close(policy.logits(obs, tokens([0, 1]))[:, 0], reference(policy, 0, torch.ones(2, 3)))


def test_base_is_the_network_it_was_made_with():
    policy = small(2)
    obs = repeated({"features": np.ones((2, 3), np.float32)}, outer=2)
    first = policy.logits(obs, tokens([0, 1, 0, 1])).detach().clone()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    with policy.base():
        torch.testing.assert_close(policy.logits(obs, tokens([0, 1, 0, 1])), first)
        assert policy.act(obs, temperature=0).tokens[:, 0].tolist() == first[:, 0].argmax(-1).tolist()
    assert (policy.logits(obs, tokens([0, 1, 0, 1])) - first).abs().max() > 0.1


def test_samples_have_the_policys_frequencies():
    policy = small()
    obs = repeated({"features": np.ones((1, 3), np.float32)}, inner=20_000)
    action = policy.act(obs, noise=torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)))
    expected = reference(policy, 0, torch.ones(1, 3)).softmax(-1)[0].detach()
    found = torch.bincount(action.tokens[:, 0], minlength=4) / 20_000
    assert (found - expected).abs().max() < 5 * 0.5 / np.sqrt(20_000)
    torch.testing.assert_close(action.log_prob[:, 0], expected.log()[action.tokens[:, 0]])


def folders(path, count):
    return [RunFolder.create(path / str(index), config={}) for index in range(count)]


OPTIMISERS = [
    Optimiser(learning_rate=0.03, warmup_steps=3, micro_batch=10**6),
    Optimiser(learning_rate=0.003, warmup_steps=3, schedule="cosine", micro_batch=10**6),
    Optimiser(learning_rate=0.1, max_grad_norm=1.0, micro_batch=10**6),
]


@pytest.mark.parametrize("penalty", [None, "reverse"])
@pytest.mark.parametrize("name", METHODS)
def test_a_stack_trains_each_network_as_it_would_train_alone(tmp_path, name, penalty):
    if penalty and name not in ("grpo", "sft"):
        pytest.skip("the penalty is tried on one method of each kind")
    riders = [KL(coefficient=0.5, direction=penalty)] if penalty else []
    stack = small(3)
    runs = folders(tmp_path / "stack", 3)
    train(stack, Sums(), METHODS[name](), optimiser=OPTIMISERS, run=runs, seed=0, checkpoints=False, penalties=riders)
    for index, optimiser in enumerate(OPTIMISERS):
        alone, own = small(), folders(tmp_path / f"alone{index}", 1)[0]
        train(alone, Sums(), METHODS[name](), optimiser=optimiser, run=own, seed=0, checkpoints=False, penalties=riders)
        moved = 0.0
        for key, weight in alone.network(0).items():
            torch.testing.assert_close(stack.network(index)[key], weight, atol=2e-5, rtol=1e-4)
            moved += (weight - alone.base_network()[key]).abs().sum().item()
        assert moved > 0.1
        for ours, theirs in zip(runs[index].rows("train"), own.rows("train"), strict=True):
            assert ours["learning_rate"] == theirs["learning_rate"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert ours["penalty"] == pytest.approx(theirs["penalty"], abs=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, abs=1e-5)
        for folder in (runs[index], own):
            folder.close()


def test_networks_of_a_stack_sample_the_same_noise():
    stack, alone, task = small(3), small(), Sums()
    seeds, streams = np.arange(4), np.arange(12).reshape(4, 3)
    together, one = answer(stack, task, seeds, streams), answer(alone, task, seeds, streams)
    assert together.action.tokens.view(3, -1).tolist() == [one.action.tokens[:, 0].tolist()] * 3
    assert together.rewards.view(3, -1).tolist() == [one.rewards.tolist()] * 3


def test_a_diverging_network_is_left_behind(tmp_path):
    stack, runs, told = small(2), folders(tmp_path, 2), []
    wild = Optimiser(learning_rate=1e30, micro_batch=10**6)
    settings = {"seed": 0, "checkpoints": False}
    train(
        stack, Sums(), METHODS["sft"](), optimiser=[wild, OPTIMISERS[1]], run=runs, **settings,
        diverged=lambda index, message: told.append((index, message)),
    )  # fmt: skip
    assert [index for index, _ in told] == [0] and "not finite" in told[0][1]
    alone, own = small(), folders(tmp_path / "alone", 1)[0]
    train(alone, Sums(), METHODS["sft"](), optimiser=OPTIMISERS[1], run=own, **settings)
    for key, weight in alone.network(0).items():
        torch.testing.assert_close(stack.network(1)[key], weight, atol=2e-5, rtol=1e-4)
    assert all(np.isfinite(row["loss"]) for row in runs[1].rows("train"))


def test_a_stack_needs_an_optimiser_for_each_network(tmp_path):
    with pytest.raises(ValueError, match="2 networks need"):
        train(small(2), Sums(), METHODS["sft"](), optimiser=OPTIMISERS, run=folders(tmp_path, 2), seed=0)


def test_stacked_runs_share_all_but_rate_and_schedule(tmp_path):
    with pytest.raises(ValueError, match="in nothing else"):
        optimisers = [OPTIMISERS[0], Optimiser(learning_rate=0.1, max_grad_norm=None)]
        train(small(2), Sums(), METHODS["sft"](), optimiser=optimisers, run=folders(tmp_path, 2), seed=0)


@pytest.mark.parametrize("settings", [{"runs": 0}, {"sizes": (3,)}, {"dtype": "int8"}, {"weights": {}}])
def test_impossible_networks_are_refused(settings):
    with pytest.raises(UserError):
        MLPPolicy(**{"sizes": (3, 4), **settings})


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    policy = MLPPolicy(sizes=(3, 8, 5, 4), dtype="bfloat16", weights=small().network(0))
    run = folders(tmp_path, 1)[0]
    train(policy, Sums(), METHODS["sft"](), optimiser=OPTIMISERS[0], run=run, seed=0, checkpoints=False)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert any((policy.network(0)[key] != value).any() for key, value in policy.base_network().items())
