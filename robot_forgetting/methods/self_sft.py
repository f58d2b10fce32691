"""SFT on own successes: Self-SFT and iterative SFT of Retaining by Doing (arXiv 2510.18874)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.on_policy import RolloutPlan, sample_rollouts
from robot_forgetting.methods.sft import take
from robot_forgetting.one_step import OneStepTask, answer
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count, Environments, Seed


class SelfSFT(Method):
    """Negative log-likelihood of the policy's own successful decisions, sampled at temperature 1.

    iterative: False (Self-SFT): all are the base policy's. True: every iteration starts with new ones of the current
        policy and trains ``steps_per_iteration`` steps on them (the paper regenerates once per epoch).
    samples: tries per state; states: initial states per draw (one-step tasks: the items of the coming steps, of each of
        which the first right answer counts; an item without one is passed over)
    """

    calls = ("log_prob",)

    def __init__(
        self,
        *,
        iterations: Count,
        steps_per_iteration: Count,
        batch_size: Count,
        optimiser: Optimiser,
        iterative: bool = False,
        samples: Count = 5,
        states: Count = 64,
        num_envs: Environments = 16,
        seed: Seed = 0,
    ):
        self.iterations, self.steps, self.batch_size = iterations, steps_per_iteration, batch_size
        self.optimiser, self.iterative, self.samples, self.seed = optimiser, iterative, samples, seed
        self.plan = RolloutPlan(states, samples, num_envs, seed)
        self._data: Batch | None = None
        self._metrics: dict[str, float] = {}

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        self._data = None

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        if task.one_step:
            return self._own_answers(policy, task, iteration)
        data = self._successes(policy, task, iteration) if self.iterative else self._of_base(policy, task, iteration)
        if data is None:
            return []
        rng = np.random.default_rng([self.seed, iteration, 0x5E1F])
        rows = rng.integers(len(data), size=(self.steps, self.batch_size))
        return [take(data, torch.from_numpy(index)) for index in rows]

    def _of_base(self, policy: Policy, task, iteration: int) -> Batch:
        """The base policy's successes, drawn once a stage with the noise of its first iteration."""
        if self._data is None:
            with policy.base():
                self._data = self._successes(policy, task, iteration - iteration % self.iterations)
        if self._data is None:
            raise UserError(
                f"the base policy never succeeded at '{task.name}' in {self.plan.groups * self.samples} episodes; "
                "give more states or samples, or another method"
            )
        return self._data

    def _successes(self, policy: Policy, task, iteration: int) -> Batch | None:
        rollouts = sample_rollouts(policy, task, self.plan, iteration)
        self._metrics = rollouts.metrics()
        return rollouts.batch(rollouts.rewards)  # keeps the episodes with a reward

    def _own_answers(self, policy: Policy, task: OneStepTask, iteration: int) -> list[Batch]:
        steps = range(iteration * self.steps, (iteration + 1) * self.steps)
        parts = [task.training_seeds(step, self.batch_size, seed=self.seed) for step in steps]
        seeds = np.concatenate(parts)
        # The base's samples belong to the item alone; the current policy's also to the moment.
        rng = np.random.default_rng([self.seed, iteration if self.iterative else 0, 0x5E1F])
        streams = np.broadcast_to(rng.integers(2**31, size=self.samples), (len(seeds), self.samples))
        with nullcontext() if self.iterative else policy.base():
            found = answer(policy, task, seeds, streams)
        right = (found.rewards >= 1).view(len(seeds), self.samples)
        kept = right.any(1)
        chosen = found.action[torch.arange(len(seeds)) * self.samples + right.int().argmax(1)]
        action = replace(chosen, mask=chosen.mask & kept.unsqueeze(1))
        self._metrics = {"rollout_success": right.float().mean().item(), "kept": kept.float().mean().item()}
        batches, start = [], 0
        for part in parts:
            batch = Batch(task.observations(part), action[start : start + len(part)])
            if action.mask.shape[1] > 1:  # a text that teaches nothing is not computed
                batch = take(batch, batch.action.mask.any(1).nonzero().squeeze(1))
            batches += [batch] if len(batch) else []
            start += len(part)
        return batches

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        log_prob = policy.log_prob(batch.obs, batch.action)
        return -mean_over_tokens(log_prob, batch.action.mask, batch.tokens_per_row)

    def metrics(self) -> dict:
        return self._metrics
