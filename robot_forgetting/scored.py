"""Scored tasks: benchmarks with a protocol of their own (several-choice questions by log-likelihood, checked texts).

A policy is not rolled out on them: they score it item by item, each item once and without sampling noise of ours. Their
rows carry the decode "scored"; tables show them beside both other decodes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.policy import ConventionSpec, Policy
from robot_forgetting.rollout import Episode, EpisodeKey
from robot_forgetting.task import Task, VectorEnv


class ScoredTask(Task):
    """A benchmark. An item's seed is the start of the test split plus its index in the benchmark.

    limit: only so many items (None: all), see ``chosen``
    A benchmark may offer ``prompts(seeds)``, its items' prompts as a policy's columns, for divergences at them.
    """

    max_steps = 1
    instruction = ""
    scored = True
    limit: int | None = None

    @abstractmethod
    def size(self) -> int:
        """Number of items."""

    @abstractmethod
    def score(self, policy: Policy, seeds: Sequence[int]) -> Iterator[Episode]:
        """One episode per seed; ``success`` is the item's binary metric, ``flags`` hold further ones."""

    @abstractmethod
    def chance(self, seeds: Sequence[int]) -> float:
        """The rate that guessing reaches on these items."""

    def settings(self) -> dict:
        """The protocol, for run.json."""
        return {}

    def untrainable(self) -> str:
        return f"task '{self.name}' is a benchmark: nothing can be trained on it; use robot-forgetting evaluate"

    def compared_at(self) -> tuple[str, ...]:
        return ("base",) if self.asks else ()

    def evaluation_seeds(self, episodes: int | None, start: int | None = None) -> list[int]:
        """The items that it chooses itself; None: as many as its limit says."""
        return super().evaluation_seeds(episodes) if episodes is not None and episodes < 1 else self.chosen(episodes)

    def own_episodes(self, policy: Policy, keys: Sequence[EpisodeKey], temperature: float | None) -> Iterator[Episode]:
        return self.score(policy, [key.seed for key in keys])

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_mode="text")

    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv:
        raise UserError(f"task '{self.name}' is a benchmark: it can be scored, not trained on or recorded")

    def chosen(self, count: int | None) -> list[int]:
        """The seeds of ``count`` items, at most ``limit`` (None: all), spread evenly over the benchmark.

        Fewer items are a part of more: item numbers are taken in the order of their reversed binary digits.
        """
        start, size = self.seeds("test").start, self.size()
        count = min(size if one is None else one for one in (count, self.limit))
        return [start + int(item) for item in spread(size)[:count]]

    def items(self, seeds: Sequence[int]) -> list[int]:
        """Item indices, modulo the benchmark's size; beyond it in the order of ``chosen``."""
        size, order = self.size(), spread(self.size())
        offsets = [int(seed) - self.seeds("test").start for seed in seeds]
        return [offset if 0 <= offset < size else int(order[offset % size]) for offset in offsets]


def spread(size: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 of which every beginning is spread evenly (van der Corput's sequence)."""
    bits = max(1, (size - 1).bit_length())
    reversed_digits = np.zeros(1 << bits, dtype=np.int64)
    for bit in range(bits):
        reversed_digits |= ((np.arange(1 << bits) >> bit) & 1) << (bits - 1 - bit)
    return reversed_digits[reversed_digits < size]


def measurable(tasks: Sequence[Task]) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be measured here, and {name: why not} of the others."""
    reasons = {task.name: task.left_out() for task in tasks}
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    return [task for task in tasks if task.name not in reasons], reasons
