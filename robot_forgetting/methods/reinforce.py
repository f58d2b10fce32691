"""REINFORCE with reward normalisation, RL's Razor's robot recipe (arXiv 2509.04259, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from robot_forgetting.method import Batch, Method
from robot_forgetting.methods.on_policy import RolloutPlan, minibatches, sample_rollouts
from robot_forgetting.policy import Policy


class Reinforce(Method):
    """loss = -mean over tokens of A log pi(token), with A = (R - mean R) / std R over the iteration's episodes.

    R is 1 on success, else 0. Every decision of an episode carries the episode's advantage. The paper takes one
    gradient step per iteration (``minibatch_size`` at least the number of decisions); with smaller parts, every
    decision is still used once, the later parts slightly off-policy.
    """

    def __init__(
        self,
        *,
        iterations: int,
        groups: int,
        group_size: int,
        optimiser,
        minibatch_size: int = 1_000_000,
        num_envs: int = 16,
        seed: int = 0,
    ):
        self.iterations, self.optimiser, self.seed = iterations, optimiser, seed
        self.plan = RolloutPlan(groups, group_size, num_envs, seed)
        self.minibatch_size = minibatch_size
        self._metrics: dict[str, float] = {}

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        rollouts = sample_rollouts(policy, task, self.plan, iteration)
        self._metrics = rollouts.metrics()
        rewards = rollouts.rewards
        advantage = (rewards - rewards.mean()) / rewards.std(unbiased=False).clamp_min(1e-6)
        batch = rollouts.batch(advantage)
        return minibatches(batch, size=self.minibatch_size, epochs=1, seed=[self.seed, iteration])

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        log_prob = policy.log_prob(batch.obs, batch.action)
        advantage = batch.advantage.to(log_prob.device).unsqueeze(1)
        return -(advantage * log_prob).sum() / batch.action.mask.sum()

    def metrics(self) -> dict[str, float]:
        return self._metrics
