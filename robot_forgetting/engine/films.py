"""Videos of a run's policies: the same initial states for all of them, so that they can be watched side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.machine.files import disk
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import Policy
from robot_forgetting.records.video import video_name, write_episode
from robot_forgetting.rollout import Episode
from robot_forgetting.task import Task

VIDEO_SEED = 600_000  # from it on: neither trained on, nor measured


def record_missing(
    policy: Policy, tasks: Iterable[Task], count: int, folder: Path, who: str, temperature: float, num_envs: int
) -> None:
    """``count`` videos of each task that can be filmed, into ``folder``, but for those that are there."""
    for task in tasks:
        if not task.filmed:
            continue
        seeds = [task.seeds("test").start + VIDEO_SEED + i for i in range(count)]
        missing = [seed for seed in seeds if not list(folder.glob(f"{task.name}-seed{seed}-{who}-*.mp4"))]
        if missing:
            record(policy, task, missing, folder, who, temperature, num_envs)


def record(
    policy: Policy, task: Task, seeds: Sequence[int], folder: Path, who: str, temperature: float, num_envs: int
) -> list[Episode]:
    """Records one mp4 per seed into ``folder``."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    episodes = []
    slots = min(num_envs, len(seeds))
    for episode in evaluate(policy, task, seeds, temperature=temperature, num_envs=slots, render=True):
        if not episode.frames:  # the environment draws nothing larger than what the policy sees
            episode.frames = [row["image"] for row in episode.observations if "image" in row]
        if episode.error or not episode.frames:
            say(f"  {task.name}, seed {episode.key.seed}: no video, {episode.error or 'it shows no image'}")
            continue
        name = video_name(task.name, episode.key.seed, who, episode.success)
        said = episode.instructions(task.instruction)
        write_episode(folder / name, episode.frames, said, np.stack(episode.commands), episode.success)
        episodes.append(episode)
    return sorted(episodes, key=lambda episode: episode.key.seed)
