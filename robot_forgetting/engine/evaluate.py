"""Measures a policy: success on fixed test states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robot_forgetting.contracts import checked_policy, checked_task
from robot_forgetting.errors import UserError
from robot_forgetting.finite import check_weights
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import ConventionSpec, Policy
from robot_forgetting.rollout import Episode, EpisodeKey, rollout
from robot_forgetting.task import Task

# Sampling noise of evaluation: one stream for every policy, so that the same seed is the same test for all (paired).
STREAM = 1_000_000


def check_conventions(policy: Policy, tasks: Sequence[Task]) -> None:
    """Compares what policy and tasks mean by an action and an observation; a difference is a ``UserError``."""
    checked_policy(policy)
    compare_conventions(policy.convention(), policy.name, tasks)


def compare_conventions(ours: ConventionSpec, name: str, tasks: Sequence[Task]) -> None:
    """As ``check_conventions``, for a policy that need not be there yet."""
    for task in tasks:
        checked_task(task)
        theirs = task.convention()
        if problems := ours.mismatches(theirs):
            raise UserError(
                f"policy '{name}' and task '{task.name}' disagree on {'; '.join(problems)} "
                "(policy against task); choose a matching pair or change the task's settings"
            )


def evaluate(
    policy: Policy, task: Task, seeds: Sequence[int], *, temperature: float | None, num_envs: int, render: bool = False
) -> Iterator[Episode]:
    """One episode per seed, in the order in which they end. A scored task has no use for a temperature (None)."""
    policy.eval()
    check_weights(policy)
    keys, cut = [EpisodeKey(seed, STREAM) for seed in seeds], 0
    episodes = task.own_episodes(policy, keys, temperature)
    if episodes is None:
        episodes = rollout(policy, task, keys, num_envs=num_envs, temperature=temperature, render=render)
    for episode in episodes:
        cut += bool(episode.flags.get("answer_cut"))
        yield episode
    if cut > 0.05 * len(keys):
        say(f"  {task.name}: {cut} of {len(keys)} answers were stopped by their longest length, unfinished")


def episode_row(episode: Episode, /, **fields) -> dict:
    """A row of episodes.jsonl."""
    return {
        **fields,
        "seed": episode.key.seed,
        "success": episode.success,
        "reward": episode.reward,
        "steps": episode.steps,
        "seconds": round(episode.seconds, 3),
        "flags": episode.flags,
        "error": episode.error,
        "video": None,
        "source": None,
    }


def success_line(name: str, rows: Sequence[dict]) -> str:
    """'pick_cube: 87/100 = 0.87 [0.79, 0.92]' for the terminal."""
    from robot_forgetting.metrics.statistics import wilson

    won = sum(row["success"] for row in rows)
    low, high = wilson(won, len(rows))
    return f"{name}: {won}/{len(rows)} = {won / max(1, len(rows)):.2f} [{low:.2f}, {high:.2f}]"
