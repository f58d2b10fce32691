"""GRPO: group-relative advantages and a clipped ratio (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.on_policy import RolloutPlan, minibatches, sample_rollouts
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count, Environments, Range, Seed


class GRPO(Method):
    """Advantages are relative to the group of episodes that start in the same state.

    A = (R - group mean), divided by the group's std if ``scale_by_std`` (GRPO; without: Dr. GRPO, Liu et al. 2025),
    so a group that always succeeds or always fails teaches nothing. Per token:
    loss = -min(r A, clip(r, 1 - clip, 1 + clip) A), r = pi / pi_sampled. With ``length_normalised`` every episode
    weighs the same (GRPO); without, every decision does, so that a long episode weighs more (Dr. GRPO). No KL term:
    penalties are separate.

    normaliser: what sums over tokens are divided by, besides the number of episodes: "tokens", the batch's mean
        length; or "longest", the constant ``policy.max_new_tokens`` of Dr. GRPO (for policies of equally long
        decisions both are the same)
    """

    calls = ("log_prob",)

    def __init__(
        self,
        *,
        iterations: Count,
        groups: Count,
        group_size: Annotated[int, Range(2, 1_000_000)],
        optimiser: Optimiser,
        minibatch_size: Count = 512,
        epochs: Count = 1,
        clip: Annotated[float, Range(0, 1, above=True)] = 0.2,
        scale_by_std: bool = True,
        length_normalised: bool = True,
        normaliser: str = "tokens",
        num_envs: Environments = 16,
        seed: Seed = 0,
    ):
        if normaliser not in ("tokens", "longest"):
            raise UserError(f"unknown normaliser '{normaliser}'; choose one of: longest, tokens")
        self.iterations, self.optimiser, self.seed = iterations, optimiser, seed
        self.plan = RolloutPlan(groups, group_size, num_envs, seed)
        self.minibatch_size, self.epochs, self.clip = minibatch_size, epochs, clip
        self.scale_by_std, self.length_normalised, self.normaliser = scale_by_std, length_normalised, normaliser
        self._metrics: dict[str, float] = {}

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        rollouts = sample_rollouts(policy, task, self.plan, iteration)
        advantage = group_advantages(rollouts.rewards, rollouts.state, self.scale_by_std)
        if self.length_normalised:
            lengths = rollouts.lengths.clamp_min(1)
            advantage = advantage * lengths.float().mean() / lengths
        batch = rollouts.batch(advantage, policy.max_new_tokens if self.normaliser == "longest" else None)
        self._metrics = {**rollouts.metrics(), "used_decisions": 0 if batch is None else len(batch)}
        seed = [self.seed, iteration]
        return minibatches(batch, size=self.minibatch_size, epochs=self.epochs, seed=seed)

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        log_prob = policy.log_prob(batch.obs, batch.action)
        ratio = (log_prob - batch.action.log_prob).exp()
        advantage = batch.advantage.unsqueeze(1)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        return -mean_over_tokens(gain, batch.action.mask, batch.tokens_per_row)

    def metrics(self) -> dict[str, float]:
        return self._metrics


def group_advantages(rewards: Tensor, state: Tensor, scale_by_std: bool) -> Tensor:
    """[E] rewards to [E] advantages with mean 0 (and, if scaled, std 1) over the episodes of each initial state [E]."""
    _, sizes = state.unique_consecutive(return_counts=True)
    if (sizes != sizes[0]).any():  # some episodes are missing
        parts = rewards.split(sizes.tolist())
        return torch.cat([group_advantages(part, torch.zeros_like(part), scale_by_std) for part in parts])
    grouped = rewards.view(-1, int(sizes[0]))
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_by_std:
        centred = centred / grouped.std(1, keepdim=True, unbiased=False).clamp_min(1e-6)
    return centred.flatten()
