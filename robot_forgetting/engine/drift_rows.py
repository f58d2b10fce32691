"""How far the policy has moved from its base at a checkpoint: every measure, on named states of every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from robot_forgetting.contracts import checked_kind
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.measure import BASE, DEMONSTRATIONS, TEXT, WEIGHTS, Measure, States, measured
from robot_forgetting.measures.held_out_texts import held_out_texts
from robot_forgetting.methods.sft import demonstration_columns, take_columns
from robot_forgetting.policy import Policy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.rollout import columns
from robot_forgetting.task import Task

# Divergence is measured on states of their own, neither trained on nor counted in a success rate.
DIVERGENCE_SEED = 500_000


class Drift:
    """Writes rows of divergence.jsonl, only those that are missing.

    measures: those that the policy can be measured by are taken; tasks: all of the run
    budget: divergence_episodes, divergence_states; held_out_text: see ``held_out_texts``
    undefined: {measure that says nothing about this policy: why}; without: {what is not measured: a line that says so}
    """

    def __init__(
        self,
        measures: Sequence[Measure],
        policy: Policy,
        tasks: Sequence[Task],
        budget: Mapping,
        *,
        held_out_text: dict | None,
        seed: int,
        num_envs: int,
    ):
        self.policy, self.seed, self.num_envs = policy, seed, num_envs
        self.count, self.limit = budget["divergence_episodes"], budget["divergence_states"]
        self.without: dict[str, str] = {}
        self.undefined: dict[str, str] = {}
        self.measures = self._defined(measures)
        for task in tasks:
            if task.has_demonstrations and DEMONSTRATIONS not in task.compared_at() and not task.scored:
                where = f"demonstrations of '{task.name}'"
                self.without[where] = f"nothing is measured at {where}: all there are may be learned from"
        self.source, self.texts = (held_out_text or {}).get("source"), []
        if self.source is not None:
            self._read_texts(held_out_text, tasks)

    def _defined(self, measures: Sequence[Measure]) -> list[Measure]:
        """Those that say something about the policy; of the others the reason, said once for all that share it."""
        for one in measures:
            checked_kind("measure", one, Measure)
            if [other.name for other in measures].count(one.name) > 1:
                raise UserError(f"two of the measures are called '{one.name}'; name each once in measures=")
            if reason := one.undefined(self.policy):
                self.undefined[one.name] = reason
        for reason in dict.fromkeys(self.undefined.values()):
            names = ", ".join(name for name, other in self.undefined.items() if other == reason)
            self.without[names] = f"{names}: {reason}"
        return [one for one in measures if one.name not in self.undefined]

    def _read_texts(self, settings: dict, tasks: Sequence[Task]) -> None:
        if not self.policy.blocks:
            reason = f"policy '{self.policy.name}' shows no layers"
        elif self.policy.layers_read != TEXT:
            return  # they read observations of the tasks
        else:
            try:
                self.texts = held_out_texts(settings, tasks, DIVERGENCE_SEED)
                return
            except LookupError as error:
                reason = f"{error}; add it to prior, or choose another held_out_text.source"
        self.without["drift by layer"] = f"drift by layer is not measured: {reason}"

    def measure(
        self,
        folder: RunFolder,
        roles: Mapping[str, Sequence[Task]],
        *,
        stage: int,
        iteration: int,
        interim: bool = False,
    ) -> None:
        """All measures at named states, on texts and of the weights; of the states, interim points have only the
        base's on the new task. roles: role -> tasks, as they are in this stage."""
        here = {"stage": stage, "iteration": iteration}
        have = {
            (row["task"], row["states"], row["measure"])
            for row in folder.rows("divergence")
            if (row["stage"], row["iteration"]) == (stage, iteration)
        }
        for task, fields in self._places(roles, interim):
            name = fields["states"]
            missing = [
                one
                for one in self.measures
                if name in one.at(self.policy) and (fields["task"], name, one.name) not in have
            ]
            states = self.states(name, task) if missing else None
            if not missing or (not len(states) and name != WEIGHTS):
                continue  # or every episode broke off before its first step; the summary lists such errors
            rows = measured(missing, self.policy, states)
            folder.append("divergence", *({**here, **fields, **row} for row in rows))
            odd = {row["measure"]: row["value"] for row in rows if not np.isfinite(row["value"] or 0.0)}
            for measure, value in odd.items():
                where = f"{folder.id}, stage {stage}, iteration {iteration}"
                say(f"  {where}: {measure} ({name}) is {value}; its row says null")

    def _places(self, roles: Mapping[str, Sequence[Task]], interim: bool) -> Iterator[tuple[Task | None, dict]]:
        """(task, {"task", "role", "states"}) of everything that is looked at, in the order of the rows."""
        for role, tasks in roles.items() if self.count and self.limit else ():
            for task in tasks if role != "held_out" else ():
                for name in task.compared_at():
                    if not interim or (role, name) == ("new", BASE):
                        yield task, {"task": task.name, "role": role, "states": name}
        if self.texts:
            yield None, {"task": self.source, "role": TEXT, "states": TEXT}
        yield None, {"task": None, "role": None, "states": WEIGHTS}

    def states(self, name: str, task: Task | None) -> States:
        """The states of that name."""
        if name == WEIGHTS:
            return States({}, np.empty(0, np.int64), WEIGHTS)
        if name == TEXT:
            return States({TEXT: self.texts}, np.arange(len(self.texts)), TEXT, self.seed)
        if name == DEMONSTRATIONS:
            found = demonstration_states(task, self.count, limit=self.limit)
        else:
            seeds = [task.seeds("test").start + DIVERGENCE_SEED + i for i in range(self.count)]
            with self.policy.base() if name == BASE else nullcontext():
                found = policy_states(self.policy, task, seeds, num_envs=self.num_envs, limit=self.limit)
        return replace(found, name=name, seed=self.seed)


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
