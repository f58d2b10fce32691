"""The MLP policy against plain torch, and every method of small networks on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_onestep import small
from torch.nn.functional import cross_entropy
from toy_labels import Sums

from robot_forgetting.engine.train import train
from robot_forgetting.errors import Diverged, UserError
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.labels import OracleLabels
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT
from robot_forgetting.methods.simpo import SimPO
from robot_forgetting.one_step import repeated
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


def reference(policy: MLPPolicy, features: torch.Tensor) -> torch.Tensor:
    """Logits by plain torch, with gradients in the policy's own parameters."""
    w1, b1, w2, b2, w3, b3 = policy.layers(policy.matrices, policy.vectors).values()
    return (((features @ w1 + b1).relu() @ w2 + b2).relu()) @ w3 + b3


@pytest.mark.parametrize("times", [1, 2])
def test_logits_and_gradients_are_those_of_plain_torch(times):
    policy = small()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    values = torch.randn(4, 3)
    action = tokens([i % 4 for i in range(4 * times)])
    logits = policy.logits(repeated({"features": values.numpy()}, times), action)
    assert logits.shape == (4 * times, 1, 4)
    cross_entropy(logits[:, 0], action.tokens[:, 0], reduction="sum").backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    expected = reference(policy, values.repeat_interleave(times, 0))
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
    torch.testing.assert_close(after[:, 0], reference(policy, torch.ones(2, 3)))
    with torch.no_grad():
        next(policy.parameters()).zero_()  # loading weights counts too
    torch.testing.assert_close(policy.logits(obs, tokens([0, 1]))[:, 0], reference(policy, torch.ones(2, 3)))


def test_base_is_the_network_it_was_made_with():
    policy = small()
    obs = {"features": np.ones((2, 3), np.float32)}
    first = policy.logits(obs, tokens([0, 1])).detach().clone()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    with policy.base():
        torch.testing.assert_close(policy.logits(obs, tokens([0, 1])), first)
        assert policy.act(obs, temperature=0).tokens[:, 0].tolist() == first[:, 0].argmax(-1).tolist()
    assert (policy.logits(obs, tokens([0, 1])) - first).abs().max() > 0.1


def test_samples_have_the_policys_frequencies():
    policy = small()
    obs = repeated({"features": np.ones((1, 3), np.float32)}, 20_000)
    action = policy.act(obs, noise=torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)))
    expected = reference(policy, torch.ones(1, 3)).softmax(-1)[0].detach()
    found = torch.bincount(action.tokens[:, 0], minlength=4) / 20_000
    assert (found - expected).abs().max() < 5 * 0.5 / np.sqrt(20_000)
    torch.testing.assert_close(action.log_prob[:, 0], expected.log()[action.tokens[:, 0]])


def fine_tuned(name: str, folder, *, penalty: str | None = None, **settings) -> tuple[MLPPolicy, list[dict]]:
    """A small network after a method's few steps, and its rows of train.jsonl."""
    policy, riders = small(), [KL(coefficient=0.5, direction=penalty)] if penalty else []
    optimiser = Optimiser(**{"learning_rate": 0.03, "warmup_steps": 3, "micro_batch": 10**6} | settings)
    more = {"seed": 0, "checkpoints": False, "penalties": riders}
    with RunFolder.create(folder, config={}) as run:
        train(policy, Sums(), METHODS[name](), optimiser=optimiser, run=run, **more)
        return policy, run.rows("train")


@pytest.mark.parametrize("name, penalty", [*((one, None) for one in METHODS), ("grpo", "reverse"), ("sft", "reverse")])
def test_every_method_moves_the_network_and_records_numbers(tmp_path, name, penalty):
    policy, rows = fine_tuned(name, tmp_path, penalty=penalty)
    base = policy.base_network()
    assert sum((weight - base[key]).abs().sum().item() for key, weight in policy.network().items()) > 0.1
    assert len(rows) == 8
    assert all(isinstance(row[key], float) for row in rows for key in ("loss", "penalty", "grad_norm"))
    assert any(row["penalty"] > 0 for row in rows) == (penalty is not None)


def test_a_diverging_network_is_told(tmp_path):
    with pytest.raises(Diverged, match="not finite.*lower method.optimiser.learning_rate"):
        fine_tuned("sft", tmp_path, learning_rate=1e30)


@pytest.mark.parametrize("settings", [{"sizes": (0, 4)}, {"sizes": (3,)}, {"dtype": "int8"}, {"weights": {}}])
def test_impossible_networks_are_refused(settings):
    with pytest.raises(UserError):
        MLPPolicy(**{"sizes": (3, 4), **settings})


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    policy = MLPPolicy(sizes=(3, 8, 5, 4), dtype="bfloat16", weights=small().network())
    with RunFolder.create(tmp_path, config={}) as run:
        optimiser = Optimiser(learning_rate=0.03)
        train(policy, Sums(), METHODS["sft"](), optimiser=optimiser, run=run, seed=0, checkpoints=False)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert any((policy.network()[key] != value).any() for key, value in policy.base_network().items())
