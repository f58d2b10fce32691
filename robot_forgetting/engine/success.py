"""Success at a checkpoint: every task of a run, at every decode, on the same initial states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robot_forgetting.engine.episode_rows import evaluate_into, reuse
from robot_forgetting.engine.evaluate import success_line
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import Policy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import SCORED
from robot_forgetting.task import Task


class Success:
    """Writes rows of episodes.jsonl, only those that are missing.

    budget: episodes, greedy_episodes, interim_episodes; the other arguments: see ``experiment.Setup``
    """

    def __init__(
        self,
        policy: Policy,
        budget: Mapping,
        *,
        temperature: float,
        episodes: int | None,
        seed_start: int | None,
        num_envs: int,
    ):
        self.policy, self.budget, self.num_envs = policy, budget, num_envs
        self.chosen, self.seed_start = episodes, seed_start
        self.episodes = episodes or budget["episodes"]
        self.temperatures = {"sampled": temperature, "greedy": 0.0, SCORED: None}

    def measure(
        self,
        folder: RunFolder,
        roles: Mapping[str, Sequence[Task]],
        *,
        stage: int,
        iteration: int,
        trained_on: Sequence[str],
        interim: bool = False,
    ) -> None:
        """Evaluates every task at every decode; interim points at the rollout decode only, on the new and the prior
        tasks, with fewer episodes. roles: role -> tasks, as they are in this stage."""
        where = "base" if stage == 0 else f"stage {stage}, iteration {iteration}"
        for decode, temperature in self.temperatures.items():
            for role, tasks in roles.items():
                for task in tasks if role in ("new", "prior") or not interim else []:
                    seeds = self.plan(task, interim=interim).get(decode)
                    if not seeds:
                        continue
                    fields = {"stage": stage, "iteration": iteration, "trained_on": list(trained_on)}
                    fields |= {"role": role, "decode": decode, "temperature": temperature}
                    rows = evaluate_into(folder, self.policy, task, seeds, num_envs=self.num_envs, **fields)
                    say(f"  {folder.id}, {where}, {decode}: " + success_line(task.name, rows))

    def plan(self, task: Task, *, interim: bool = False) -> dict[str, list[int]]:
        """Decode -> seeds on which a task is evaluated."""
        fewer = self.budget["interim_episodes"]
        if task.scored:
            count = fewer if interim else self.chosen
            return {} if count == 0 else {SCORED: task.evaluation_seeds(count)}
        greedy = min(self.budget["greedy_episodes"], self.episodes)
        counts = {"sampled": fewer} if interim else {"sampled": self.episodes, "greedy": greedy}
        return {decode: task.evaluation_seeds(count, self.seed_start) for decode, count in counts.items() if count}

    def reuse_base_rows(self, folder: RunFolder, roles: Mapping[str, Sequence[Task]]) -> None:
        """Takes what sibling runs have measured of the same base policy."""
        wanted = {
            (0, 0, task.name, decode, self.temperatures[decode], seed): (number, role)
            for role, tasks in roles.items()
            for task in tasks
            for decode, seeds in self.plan(task).items()
            for number, seed in enumerate(seeds)
        }
        reuse(folder, wanted)
