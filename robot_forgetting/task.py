"""Tasks and vectorised environments: everything that is specific to a domain lives behind these two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

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


@dataclass(frozen=True)
class Demonstration:
    """One successful expert episode: L observations (uint8 [L, H, W, 3]) and the expert's L commands [L, A].

    instruction: one for all of them, or L where it changes within an episode
    """

    images: np.ndarray
    commands: np.ndarray
    instruction: str | Sequence[str]
    seed: int

    @property
    def instructions(self) -> list[str]:
        """One per command."""
        said = self.instruction
        return [said] * len(self.commands) if isinstance(said, str) else list(said)


class Task(ABC):
    """One task. Train and test seeds never overlap."""

    name: str
    instruction: str
    instructions: tuple[str, ...] = ()  # where episodes give one or several of these; ``instruction`` is their summary
    max_steps: int

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

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterable[Demonstration]:
        """Successful expert episodes in the order of their seeds."""
        raise UserError(f"task '{self.name}' has no demonstrations; give it an expert, or use a method that needs none")

    @property
    def has_demonstrations(self) -> bool:
        """Whether ``demonstrations`` gives any."""
        return type(self).demonstrations is not Task.demonstrations

    def seeds(self, split: str) -> range:
        """Seeds of the initial states: train 0 .. 999,999, test from 1,000,000 on."""
        ranges = {"train": range(0, 1_000_000), "test": range(1_000_000, 2_000_000)}
        if split not in ranges:
            raise UserError(f"unknown split '{split}'; choose one of: test, train")
        return ranges[split]
