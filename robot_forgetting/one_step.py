"""One-step tasks: an observation, one decision, a reward. Classifiers are such tasks, and questions to language models.

They still make environments, so the rollout loop runs them like any robot; but a method that samples thousands of
decisions per optimiser step asks for all observations and all rewards at once (``answer``). Both ways draw the same
noise for the same episode and therefore agree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.contracts import checked_action, checked_columns, checked_commands, checked_rewards
from robot_forgetting.finite import check_probabilities
from robot_forgetting.policy import Action, Policy
from robot_forgetting.rollout import Episode, EpisodeKey
from robot_forgetting.task import Task, Transition, VectorEnv

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class OneStepTask(Task):
    """A data set of items; an episode's seed names its item, and seeds beyond the data set's size repeat it."""

    max_steps = 1
    instruction = ""
    one_step = True

    @abstractmethod
    def size(self, split: str) -> int:
        """Number of items."""

    @abstractmethod
    def observations(self, seeds: np.ndarray) -> dict:
        """The policy's columns, one row per seed."""

    @abstractmethod
    def rewards(self, seeds: np.ndarray, answers: Sequence) -> np.ndarray:
        """[N] float32 in 0 .. 1 for what ``policy.decode`` gave; 1 is a success."""

    def flags(self, seed: int, answer) -> dict:
        """What the records say of an answer besides its reward, under names other than 'success'."""
        return {}

    def prompts(self, seeds: np.ndarray) -> dict:
        return self.observations(seeds)

    # How many answers there are, if they are the numbers 0 .. choices - 1; None for free text.
    choices: int | None = None

    def labels(self):
        """The ``methods.labels.Labeler`` of supervised methods that bring none of their own; None: they must."""
        return None

    def items(self, seeds: np.ndarray) -> tuple[str, np.ndarray]:
        """The split that the seeds belong to, and the index of each one's item in it."""
        seeds = np.asarray(seeds)
        # int: a range looks for any other kind of number one element after the other.
        split = "train" if int(seeds[0]) in self.seeds("train") else "test"
        return split, (seeds - self.seeds(split).start) % self.size(split)

    def training_seeds(self, step: int, count: int, *, seed: int) -> np.ndarray:
        """[count] seeds of the ``step``-th batch: every epoch is a new shuffle, its incomplete last batch is dropped.

        The same for every method, so that runs of one seed see the same items in the same order.
        """
        size = self.size("train")
        count = min(count, size)
        epoch, batch = divmod(step, size // count)
        order = _order(seed, epoch, size)
        return self.seeds("train").start + order[batch * count : (batch + 1) * count]

    def sampling_noise(self, seed: int, stream: int, step: int, width: int) -> np.ndarray:
        """The rollout loop's sampling noise of one decision, [width]; see ``decision_noise``."""
        return decision_noise(np.array([seed]), np.array([stream]), width)[0]

    def own_episodes(self, policy: Policy, keys: Sequence[EpisodeKey], temperature: float) -> Iterator[Episode]:
        """The episodes that the rollout loop would run, many at once."""
        for start in range(0, len(keys), policy.decisions_at_once):
            chunk = keys[start : start + policy.decisions_at_once]
            streams = np.array([[key.stream] for key in chunk])
            found = answer(policy, self, np.array([key.seed for key in chunk]), streams, temperature=temperature)
            commands = policy.decode(found.action, statistics=self.statistics)
            cut = policy.cut_off(found.action)
            for index, (key, reward) in enumerate(zip(chunk, found.rewards.tolist(), strict=True)):
                row = {name: column[index] for name, column in found.obs.items()}
                episode = Episode(key, success=reward >= 1, reward=reward, observations=[row, row])
                episode.flags = {"success": episode.success, **self.flags(key.seed, commands[index])}
                episode.flags |= {"answer_cut": True} if cut[index] else {}
                episode.commands, episode.actions = [commands[index]], [found.action[index : index + 1]]
                yield episode

    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv:
        return OneStepEnv(self, num_envs)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0xE90C]).permutation(size)


def uniforms(seeds: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """[N] float32 in [0, 1), a function of (seed, stream) alone: a counter-based generator (splitmix64).

    numpy's generators take some 10 microseconds to seed, which at one decision per episode costs more than the policy.
    """
    with np.errstate(over="ignore"):
        state = _mixed(np.asarray(seeds).astype(np.uint64) + GOLDEN) ^ np.asarray(streams).astype(np.uint64)
        return ((_mixed(state * GOLDEN + GOLDEN) >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def decision_noise(seeds: np.ndarray, streams: np.ndarray, width: int) -> np.ndarray:
    """[N, width] ``uniforms``: the first column those of (seed, stream), further ones of streams of their own."""
    streams = np.asarray(streams).astype(np.uint64)
    return np.stack([uniforms(seeds, streams + np.uint64(column << 40)) for column in range(width)], 1)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Repeated:
    """A column of ``len(values) * times`` rows that holds each of its values once.

    Every value comes ``times`` times in a row (a group's decisions start from one observation). A policy that knows it
    computes each value once; indexing gives plain rows.
    """

    def __init__(self, values, times: int):
        self.values, self.times = values, times

    def __len__(self) -> int:
        return len(self.values) * self.times

    def __getitem__(self, index):
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        rows = np.arange(len(self))[index] // self.times
        return [self.values[row] for row in rows] if isinstance(self.values, list) else self.values[rows]


def repeated(obs: dict, times: int) -> dict:
    """Observation columns with every row ``times`` times; nothing is copied."""
    return obs if times == 1 else {key: Repeated(column, times) for key, column in obs.items()}


@dataclass(frozen=True)
class Answers:
    """N decisions of one-step episodes: the policy's columns, decisions, and rewards [N] float32."""

    obs: dict
    action: Action
    rewards: Tensor


@torch.no_grad()
def answer(
    policy: Policy, task: OneStepTask, seeds: np.ndarray, streams: np.ndarray, *, temperature: float = 1.0
) -> Answers:
    """The episodes (seeds [M], streams [M, G]) all at once: G decisions for each observation, M * G rows."""
    group = streams.shape[1]
    columns = checked_columns(task, task.observations(seeds), len(seeds))
    obs = repeated(columns, group)
    each = np.repeat(seeds, group)
    noise = torch.from_numpy(decision_noise(each, streams.ravel(), policy.noise_width))
    rows = len(each)
    action = checked_action(policy, policy.act(obs, temperature=temperature, noise=noise), rows).to("cpu")
    check_probabilities(policy, action)
    answers = checked_commands(policy, policy.decode(action, statistics=task.statistics), rows)
    rewards = checked_rewards(task, task.rewards(each, answers), rows)
    return Answers(obs, action, torch.from_numpy(rewards))


class OneStepEnv(VectorEnv):
    """The same as environments that end after one decision; one group."""

    def __init__(self, task: OneStepTask, num_envs: int):
        self.task, self.groups = task, [list(range(num_envs))]
        self._seeds: dict[int, int] = {}
        self._rows: dict[int, dict] = {}
        self._answers: list[list[Transition]] = []

    def request(self, group: int, resets: dict[int, int], commands: dict) -> None:
        made = []
        if commands:
            slots = list(commands)
            seeds = np.array([self._seeds[slot] for slot in slots])
            answers = [commands[slot] for slot in slots]
            rewards = self.task.rewards(seeds, answers)
            checked_rewards(self.task, rewards, len(slots))
            for slot, reward in zip(slots, map(float, rewards), strict=True):
                success = reward >= 1.0
                flags = {"success": success, **self.task.flags(self._seeds[slot], commands[slot])}
                made.append(Transition(slot, self._rows[slot], reward, success, True, flags))
        if resets:
            obs = self.task.observations(np.array(list(resets.values())))
            obs = checked_columns(self.task, obs, len(resets))
            for index, (slot, seed) in enumerate(resets.items()):
                self._seeds[slot] = seed
                self._rows[slot] = {key: column[index] for key, column in obs.items()}
                made.append(Transition(slot, self._rows[slot]))
        self._answers.append(made)

    def wait(self) -> tuple[int, list[Transition]]:
        return 0, self._answers.pop(0)

    def close(self) -> None:
        self._answers.clear()
