"""Tasks and vectorised environments: everything that is specific to a domain lives behind these two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from robot_forgetting.built_with import BuiltWith
from robot_forgetting.errors import UserError
from robot_forgetting.policy import ConventionSpec


@dataclass(frozen=True)
class Transition:
    """What one environment slot says after a reset or a step.

    observation: one row of the policy's ``obs`` columns, e.g. {"image": uint8 [H, W, 3], "instruction": str}
    error: a one-line description if the environment crashed; the episode then counts as a failure
    """

    slot: int
    observation: dict
    reward: float = 0.0
    success: bool = False
    done: bool = False
    info: dict = field(default_factory=dict)
    error: str | None = None


class VectorEnv(ABC):
    """Environment slots in groups; the slots of a group run in one worker and answer together.

    Requests return at once. ``wait`` gives the transitions of the next group that is ready, so that a policy can act
    for one group while the others step.
    """

    groups: Sequence[Sequence[int]]

    @abstractmethod
    def request(self, group: int, resets: dict[int, int], commands: dict[int, np.ndarray]) -> None:
        """Asks a group to reset some slots (slot -> seed) and step others (slot -> command)."""

    @abstractmethod
    def wait(self) -> tuple[int, list[Transition]]:
        """Blocks until some group is ready; returns its index and its transitions."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclass(frozen=True, init=False)
class Demonstration:
    """One successful expert episode of L decisions.

    observations: the policy's columns, L rows each: pictures [L, H, W, 3] under ``image`` and under names of further
        cameras, proprioception [L, D] ...; a text stands for all L
    commands: the expert's, [L, A]
    images, instruction: short for the columns ``image`` and ``instruction``
    """

    observations: dict
    commands: np.ndarray
    seed: int

    def __init__(self, images=None, commands=None, instruction=None, seed=None, *, observations: dict | None = None):
        if commands is None or seed is None:
            raise UserError("a Demonstration has observations (or images and instruction), commands, and a seed")
        given = {"image": images, "instruction": instruction}
        rows = {**(observations or {}), **{key: column for key, column in given.items() if column is not None}}
        rows = {key: [column] * len(commands) if isinstance(column, str) else column for key, column in rows.items()}
        for name, value in (("observations", rows), ("commands", commands), ("seed", seed)):
            object.__setattr__(self, name, value)

    @property
    def images(self) -> np.ndarray:
        return self.observations["image"]

    @property
    def instruction(self) -> Sequence[str]:
        return self.observations["instruction"]


class Task(BuiltWith, ABC):
    """One task. Train and test seeds never overlap."""

    name: str
    instruction: str
    instructions: tuple[str, ...] = ()  # where episodes give one or several of these; ``instruction`` is their summary
    max_steps: int
    statistics: str | None = None  # the policy's key for the ranges of commands
    processes: int = 1  # groups of environments that step beside each other
    one_step: bool = False  # an ``OneStepTask``: an item, one decision, a reward
    scored: bool = False  # a ``ScoredTask``: measured by its own protocol, at none of our decodes
    # How many demonstrations there are where they were recorded; None: an expert gives as many as are asked for.
    demonstration_count: int | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that a policy may be told here."""
        return self.instructions or (self.instruction,)

    @abstractmethod
    def convention(self) -> ConventionSpec:
        """What an action and an observation mean here."""

    def code_modules(self) -> Sequence[str]:
        """Modules by name that its episodes run and that its own module does not import (an environment's, say): when
        they change, what was measured before is not reused."""
        return ()

    @abstractmethod
    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv: ...

    # ---- demonstrations

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterable[Demonstration]:
        """Successful expert episodes in the order of their seeds, from the ``start``-th on; of recorded ones no more
        than there are."""
        raise UserError(f"task '{self.name}' has no demonstrations; give it an expert, or use a method that needs none")

    @property
    def has_demonstrations(self) -> bool:
        """Whether ``demonstrations`` gives any."""
        return type(self).demonstrations is not Task.demonstrations

    @property
    def held_out_count(self) -> int:
        """Of recorded demonstrations, how many no method learns from: the last tenth, and none of a single one."""
        return -(-self.demonstration_count // 10) if self.demonstration_count > 1 else 0

    def training_demonstrations(self, count: int, *, seed: int) -> Iterable[Demonstration]:
        """What a method may learn from: ``count``, or all that were recorded for it."""
        if self.demonstration_count is not None:
            return self.demonstrations(min(count, self.demonstration_count - self.held_out_count))
        # Another seed means other demonstrations too: the spread over seeds then includes the data's. After 40 seeds
        # they repeat, since the training states from 400,000 on have other uses (divergence, rollouts).
        return self.demonstrations(count, start=seed % 40 * 10_000)

    def held_out_demonstrations(self, count: int) -> Iterable[Demonstration]:
        """``count`` that no method learns from, or as many as there are."""
        if self.demonstration_count is None:
            return self.demonstrations(count, start=400_000)
        kept = self.held_out_count
        return self.demonstrations(min(count, kept), start=self.demonstration_count - kept)

    # ---- what the task says of itself to those who train and measure on it

    def untrainable(self) -> str | None:
        """Why nothing can be trained on it, as one line with the fix; None where something can."""
        return None

    def left_out(self) -> str | None:
        """Why it cannot be measured here and now, as one line with the fix; None where it can."""
        return None

    @property
    def filmed(self) -> bool:
        """Whether an episode makes a film: one picture or question does not."""
        return not (self.one_step or self.scored)

    def prompts(self, seeds: np.ndarray) -> dict | None:
        """The policy's columns of questions that do not depend on who answers; None: states depend on who acts."""
        return None

    @property
    def asks(self) -> bool:
        """Whether it has ``prompts``."""
        return type(self).prompts is not Task.prompts

    def compared_at(self) -> tuple[str, ...]:
        """Whose states policies are compared at here, in this order."""
        shown = self.has_demonstrations and (self.demonstration_count is None or self.held_out_count > 0)
        return ("base", *(["fine_tuned"] if not self.asks else []), *(["demonstrations"] if shown else []))

    def evaluation_seeds(self, episodes: int, start: int | None = None) -> list[int]:
        """The initial states of an evaluation: the first of the test split, or from ``start`` on (of either split)."""
        if episodes < 1:
            raise UserError(f"episodes must be at least 1, not {episodes}")
        train, test = self.seeds("train"), self.seeds("test")
        start = test.start if start is None else start
        if start < 0:
            raise UserError(f"seed_start must not be negative: {start}")
        split = train if start in train else test
        if start not in split or start + episodes > split.stop:
            raise UserError(
                f"{episodes} episodes from seed {start} on leave the split: training states are {train.start} to "
                f"{train.stop - 1}, test states {test.start} to {test.stop - 1}; choose another seed_start "
                "or fewer episodes"
            )
        return list(range(start, start + episodes))

    def sampling_noise(self, seed: int, stream: int, step: int, width: int) -> np.ndarray:
        """Uniform numbers for one decision of an episode, [width] float32 in [0, 1)."""
        return np.random.default_rng([seed, stream, step]).random(width, dtype=np.float32)

    def own_episodes(self, policy, keys: Sequence, temperature: float | None) -> Iterator | None:
        """The finished episodes (``rollout.Episode``) of an evaluation; None: the rollout loop runs them."""
        return None

    # ---- seeds

    def seeds(self, split: str) -> range:
        """Seeds of the initial states: train 0 .. 999,999, test from 1,000,000 on."""
        ranges = {"train": range(0, 1_000_000), "test": range(1_000_000, 2_000_000)}
        if split not in ranges:
            raise UserError(f"unknown split '{split}'; choose one of: test, train")
        return ranges[split]
