"""Measures a policy: success on fixed test states, and how far its action distributions have moved from the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from robot_forgetting.contracts import checked_policy, checked_task
from robot_forgetting.errors import UserError
from robot_forgetting.finite import check_weights
from robot_forgetting.machine.progress import say
from robot_forgetting.methods.sft import demonstration_columns, take_columns
from robot_forgetting.metrics import divergence as distances
from robot_forgetting.metrics.statistics import clustered_mean
from robot_forgetting.policy import ConventionSpec, Policy
from robot_forgetting.rollout import Episode, EpisodeKey, columns, noise_of_many, rollout
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
    policy: Policy,
    task: Task,
    seeds: Sequence[int],
    *,
    temperature: float | None,
    num_envs: int,
    render: bool = False,
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


# ---- divergence


@dataclass(frozen=True)
class States:
    """Observations from a named distribution: columns of N rows, and the episode each came from [N]."""

    obs: dict
    episode: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)


def policy_states(policy: Policy, task: Task, seeds: Sequence[int], *, num_envs: int, limit: int) -> States:
    """Every state a policy visits on ``seeds`` at temperature 1, thinned evenly to ``limit``.

    Questions are asked, not visited: of one-step tasks, and of scored ones that show their ``prompts``, these are the
    items' observations, whatever the policy.
    """
    if (asked := task.prompts(np.asarray(seeds))) is not None:
        return _thin(asked, np.asarray(seeds), limit)
    episodes = sorted(evaluate(policy, task, seeds, temperature=1.0, num_envs=num_envs), key=lambda e: e.key.seed)
    rows = [row for episode in episodes for row in episode.observations[: episode.steps]]
    index = np.repeat([episode.key.seed for episode in episodes], [episode.steps for episode in episodes])
    return _thin(columns(rows), index, limit) if rows else States({}, index)


def demonstration_states(task: Task, count: int, *, limit: int) -> States:
    """The states of ``count`` expert episodes that no method trains on."""
    episodes = list(task.held_out_demonstrations(count))
    obs = demonstration_columns(task, episodes)
    return _thin(obs, np.repeat([e.seed for e in episodes], [len(e.commands) for e in episodes]), limit)


def _thin(obs: dict, episode: np.ndarray, limit: int) -> States:
    keep = np.unique(np.linspace(0, len(episode) - 1, min(limit, len(episode))).round().astype(int))
    return States(take_columns(obs, keep), episode[keep])


ALONG_BASE = {
    "forward_kl": distances.forward_kl,
    "total_variation": distances.total_variation,
    "l2": distances.l2,
}  # at the base's tokens
ALONG_OWN = {"reverse_kl": distances.reverse_kl}  # at the current policy's


@torch.no_grad()
def measure_divergence(policy: Policy, states: States, *, chunk: int | None = None, seed: int = 0) -> list[dict]:
    """Divergences between base and current policy on given states; rows without stage, task and states.

    At each state one decision is sampled from the base and one from the current policy (temperature 1). Along the
    base's tokens, forward KL, total variation and L2 are exact per token; along the current policy's, reverse KL.
    chunk: states compared at once; None: as many as memory has room for
    Summed over a decision's tokens, the KL terms are unbiased for the KL of whole decisions (chain rule). Standard
    errors treat an episode's states as one cluster.
    """
    policy.eval()
    chunk = chunk or policy.rows_at_once()
    collected: dict[tuple[str, str], list[torch.Tensor]] = {}
    noise = torch.from_numpy(noise_of_many(np.random.default_rng([seed, 0xD1]), len(states), policy.noise_width))
    for start in range(0, len(states), chunk):
        obs = {key: column[start : start + chunk] for key, column in states.obs.items()}
        drawn = noise[start : start + chunk]
        with policy.base():
            base_action = policy.act(obs, temperature=1.0, noise=drawn)
        action = policy.act(obs, temperature=1.0, noise=drawn)
        along_base = policy.compared(obs, base_action, ALONG_BASE)
        along_own = policy.compared(obs, action, ALONG_OWN)
        for name, values, mask in [
            *((name, values, base_action.mask) for name, values in along_base.items()),
            *((name, values, action.mask) for name, values in along_own.items()),
        ]:
            mask = mask.to(values.device)
            unit = "nats/token" if name.endswith("kl") else "1/token"
            collected.setdefault((name, unit), []).append(distances.per_token(values, mask).cpu())
            if name.endswith("kl"):
                collected.setdefault((name, "nats/decision"), []).append(distances.per_decision(values, mask).cpu())
    clusters = states.episode.tolist()
    rows = []
    for (name, unit), parts in collected.items():
        value, error = clustered_mean(torch.cat(parts).tolist(), clusters)
        row = {"measure": name, "unit": unit, "value": value, "standard_error": error}
        rows.append({**row, "n": len(states), "episodes": len(set(clusters))})
    return rows


def success_line(name: str, rows: Sequence[dict]) -> str:
    """'pick_cube: 87/100 = 0.87 [0.79, 0.92]' for the terminal."""
    from robot_forgetting.metrics.statistics import wilson

    won = sum(row["success"] for row in rows)
    low, high = wilson(won, len(rows))
    return f"{name}: {won}/{len(rows)} = {won / max(1, len(rows)):.2f} [{low:.2f}, {high:.2f}]"
