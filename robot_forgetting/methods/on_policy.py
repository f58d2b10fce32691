"""What the on-policy methods share: rollouts of the current policy as a batch of decisions with episode rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch
from robot_forgetting.methods.sft import take
from robot_forgetting.one_step import Answers, Repeated, answer
from robot_forgetting.policy import Action, Policy
from robot_forgetting.ranges import Count, Environments, Seed, check_fields
from robot_forgetting.rollout import Episode, EpisodeKey, columns, rollout


@dataclass(frozen=True)
class RolloutPlan:
    """How many episodes an iteration samples.

    groups: initial states; group_size: episodes from each; num_envs: simulated at once
    A seed of training never meets an initial state of evaluation: states come from the task's training split, after the
    first 500,000, which demonstrations use.
    """

    groups: Count
    group_size: Count
    num_envs: Environments = 16
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self)

    def keys(self, task, iteration: int) -> list[EpisodeKey]:
        """[groups * group_size] keys, a group's episodes in a row; the same for the same (seed, iteration)."""
        seeds, streams = self.draw(task, iteration)
        return [EpisodeKey(int(s), int(stream)) for s, row in zip(seeds, streams, strict=True) for stream in row]

    def draw(self, task, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """seeds [groups] and streams [groups, group_size]; one-step tasks give their next items, epoch by epoch."""
        rng = np.random.default_rng([self.seed, iteration, 0x901])
        if task.one_step:
            seeds = task.training_seeds(iteration, self.groups, seed=self.seed)
        else:
            states = task.seeds("train")
            seeds = states.start + rng.integers(len(states) // 2, len(states), size=self.groups)
        return seeds, rng.integers(2**31, size=(len(seeds), self.group_size))


@dataclass
class Rollouts:
    """E episodes in the order of the plan's keys; rewards [E]; lengths [E].

    Those that the environment broke off say nothing of the policy and are not among them; ``failed`` are.
    state: [E] the number of the initial state, of whose ``group_size`` episodes some may be missing
    """

    episodes: list[Episode]
    state: Tensor | None = None
    failed: Sequence[Episode] = ()

    @property
    def rewards(self) -> Tensor:
        return torch.tensor([float(episode.success) for episode in self.episodes])

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([episode.steps for episode in self.episodes])

    def metrics(self) -> dict[str, float]:
        return {
            "rollout_success": self.rewards.mean().item(),
            "episodes": len(self.episodes) + len(self.failed),
            "env_steps": sum(episode.steps for episode in [*self.episodes, *self.failed]),
            "errors": len(self.failed),
        }

    def batch(self, advantage: Tensor, tokens_per_row: float | None = None) -> Batch | None:
        """All decisions whose episode has a non-zero advantage [E], in episode order; the rest teach nothing."""
        kept = [(e, a) for e, a in zip(self.episodes, advantage, strict=True) if abs(a) > 1e-8 and e.steps]
        if not kept:
            return None
        rows = [row for episode, _ in kept for row in episode.observations[: episode.steps]]
        action = Action.cat([episode.action() for episode, _ in kept])
        weights = torch.cat([value.repeat(episode.steps) for episode, value in kept])
        return Batch(columns(rows), action, weights, tokens_per_row=tokens_per_row)


@dataclass
class OneStepRollouts:
    """The same for one-step tasks, from one call of the policy.

    Every one-token decision stays in the batch: without advantage it costs nothing. Texts without advantage are left
    out, but count in the means.
    """

    answers: Answers
    group_size: int = 1

    @property
    def rewards(self) -> Tensor:
        return self.answers.rewards

    @property
    def state(self) -> Tensor:
        return torch.arange(len(self.rewards)) // self.group_size

    @property
    def lengths(self) -> Tensor:
        return self.answers.action.mask.sum(1)

    def metrics(self) -> dict[str, float]:
        numbers = {"rollout_success": self.rewards.mean().item(), "episodes": len(self.rewards)}
        if self.answers.action.mask.shape[1] > 1:
            numbers["completion_tokens"] = self.lengths.float().mean().item()
        return numbers

    def batch(self, advantage: Tensor, tokens_per_row: float | None = None) -> Batch | None:
        action = self.answers.action
        whole = Batch(self.answers.obs, action, advantage)
        if action.mask.shape[1] == 1 and tokens_per_row is None:
            return whole
        kept = (advantage.abs() > 1e-8).nonzero().squeeze(1)
        if not len(kept):
            return None
        part, counted = take(whole, kept), int(action.mask.sum())
        # A mean over what is left times its share of what there was: the rest counts in the loss, but not in a penalty.
        divisor = counted if tokens_per_row is None else tokens_per_row * len(whole)
        share = int(part.action.mask.sum()) / divisor
        # One copy of each row in a column of its own keeps the order: a policy reads a group's prompt once.
        obs = {key: Repeated(column, 1) for key, column in part.obs.items()}
        return replace(part, obs=obs, advantage=part.advantage * share, tokens_per_row=part.mean_tokens)


def sample_rollouts(policy: Policy, task, plan: RolloutPlan, iteration: int) -> Rollouts | OneStepRollouts:
    """Runs the iteration's episodes at temperature 1: the distribution whose log-probabilities the loss uses."""
    policy.eval()
    if task.one_step:
        return OneStepRollouts(answer(policy, task, *plan.draw(task, iteration)), plan.group_size)
    keys = plan.keys(task, iteration)
    finished = {episode.key: episode for episode in rollout(policy, task, keys, num_envs=plan.num_envs)}
    episodes, failed = [], []
    for number, key in enumerate(keys):
        (failed if finished[key].error else episodes).append((number // plan.group_size, finished[key]))
    if not episodes:
        raise UserError(
            f"every episode of iteration {iteration + 1} on task '{task.name}' was broken off by its environment "
            f"({failed[0][1].error}); mend it, the same command continues"
        )
    states = torch.tensor([state for state, _ in episodes])
    return Rollouts([episode for _, episode in episodes], states, [episode for _, episode in failed])


def minibatches(batch: Batch | None, *, size: int, epochs: int, seed: list[int]) -> list[Batch]:
    """Shuffled parts of nearly equal size, at most ``size`` rows, for each epoch."""
    if batch is None:
        return []
    whole = len(batch) <= size and any(isinstance(column, Repeated) for column in batch.obs.values())
    if whole:  # each distinct observation is then computed once
        return [batch] * epochs
    rng, parts = np.random.default_rng(seed), max(1, -(-len(batch) // size))
    return [
        take(batch, torch.from_numpy(rows))
        for _ in range(epochs)
        for rows in np.array_split(rng.permutation(len(batch)), parts)
    ]
