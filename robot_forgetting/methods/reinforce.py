"""REINFORCE: with reward normalisation (RL's Razor's robot recipe, arXiv 2509.04259, section 3.1), or 1-0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.on_policy import RolloutPlan, minibatches, sample_rollouts
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count, Environments, Seed


class Reinforce(Method):
    """loss = -mean over tokens of A log pi(token), with A = (R - mean R) / std R over the iteration's episodes.

    ``advantage`` "one_zero": A = R, so that successes are imitated and failures teach nothing (section 5.1). R is 1 on
    success, else 0. Every decision of an episode carries the episode's advantage. The paper takes one
    gradient step per iteration (``minibatch_size`` at least the number of decisions); with smaller parts, every
    decision is still used once, the later parts slightly off-policy.
    """

    calls = ("log_prob",)

    def __init__(
        self,
        *,
        iterations: Count,
        groups: Count,
        group_size: Count,
        optimiser: Optimiser,
        minibatch_size: Count = 1_000_000,
        advantage: str = "normalised",
        num_envs: Environments = 16,
        seed: Seed = 0,
    ):
        if advantage not in ("normalised", "one_zero"):
            raise UserError(f"unknown advantage '{advantage}'; choose one of: normalised, one_zero")
        self.iterations, self.optimiser, self.seed = iterations, optimiser, seed
        self.plan = RolloutPlan(groups, group_size, num_envs, seed)
        self.minibatch_size, self.advantage = minibatch_size, advantage
        self._metrics: dict[str, float] = {}

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        rollouts = sample_rollouts(policy, task, self.plan, iteration)
        self._metrics = rollouts.metrics()
        advantage = rollouts.rewards
        if self.advantage == "normalised":
            advantage = (advantage - advantage.mean()) / advantage.std(unbiased=False).clamp_min(1e-6)
        batch = rollouts.batch(advantage)
        seed = [self.seed, iteration]
        return minibatches(batch, size=self.minibatch_size, epochs=1, seed=seed)

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        log_prob = policy.log_prob(batch.obs, batch.action)
        advantage = batch.advantage.unsqueeze(1)
        return -mean_over_tokens(advantage * log_prob, batch.action.mask, batch.tokens_per_row)

    def metrics(self) -> dict[str, float]:
        return self._metrics
