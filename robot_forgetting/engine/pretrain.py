"""Trains a base policy by behaviour cloning on several tasks at once, measures it, and writes its card."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from robot_forgetting.contracts import checked_hooks, checked_policy, checked_task
from robot_forgetting.engine.episode_rows import evaluate_into
from robot_forgetting.engine.experiment import open_run
from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import disk, write_atomic
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.method import Method
from robot_forgetting.methods.labels import GivenTargets, Labeler
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policy import ConventionSpec, Policy
from robot_forgetting.records.summary import summarise
from robot_forgetting.task import Demonstration, Task, VectorEnv


class Mixture(Task):
    """Demonstrations of several tasks; an environment it has not, so only offline methods can learn it."""

    def __init__(self, tasks: Sequence[Task], counts: dict[str, int]):
        check_counts(tasks, counts)
        for task in tasks:
            if counts.get(task.name) and not task.has_demonstrations:
                list(task.demonstrations(0))  # says what to do, before the others' are collected
        self.tasks, self.counts = list(tasks), dict(counts)
        self.name, self.instruction = "+".join(counts), ""
        self.max_steps = max(task.max_steps for task in tasks)
        self.statistics = self.tasks[0].statistics
        self._kept: list[Demonstration] | None = None

    def convention(self) -> ConventionSpec:
        return self.tasks[0].convention()

    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv:
        raise UserError(f"the mixture {self.name} has no environment; use an offline method such as sft")

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterator[Demonstration]:
        """All of them, kept after the first call (``count`` is the total)."""
        if self._kept is None:
            self._kept = []
            total = sum(self.counts.values())
            with bar("demonstrations", total) as progress:
                for task in self.tasks:
                    for episode in task.demonstrations(self.counts.get(task.name, 0), split=split, start=start):
                        self._kept.append(episode)
                        progress.advance(1, task.name)
        yield from self._kept


class Questions(OneStepTask):
    """Training questions of several text tasks with their targets; more than a task has are its own over again."""

    def __init__(self, tasks: Sequence[OneStepTask], counts: dict[str, int]):
        check_counts(tasks, counts)
        self.counts, self.name = dict(counts), "+".join(counts)
        known = {task.name: task for task in tasks}
        self._drawn = [
            (known[name], int(known[name].seeds("train").start) + index)
            for name, count in counts.items()
            for index in range(count)
        ]

    def convention(self) -> ConventionSpec:
        return self._drawn[0][0].convention()

    def size(self, split: str) -> int:
        return len(self._drawn)

    def observations(self, seeds: np.ndarray) -> dict:
        return {"messages": self._of_each(seeds, lambda task, own: task.observations(own)["messages"])}

    def targets(self, seeds: np.ndarray) -> list[str | None]:
        return self._of_each(seeds, lambda task, own: task.targets(own))

    def labels(self) -> Labeler:
        return GivenTargets()

    def rewards(self, seeds: np.ndarray, answers: Sequence) -> np.ndarray:
        raise UserError(f"the mixture {self.name} gives no rewards; its tasks do")

    def _of_each(self, seeds: np.ndarray, column: Callable) -> list:
        """A column of the seeds' questions, asked for once per task."""
        rows, found = [self._drawn[index] for index in self.items(seeds)[1]], [None] * len(seeds)
        for task in {id(task): task for task, _ in rows}.values():
            places = [place for place, (owner, _) in enumerate(rows) if owner is task]
            values = column(task, np.array([rows[place][1] for place in places]))
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found


def check_counts(tasks: Sequence[Task], counts: dict[str, int]) -> None:
    """``UserError`` where `pretrain.demonstrations` names tasks that are not there, or none."""
    unknown = set(counts) - {task.name for task in tasks}
    if unknown:
        raise UserError(f"pretrain.demonstrations names {sorted(unknown)}; these tasks are not in this run")
    for task in tasks:
        have, asked = task.demonstration_count, counts.get(task.name, 0)
        if have is not None and have < asked:
            raise UserError(f"pretrain.demonstrations.{task.name}={asked}: task '{task.name}' has {have} of them")
    if not sum(counts.values()):
        raise UserError("pretrain.demonstrations asks for none; for example {pick_cube: 1500, push_cube: 700}")


def ranges(episodes: Sequence[Demonstration]) -> dict:
    """OpenVLA's statistics of the commands: 1st and 99th percentile per dimension; the gripper passes unchanged."""
    commands = np.concatenate([episode.commands for episode in episodes]).astype(np.float64)
    rounded = {
        "q01": np.quantile(commands, 0.01, axis=0),
        "q99": np.quantile(commands, 0.99, axis=0),
        "min": commands.min(axis=0),
        "max": commands.max(axis=0),
    }
    table = {name: values.round(6).tolist() for name, values in rounded.items()}
    return {"action": {**table, "mask": [True] * (commands.shape[1] - 1) + [False]}}


def pretrain(
    policy: Policy,
    task: Task,
    prior: Sequence[Task],
    held_out: Sequence[Task],
    pretrain: dict,
    config: dict,
    names: dict,
    run_dir: Path,
    output: Path | None,
    seed: int,
    temperature: float,
    num_envs: int,
    processes: int,
    overrides: Sequence[str] = (),
) -> int:
    """Clones the experts of ``prior`` (and, a little, of ``task``) into a new policy; saves it to ``output``.

    pretrain: demonstrations (task -> count), optimiser, iterations, steps_per_iteration, batch_size, label_sigma,
        episodes (evaluated per task)
    overrides: of the command, for the card
    """
    from robot_forgetting.method import Optimiser
    from robot_forgetting.methods.sft import SFT

    text = task.one_step
    whole = not text and not getattr(policy, "lora", None)  # an adapter is saved alone: its checkpoint's ranges stay
    checked_policy(policy)
    for one in (task, *prior, *held_out):
        checked_task(one)
    checked_hooks(policy, ["encode", "save", *(["set_statistics"] if whole else [])], "pretrain")
    policy.check_training(compared=False)
    output = output or run_dir / "policy"
    with disk(output):  # now, and not after the training
        output.mkdir(parents=True, exist_ok=True)
    everything = [task, *prior, *held_out]
    mixture = (Questions if text else Mixture)([*prior, task], pretrain["demonstrations"])
    header = {"verb": "pretrain", "policy": names.get("policy"), "task": mixture.name, "method": "sft", "seed": seed}
    header |= {"decode": {"temperature": temperature}}
    header |= {"roles": {"new": [task.name], "prior": [t.name for t in prior], "held_out": [t.name for t in held_out]}}
    with open_run(run_dir, config, header) as folder:
        if folder.finished:
            say(f"{folder.path} is finished already; delete it to train again")
            return 0
        started = time.perf_counter()
        if not text:
            episodes = list(mixture.demonstrations(0))
            if whole:
                policy.set_statistics({mixture.statistics: ranges(episodes)})
        folder.add_seconds("demonstrations", time.perf_counter() - started)
        method: Method = SFT(
            iterations=pretrain["iterations"],
            steps_per_iteration=pretrain["steps_per_iteration"],
            batch_size=pretrain["batch_size"],
            demonstrations=sum(mixture.counts.values()),
            label_sigma=pretrain["label_sigma"],
            optimiser=None,
            seed=seed,
        )
        started = time.perf_counter()
        with bar("pretrain", method.iterations) as progress:

            def advanced(iteration: int, row: dict) -> None:
                progress.advance(iteration - progress.done, f"loss {row['loss']:.3f}")

            optimiser = Optimiser(**pretrain["optimiser"])
            train(
                policy,
                mixture,
                method,
                optimiser=optimiser,
                run=folder,
                seed=seed,
                processes=processes,
                progress=advanced,
            )
        folder.add_seconds("train", time.perf_counter() - started)
        policy.save(output)
        say(f"saved {output}")
        started = time.perf_counter()
        for decode, degree in (("sampled", temperature), ("greedy", 0.0)):
            for one in everything:
                role = "new" if one is task else "prior" if one in prior else "held_out"
                fields = {"stage": 0, "iteration": 0, "trained_on": [], "role": role, "decode": decode}
                seeds = one.evaluation_seeds(pretrain["episodes"], one.seeds("test").start + CARD_SEED)
                evaluate_into(folder, policy, one, seeds, temperature=degree, num_envs=num_envs, **fields)
        folder.add_seconds("evaluate", time.perf_counter() - started)
        summary = summarise(folder)
        facts = card(policy, summary, folder.run, pretrain, parent_facts(config), text, overrides)
        write_atomic(output / "README.md", facts)
        folder.finish(summary)
    say(f"card: {output / 'README.md'}")
    return 0


# The card's success rates are measured on seeds that no later experiment uses. (SimplerEnv's tasks have a fixed list of
# test states, which every evaluation uses; there only the sampling is another.)
CARD_SEED = 700_000


def parent_facts(config: dict) -> list[str]:
    """The facts on the card of the policy that training started from, if it did not start from random weights."""
    policy = config["policy"]
    parent = (policy.get("lora") or {}).get("adapter") or policy.get("checkpoint")
    file = Path(parent or "") / "README.md"
    if parent is None or not file.is_file():
        return [] if parent is None else [f"- started from: {parent}"]
    facts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    return [f"- started from: {parent}, whose card says:", *(f"  {line}" for line in facts)]


# What the card says of a policy on a robot, and of a language model.
WORDS = {
    False: {
        "made": "An OpenVLA with {size:.2f} million parameters, trained by behaviour cloning from scripted\n"
        "demonstrations in ManiSkill3.",
        "data": "demonstrations",
        "rows": "decisions",
        "measured": "Success on test seeds that nothing else uses (of SimplerEnv's tasks: fixed configurations, with\n"
        "sampling of its own)",
    },
    True: {
        "made": "A language model with {size:.2f} million parameters, trained from questions with their answers.",
        "data": "questions",
        "rows": "questions",
        "measured": "Success on test questions",
    },
}


def card(policy: Policy, summary: dict, run: dict, settings: dict, parent: list[str], text: bool, overrides) -> str:
    """What was trained, how, and how well it does: every number from the run folder."""
    parameters_m = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    parameters = ", ".join(f"{count} of {task}" for task, count in settings["demonstrations"].items())
    seconds = run["timings"]
    rows = [
        f"| {r['task']} | {r['role'].replace('_', '-')} | {r['decode']} | {r['successes']}/{r['n']} "
        f"| {r['rate']:.3f} | [{r['low']:.3f}, {r['high']:.3f}] |"
        for r in summary["success"]
    ]
    hardware, words = run.get("hardware", {}), WORDS[text]
    render = [] if text else [f"- render option: {run.get('render', {}).get('option')}"]
    return "\n".join(
        [
            "# Base policy",
            "",
            words["made"].format(size=parameters_m),
            "",
            f"- command: `{shlex.join(['robot-forgetting', 'pretrain', *overrides])}`",
            *parent,
            f"- seed: {run['seed']}; {words['data']}: {parameters}",
            f"- optimiser steps: {settings['iterations'] * settings['steps_per_iteration']} of "
            f"{settings['batch_size']} {words['rows']}",
            f"- duration: {seconds.get('demonstrations', 0):.0f} s {words['data']}, "
            f"{seconds.get('train', 0):.0f} s training, on {hardware.get('processor', 'CPU')} "
            f"({hardware.get('cores', '?')} cores)",
            *render,
            "",
            f"{words['measured']}; Wilson 95% intervals. `sampled` is temperature 1, the decode of",
            "rollouts; `greedy` is temperature 0.",
            "",
            "| task | role | decode | successes | rate | interval |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
