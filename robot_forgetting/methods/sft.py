"""Supervised fine-tuning: on an expert's demonstrations, or on labels of a data set's items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.contracts import checked_demonstrations
from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.labels import LabelledItems
from robot_forgetting.policy import Action, Policy
from robot_forgetting.ranges import Count, Range, Seed
from robot_forgetting.task import Demonstration


def smoothed_nll(logits: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """Cross-entropy against a Gaussian over neighbouring bins, [N, T] nats per token.

    logits: [N, T, V]; tokens: [N, T]; sigma: in bins, 0 gives the negative log-likelihood. Only for ordered
    vocabularies such as action bins, where being one bin off is almost right.
    """
    log_probs = logits.log_softmax(-1)
    if sigma == 0:
        return -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    distance = torch.arange(logits.shape[-1], device=logits.device) - tokens.unsqueeze(-1)
    target = torch.softmax(-(distance.float() ** 2) / (2 * sigma**2), dim=-1)
    return -(target * log_probs).sum(-1)


class SFT(Method):
    """Minimises the (smoothed) negative log-likelihood of the expert's tokens.

    demonstrations: how many successful expert episodes, from the task's training seeds; all items of a one-step task
    labels: of a one-step task, a ``methods.labels.Labeler``; None: the task's own
    label_sigma: see ``smoothed_nll``; above 0 it speeds early training up and breaks sampling (docs/action_tokens.md)
    """

    calls = ("encode", "log_prob")

    def __init__(
        self,
        *,
        iterations: Count,
        steps_per_iteration: Count,
        batch_size: Count,
        demonstrations: Count,
        optimiser: Optimiser,
        label_sigma: Annotated[float, Range(0, 256)] = 0.0,
        labels=None,
        seed: Seed = 0,
    ):
        self.iterations, self.steps, self.batch_size = iterations, steps_per_iteration, batch_size
        self.demonstrations, self.optimiser = demonstrations, optimiser
        self.label_sigma, self.labels, self.seed = label_sigma, labels, seed
        if label_sigma:
            self.calls = ("encode", "logits")
        self._data: Batch | LabelledItems | None = None

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        if task.one_step:
            self._data = LabelledItems(policy, task, self.labels, self.seed)
            return
        if self.labels is not None:
            raise UserError(f"method.labels are for one-step tasks; '{task.name}' is learned from its demonstrations")
        episodes = list(task.training_demonstrations(self.demonstrations, seed=self.seed))
        if len(episodes) < self.demonstrations and task.demonstration_count is not None:
            say(f"  {task.name}: learning from {len(episodes)} of its {task.demonstration_count} demonstrations")
        self._data = encode_demonstrations(policy, task, episodes)

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        if isinstance(self._data, LabelledItems):
            steps = range(iteration * self.steps, (iteration + 1) * self.steps)
            return [self._data.batch(step, self.batch_size) for step in steps]
        rng = np.random.default_rng([self.seed, iteration, 0x5F7])
        rows = rng.integers(len(self._data), size=(self.steps, self.batch_size))
        return [take(self._data, torch.from_numpy(index)) for index in rows]

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        if batch.extra is not None and "target" in batch.extra:  # soft labels of the first token
            log_probs = policy.logits(batch.obs, batch.action).log_softmax(-1)
            nll = -(batch.extra["target"].unsqueeze(1) * log_probs).sum(-1)
        elif self.label_sigma:
            logits = policy.logits(batch.obs, batch.action)
            nll = smoothed_nll(logits, batch.action.tokens, self.label_sigma)
        else:
            nll = -policy.log_prob(batch.obs, batch.action)
        return mean_over_tokens(nll, batch.action.mask, batch.tokens_per_row)


def encode_demonstrations(policy: Policy, task, demonstrations) -> Batch:
    """Expert episodes as one batch of decisions: their columns, the policy's actions of the commands."""
    episodes = list(demonstrations)
    if not episodes:
        raise UserError(f"task '{task.name}' gave no demonstrations; nothing to clone")
    obs = demonstration_columns(task, episodes)
    commands = np.concatenate([episode.commands for episode in episodes])
    return Batch(obs, policy.encode(commands, statistics=task.statistics))


def demonstration_columns(task, episodes: Sequence[Demonstration]) -> dict:
    """The observation columns of expert episodes, one row per command."""
    parts = [episode.observations for episode in checked_demonstrations(task, episodes)]
    return {
        key: np.concatenate([part[key] for part in parts])
        if isinstance(first, np.ndarray)
        else [row for part in parts for row in part[key]]
        for key, first in parts[0].items()
    }


def take_columns(obs: dict, rows: Sequence[int]) -> dict:
    """Rows of observation columns by index, in that order."""
    rows = list(rows)
    return {key: [column[i] for i in rows] if isinstance(column, list) else column[rows] for key, column in obs.items()}


def take(batch: Batch, index: Tensor) -> Batch:
    """Rows of a batch by index, in that order."""
    obs = take_columns(batch.obs, index.tolist())
    action: Action = batch.action[index]
    advantage = None if batch.advantage is None else batch.advantage[index]
    extra = None if batch.extra is None else {key: value[index] for key, value in batch.extra.items()}
    return Batch(obs, action, advantage, extra, batch.tokens_per_row)
