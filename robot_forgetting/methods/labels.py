"""Where supervised labels of one-step tasks come from: the data, a table, the nearest correct policy, a teacher, ...

A labeler gives one target per training item, drawn once from (seed, item) alone, so that a run's data do not depend on
how its batches are cut. Methods of demonstrations (``SFT``, ``SimPO``) take one; without, they use the task's expert.
Labels are class numbers, or texts where the task asks questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch
from robot_forgetting.one_step import OneStepTask, uniforms
from robot_forgetting.policy import Action, Policy

CHUNK = 4096


@dataclass(frozen=True)
class Labels:
    """labels: [N] int64, or N texts; None in place of a text: no target, the item is not trained on.

    probabilities: [N, V] float32 soft targets, or None
    """

    labels: np.ndarray | list[str | None]
    probabilities: Tensor | None = None


class Labeler(ABC):
    @abstractmethod
    def label(self, policy: Policy, task: OneStepTask, seeds: np.ndarray, stream: int) -> Labels:
        """Targets for the items of ``seeds``; ``stream`` names the draw (the run's seed)."""


class LabelledItems:
    """All training items of a one-step task with their labels, cut into the batches of ``task.training_seeds``.

    Items without a label are left out of every epoch's order; the others keep theirs.
    """

    def __init__(
        self, policy: Policy, task: OneStepTask, labeler: Labeler | None, seed: int, *, stream: int | None = None
    ):
        labeler = labeler or task.labels()
        if labeler is None:
            raise UserError(f"task '{task.name}' has no labels of its own; give method.labels")
        self.policy, self.task, self.seed = policy, task, seed
        self._start = task.seeds("train").start
        every = self._start + np.arange(task.size("train"))
        found = labeler.label(policy, task, every, seed if stream is None else stream)
        self._labels, self._soft = found.labels, found.probabilities
        self.kept = np.array([label is not None for label in found.labels])
        self._check()

    def keep(self, kept: np.ndarray) -> None:
        """Leaves out more items, [size] bool: those that a partner in pairs lacks."""
        self.kept = self.kept & kept
        self._check()

    def batch(self, step: int, size: int) -> Batch:
        """The step's batch; soft targets as extra["target"]."""
        seeds = self._seeds(step, size)
        extra = None if self._soft is None else {"target": self._soft[torch.from_numpy(seeds - self._start)]}
        return Batch(self.task.observations(seeds), self._encoded(seeds), extra=extra)

    def texts(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """The step's seeds [size] and the texts that label them, for a method that reads the labels itself."""
        if not isinstance(self._labels, list):
            raise UserError(f"the labels of task '{self.task.name}' are numbers; this method reads texts")
        seeds = self._seeds(step, size)
        return seeds, [self._labels[row] for row in seeds - self._start]

    def action(self, step: int, size: int) -> Action:
        """The decisions of that batch alone."""
        return self._encoded(self._seeds(step, size))

    def _seeds(self, step: int, size: int) -> np.ndarray:
        if self.kept.all():
            return self.task.training_seeds(step, size, seed=self.seed)
        size = min(size, int(self.kept.sum()))
        epoch, batch = divmod(step, int(self.kept.sum()) // size)
        whole = self.task.training_seeds(epoch, len(self.kept), seed=self.seed)  # one batch: the whole epoch
        return whole[self.kept[whole - self._start]][batch * size : (batch + 1) * size]

    def _encoded(self, seeds: np.ndarray) -> Action:
        """Tokens of this batch's labels only: a whole data set's solutions, padded to the longest, are many GB."""
        rows = seeds - self._start
        if isinstance(self._labels, list):
            return self.policy.encode([self._labels[row] for row in rows])
        return self.policy.encode(self._labels[rows])

    def _check(self) -> None:
        if not self.kept.any():
            raise without_targets(self.task)


def without_targets(task: OneStepTask) -> UserError:
    return UserError(
        f"no training item of task '{task.name}' has a target to learn from; name a teacher "
        "(task.teacher.base_url) or use a method that learns from rewards"
    )


def check_targets(method, task: OneStepTask) -> None:
    """``UserError`` where a method learns from the targets that a task's items bring, and none brings any."""
    if getattr(method, "labels", method) is not None or not isinstance(task.labels(), GivenTargets):
        return  # other labels, or a method that asks for none
    seeds = task.seeds("train").start + np.arange(task.size("train"))
    if all(target is None for target in task.targets(seeds)):
        raise without_targets(task)


class GivenTargets(Labeler):
    """The solutions that the items of a text task bring along."""

    def label(self, policy, task, seeds, stream) -> Labels:
        if not hasattr(task, "targets"):
            raise UserError(f"task '{task.name}' gives no solutions; given targets fit tasks of questions")
        return Labels(task.targets(seeds))


class FixedLabels(Labeler):
    """Class c gets one of ``table[c]``, uniformly at random; the task must know its items' ``classes``."""

    def __init__(self, table: Sequence[Sequence[int]]):
        self.table = [list(row) for row in table]

    def label(self, policy, task, seeds, stream) -> Labels:
        if not hasattr(task, "classes"):
            raise UserError(f"task '{task.name}' has no classes; a table of labels fits tasks of pictures with classes")
        classes, drawn = task.classes(seeds), uniforms(seeds, np.full(len(seeds), stream))
        sizes = np.array([len(row) for row in self.table])
        padded = np.array([row + [row[0]] * (sizes.max() - len(row)) for row in self.table])
        return Labels(padded[classes, (drawn * sizes[classes]).astype(np.int64)])


class OracleLabels(Labeler):
    """Labels from q* = pi_0 R / sum(pi_0 R), the correct policy nearest to the base in KL (papers: Lemma A.1).

    The paper writes argmin KL(pi_0 || q), which is infinite as soon as the base gives a wrong answer any chance; this
    is argmin KL(q || pi_0). soft: also hand out q* itself as targets, in place of samples.
    """

    def __init__(self, *, soft: bool = False):
        self.soft = soft

    def label(self, policy, task, seeds, stream) -> Labels:
        parts = []
        for start in range(0, len(seeds), CHUNK):
            chunk = seeds[start : start + CHUNK]
            probabilities = base_probabilities(policy, task, chunk) * correct(task, chunk)
            parts.append(probabilities / probabilities.sum(1, keepdim=True).clamp_min(1e-30))
        nearest = torch.cat(parts)
        return Labels(draw(nearest, seeds, stream), nearest if self.soft else None)


class TeacherLabels(Labeler):
    """Labels sampled from another policy, for example one trained by RL: distillation through data."""

    def __init__(self, teacher: Policy):
        self.teacher = teacher

    def label(self, policy, task, seeds, stream) -> Labels:
        parts = [
            _probabilities(self.teacher, task, seeds[start : start + CHUNK]) for start in range(0, len(seeds), CHUNK)
        ]
        return Labels(draw(torch.cat(parts), seeds, stream))


class WrongLabels(Labeler):
    """A wrong answer per item, uniform among all wrong ones: negatives from an external model that knows nothing.

    A text task says itself what a wrong answer looks like (``wrong_answers``), where it has a fixed set of them.
    """

    def label(self, policy, task, seeds, stream) -> Labels:
        if hasattr(task, "wrong_answers"):
            return Labels(task.wrong_answers(seeds, uniforms(seeds, np.full(len(seeds), stream))))
        wrong = 1.0 - correct(task, seeds)
        return Labels(draw(wrong / wrong.sum(1, keepdim=True).clamp_min(1e-30), seeds, stream))


def correct(task: OneStepTask, seeds: np.ndarray) -> Tensor:
    """[N, V] the reward of every possible answer."""
    if task.choices is None:
        raise UserError(f"task '{task.name}' has no fixed set of answers; these labels need one")
    rewards = [task.rewards(seeds, np.full(len(seeds), answer)) for answer in range(task.choices)]
    return torch.from_numpy(np.stack(rewards, 1))


def base_probabilities(policy: Policy, task: OneStepTask, seeds: np.ndarray) -> Tensor:
    """[N, V] pi_0 at the first token."""
    with policy.base():
        return _probabilities(policy, task, seeds)


@torch.no_grad()
def _probabilities(policy: Policy, task: OneStepTask, seeds: np.ndarray) -> Tensor:
    tokens = torch.zeros(len(seeds), 1, dtype=torch.int64)
    logits = policy.logits(task.observations(seeds), Action(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    return logits[:, 0].softmax(-1).cpu()


def draw(probabilities: Tensor, seeds: np.ndarray, stream: int) -> np.ndarray:
    """[N] one sample of each row of [N, V], by inverse CDF with the item's own noise."""
    noise = torch.from_numpy(uniforms(seeds, np.full(len(seeds), stream)))
    below = probabilities.double().cumsum(1) <= noise.double().unsqueeze(1)
    # Rounding can leave the last sum below 1: never fall off the end onto an answer that has no chance.
    last = (probabilities > 0).to(torch.int64).cumsum(1).argmax(1)
    return torch.minimum(below.sum(1), last).numpy()
