"""How far the policy has moved from its base at a checkpoint: every measure, on named states of every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robot_forgetting.engine.evaluate import demonstration_states, measure_divergence, policy_states
from robot_forgetting.measure import WEIGHTS
from robot_forgetting.measures.drift_by_layer import held_out_texts, measure_layers
from robot_forgetting.policy import Policy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.task import Task

# Divergence is measured on states of their own, neither trained on nor counted in a success rate.
DIVERGENCE_SEED = 500_000


class Drift:
    """Writes rows of divergence.jsonl, only those that are missing.

    tasks: all of the run; budget: divergence_episodes, divergence_states; held_out_text: see ``held_out_texts``
    without: {what is not measured: why}
    """

    def __init__(
        self,
        policy: Policy,
        tasks: Sequence[Task],
        budget: Mapping,
        *,
        held_out_text: dict | None,
        seed: int,
        num_envs: int,
    ):
        self.policy, self.budget, self.seed, self.num_envs = policy, budget, seed, num_envs
        self.held_out_text = held_out_text or {}
        self.texts, self.without = self._read_texts(tasks)

    def _read_texts(self, tasks: Sequence[Task]) -> tuple[list[str], dict[str, str]]:
        """The texts on which layers are compared; {what is not measured: why} where this run has none."""
        settings = self.held_out_text
        if settings.get("source") is None:
            return [], {}
        if not self.policy.blocks:
            reason = f"drift by layer is not measured: policy '{self.policy.name}' shows no layers"
            return [], {"drift by layer": reason}
        try:
            return held_out_texts(settings, tasks, DIVERGENCE_SEED), {}
        except LookupError as error:
            fix = "add it to prior, or choose another held_out_text.source"
            return [], {"drift by layer": f"drift by layer is not measured: {error}; {fix}"}

    def measure(
        self,
        folder: RunFolder,
        roles: Mapping[str, Sequence[Task]],
        *,
        stage: int,
        iteration: int,
        interim: bool = False,
    ) -> None:
        """Divergence from the base on named states, and layer by layer; of the states, interim points have only the
        base's on the new task. roles: role -> tasks, as they are in this stage."""
        have = {
            (row["task"], row["states"])
            for row in folder.rows("divergence")
            if (row["stage"], row["iteration"]) == (stage, iteration)
        }
        checkpoint = {"stage": stage, "iteration": iteration}
        count, limit = self.budget["divergence_episodes"], self.budget["divergence_states"]
        for role, tasks in roles.items() if count and limit else ():
            for task in tasks if role != "held_out" else []:
                for name in task.compared_at():
                    if (task.name, name) in have or (interim and (role, name) != ("new", "base")):
                        continue
                    states = self.states(name, task, count, limit)
                    if not len(states):  # every episode broke off before its first step; the summary lists such errors
                        continue
                    rows = measure_divergence(self.policy, states, seed=self.seed)
                    fields = {**checkpoint, "task": task.name, "role": role}
                    folder.append("divergence", *({**fields, "states": name, **row} for row in rows))
        if self.texts and (None, WEIGHTS) not in have:
            source, k = self.held_out_text["source"], self.held_out_text["neighbours"]
            rows = measure_layers(self.policy, self.texts, source=source, k=k)
            folder.append("divergence", *({**checkpoint, **row} for row in rows))

    def states(self, name: str, task: Task, count: int, limit: int):
        seeds = [task.seeds("test").start + DIVERGENCE_SEED + i for i in range(count)]
        if name == "demonstrations":
            return demonstration_states(task, count, limit=limit)
        if name == "fine_tuned":
            return policy_states(self.policy, task, seeds, num_envs=self.num_envs, limit=limit)
        with self.policy.base():
            return policy_states(self.policy, task, seeds, num_envs=self.num_envs, limit=limit)
