"""Our losses against TRL's on the same tiny model and the same batch: values and gradients."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from test_text_methods import Easy
from tiny_lm import tiny_lm

from robot_forgetting.engine.train import _backward
from robot_forgetting.method import Batch, Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.on_policy import sample_rollouts
from robot_forgetting.methods.sft import SFT
from robot_forgetting.policies.causal_lm.sampling import left_padded

trl = pytest.importorskip("trl", reason="the comparison needs the package trl: pip install trl")
RATE = Optimiser(learning_rate=1e-3)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL and accelerate say of each other
        yield


def trainer_for(policy, kind: str, folder, **settings):
    """A TRL trainer on a copy of the policy's model, ready for its ``compute_loss``."""
    from datasets import Dataset

    shared = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    model = copy.deepcopy(policy.model)
    if kind == "grpo":
        config = trl.GRPOConfig(
            **shared, per_device_train_batch_size=16, num_generations=16, max_completion_length=policy.max_new_tokens,
            beta=0.0, temperature=1.0, epsilon=0.2, **settings,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": "one"}] * 16)
        made = trl.GRPOTrainer(
            model, lambda completions, **rest: [0.0] * len(completions), args=config, train_dataset=data,
            processing_class=policy.tokenizer,
        )  # fmt: skip
    else:
        data = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4)
        config = trl.SFTConfig(**shared, per_device_train_batch_size=8, max_length=512, **settings)
        made = trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=policy.tokenizer)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def theirs(trainer, inputs: dict) -> tuple[float, dict[str, torch.Tensor]]:
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def ours(policy, method, batch: Batch, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
    policy.zero_grad(set_to_none=True)
    loss, _ = _backward(policy, method, [], batch, 1.0, micro_batch)
    return loss, {name: p.grad for name, p in policy.model.named_parameters()}


def compare(first, second) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-4, abs=1e-7)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], atol=2e-6, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


SETTINGS = {
    "grpo": {},
    "dr_grpo": {"scale_by_std": False, "length_normalised": False, "normaliser": "longest"},
    "bnpo": {"length_normalised": False},
}


@pytest.mark.parametrize("loss_type", SETTINGS)
def test_grpo(tmp_path, loss_type):
    policy, task = tiny_lm(), Easy()
    policy.stops |= set(range(3, 60))  # completions of different lengths
    method = GRPO(iterations=1, groups=3, group_size=16, optimiser=RATE, **SETTINGS[loss_type])
    rollouts = sample_rollouts(policy, task, method.plan, 0)
    [batch] = method.collect(policy, task, 0)
    with torch.no_grad():  # so far from the sampling policy that some ratios are clipped
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    found = rollouts.answers
    prompts = policy.prompts.read([found.obs["messages"][i : i + 1][0] for i in range(48)], 0)
    ids, seen, _ = left_padded(prompts, policy.pad, "cpu")
    rewards = rollouts.rewards.view(3, 16)
    advantage = rewards - rewards.mean(1, keepdim=True)
    if loss_type != "dr_grpo":
        advantage = advantage / rewards.std(1, keepdim=True, unbiased=False).clamp_min(1e-6)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": seen.long(),
        "completion_ids": found.action.tokens,
        "completion_mask": found.action.mask.long(),
        "advantages": advantage.flatten(),
        "old_per_token_logps": found.action.log_prob,
        "num_items_in_batch": found.action.mask.sum(),
    }
    ratio = (policy.log_prob(found.obs, found.action) - found.action.log_prob).exp()[found.action.mask]
    assert ((ratio - 1).abs() > 0.2).any() and len(batch) < 48 or rewards.mean(1).ne(rewards[:, 0]).all()
    expected = theirs(trainer_for(policy, "grpo", tmp_path, loss_type=loss_type), inputs)
    for micro_batch in (64, 7):
        compare(ours(policy, method, batch, micro_batch), expected)


def test_sft(tmp_path):
    policy, task = tiny_lm(), Easy()
    seeds = np.arange(5)
    action = policy.encode(["A", "the sum of one and two", "no", "", "yes no yes"])
    batch = Batch(task.observations(seeds), action)
    prompts = policy.prompts.read(batch.obs["messages"], 0)
    rows = [prompt + row[mask].tolist() for prompt, row, mask in zip(prompts, action.tokens, action.mask, strict=True)]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [policy.pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor(
            [
                [-100] * len(prompt) + row[len(prompt) :] + [-100] * (width - len(row))
                for prompt, row in zip(prompts, rows, strict=True)
            ]
        ),
    }
    method = SFT(iterations=1, steps_per_iteration=1, batch_size=5, demonstrations=1, optimiser=RATE)
    expected = theirs(trainer_for(policy, "sft", tmp_path), inputs)
    for micro_batch in (8, 2):
        compare(ours(policy, method, batch, micro_batch), expected)
