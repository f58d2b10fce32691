"""The one rollout loop: training, evaluation and video all run episodes through it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from robot_forgetting.contracts import checked_action, checked_commands, checked_transition
from robot_forgetting.finite import check_probabilities
from robot_forgetting.policy import Action, Policy
from robot_forgetting.task import Task, VectorEnv


@dataclass(frozen=True)
class EpisodeKey:
    """What an episode depends on besides the policy: the initial state, and the stream of its sampling noise."""

    seed: int
    stream: int = 0


@dataclass
class Episode:
    """A finished episode of L decisions.

    observations: L + 1 rows of the policy's columns (the last is never acted on)
    tokens, log_prob: [L, T]; mask: [L, T] bool
    commands: what was sent to the environment, L rows
    frames: L + 1 larger pictures, if the environment renders them
    """

    key: EpisodeKey
    success: bool = False
    reward: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    flags: dict = field(default_factory=dict)
    observations: list[dict] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    commands: list = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.actions)

    def instructions(self, otherwise: str) -> list[str]:
        """What the policy was told at each of the L + 1 observations; ``otherwise`` where they do not say."""
        return [row.get("instruction", otherwise) for row in self.observations]

    def action(self) -> Action:
        """All decisions of the episode, [L, T]."""
        return Action.cat(self.actions)


def columns(rows: Sequence[dict]) -> dict:
    """Observation rows to the policy's columns: arrays are stacked, everything else becomes a list."""
    return {
        key: np.stack([row[key] for row in rows])
        if isinstance(rows[0][key], np.ndarray)
        else [row[key] for row in rows]
        for key in rows[0]
    }


def rollout(
    policy: Policy,
    task: Task,
    keys: Sequence[EpisodeKey],
    *,
    num_envs: int,
    temperature: float = 1.0,
    render: bool = False,
    env: VectorEnv | None = None,
) -> Iterator[Episode]:
    """Runs the episodes and yields each when it ends.

    An episode is a function of (policy, task, key, temperature) only: its sampling noise comes from its own key, and
    the policy always acts on as many rows as a group of ``num_envs`` has, so that not even rounding depends on how many
    other episodes happen to run beside it. Episodes are dealt to groups in advance, for the same reason.
    """
    if not keys:
        return
    own = env is None
    env = task.make_env(min(num_envs, len(keys)), render=render) if own else env
    groups = max(len(env.groups), min(num_envs, task.processes)) if own else len(env.groups)
    width = max(-(-num_envs // groups), *map(len, env.groups))
    try:
        yield from _rollout(policy, task, env, list(keys), temperature, width)
    finally:
        if own:
            env.close()


def noise_of_many(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """[rows, width] sampling noise from one generator, whose first 16 columns are the same for every width."""
    first = rng.random((rows, 16), dtype=np.float32)
    return np.concatenate([first, rng.random((rows, max(0, width - 16)), dtype=np.float32)], axis=1)[:, :width]


class _Slot:
    """What one environment slot is doing."""

    def __init__(self):
        self.episode: Episode | None = None
        self.row: dict | None = None
        self.started = 0.0


def _rollout(policy, task, env, keys, temperature, width) -> Iterator[Episode]:
    queues = [keys[group :: len(env.groups)][::-1] for group in range(len(env.groups))]
    slots = {slot: _Slot() for group in env.groups for slot in group}
    running = 0
    for group, members in enumerate(env.groups):
        resets = {slot: _begin(slots[slot], queues[group].pop()) for slot in members if queues[group]}
        if resets:
            env.request(group, resets, {})
            running += 1
    while running:
        group, transitions = env.wait()
        running -= 1
        resets, finished = {}, []
        for transition in transitions:
            slot = slots[checked_transition(env, transition).slot]
            _record(slot, transition)
            if transition.done:
                finished.append(slot.episode)
                slot.episode = None
                if queues[group]:
                    resets[transition.slot] = _begin(slots[transition.slot], queues[group].pop())
        # A slot that was just reset has no observation yet; it acts from the next round on.
        active = [slot for slot in env.groups[group] if slots[slot].episode is not None and slot not in resets]
        members = env.groups[group]
        commands = _act(policy, task, [slots[slot] for slot in members], members, active, temperature, width)
        if resets or commands:
            env.request(group, resets, commands)
            running += 1
        yield from finished


def _begin(slot: _Slot, key: EpisodeKey) -> int:
    slot.episode, slot.started = Episode(key), time.perf_counter()
    return key.seed


def _record(slot: _Slot, transition) -> None:
    episode, observation = slot.episode, dict(transition.observation)
    if "frame" in observation:
        episode.frames.append(observation.pop("frame"))
    slot.row = observation
    episode.observations.append(observation)
    episode.reward += transition.reward
    if transition.done:
        episode.success = transition.success and transition.error is None
        episode.error, episode.flags = transition.error, transition.info
        episode.seconds = time.perf_counter() - slot.started


def _act(policy, task, members, names, active, temperature, width) -> dict:
    """Commands for a group's active slots. Old pictures fill the batch up to ``width`` rows (see ``rollout``)."""
    if not active:
        return {}
    filler = next(slot.row for slot in members if slot.row is not None)
    rows = [slot.row if slot.row is not None else filler for slot in members]
    rows += [filler] * (width - len(rows))
    noise = np.zeros((len(rows), policy.noise_width), np.float32)
    for index, (name, slot) in enumerate(zip(names, members, strict=True)):
        if name in active:
            key, step = slot.episode.key, slot.episode.steps
            noise[index] = task.sampling_noise(key.seed, key.stream, step, policy.noise_width)
    chosen_action = policy.act(columns(rows), temperature=temperature, noise=torch.from_numpy(noise))
    action = checked_action(policy, chosen_action, len(rows)).to("cpu")
    check_probabilities(policy, action)
    commands = checked_commands(policy, policy.decode(action, statistics=task.statistics), len(rows))
    chosen = {}
    for index, (name, slot) in enumerate(zip(names, members, strict=True)):
        if name in active:
            slot.episode.actions.append(action[index : index + 1])
            slot.episode.commands.append(commands[index])
            chosen[name] = commands[index]
    return chosen
