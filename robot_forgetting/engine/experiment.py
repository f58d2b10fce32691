"""The experiment: measure the base policy, fine-tune it on the new task, measure again. Every step can be resumed."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robot_forgetting.engine.drift import Drift
from robot_forgetting.engine.episode_rows import check_same_base, evaluate_into, identified, reuse
from robot_forgetting.engine.evaluate import check_conventions, evaluate, success_line
from robot_forgetting.engine.preflight import check_parts, try_parts
from robot_forgetting.engine.run_policy import FINAL_STAGE, start_from
from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import disk
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.method import Method, Penalty
from robot_forgetting.methods.labels import check_targets
from robot_forgetting.policy import Policy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import SCORED, summarise
from robot_forgetting.records.video import video_name, write_episode
from robot_forgetting.rollout import Episode
from robot_forgetting.scored import measurable
from robot_forgetting.task import Task

VIDEO_SEED = 600_000  # from it on: neither trained on, nor measured


@dataclass(frozen=True)
class Setup:
    """What one run is made of: the objects, and how they are measured.

    budget: episodes, greedy_episodes, interim_points, interim_episodes, divergence_episodes, divergence_states, videos
    names: group -> the name chosen in it, for the records; config: the resolved configuration, kept with them
    held_out_text: see ``layers.held_out_texts``; None, or without a source: a policy's layers are not compared
    checkpoint: a finished run whose fine-tuned policy is this one's base; None: the policy as it is
    temperature: of the sampled decode; episodes: per task, None for the budget's; seed_start: first initial state, None
        for the first of the test split
    """

    policy: Policy
    task: Task
    method: Method
    penalty: Penalty | None
    prior: Sequence[Task]
    held_out: Sequence[Task]
    budget: dict
    names: dict
    config: dict
    run_dir: Path
    seed: int
    temperature: float
    episodes: int | None
    seed_start: int | None
    num_envs: int
    processes: int
    held_out_text: dict | None = None
    checkpoint: str | None = None


def run(setup: Setup) -> int:
    """Fine-tunes the policy on the task and records what it gained and forgot; continues an unfinished run."""
    check_parts(setup.policy, setup.task, setup.method, setup.penalty)
    prior, left_out = measurable(setup.prior)
    started = start_from(setup.policy, setup.checkpoint, setup.config)
    experiment = Experiment(replace(setup, prior=prior), started)
    left_out |= experiment.drift.without
    for reason in left_out.values():
        say(f"left out: {reason}")
    check_conventions(setup.policy, experiment.tasks)
    check_data(setup.method, setup.task)
    setup.policy.check_training()
    setup.method.check(setup.policy, setup.task)
    header = experiment.header() | {"left_out": left_out}
    check_same_base(setup.run_dir, header)
    with open_run(setup.run_dir, setup.config, header) as folder:
        if folder.finished:
            say(f"{folder.path} is finished already; delete it to measure again")
            return 0
        experiment.go(folder)
    return 0


def assign_roles(task: Task, prior: Sequence[Task], held_out: Sequence[Task]) -> dict[str, list[Task]]:
    """Role -> tasks. The new task is no longer held out; no task may have two roles otherwise."""
    roles = {"new": [task], "prior": list(prior), "held_out": [other for other in held_out if other.name != task.name]}
    names = [other.name for tasks in roles.values() for other in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task '{name}' has two roles; name it once among task, prior and held_out")
    return roles


def check_data(method: Method, task: Task) -> None:
    """``UserError``, before anything is measured, where a method imitates what the task does not have."""
    if (reason := task.untrainable()) is not None:
        raise UserError(reason)
    if task.one_step:
        check_targets(method, task)
    elif getattr(method, "demonstrations", 0) and not task.has_demonstrations:
        list(task.demonstrations(0))  # says what to do


class Experiment:
    """The steps of one run, each of which looks at the records first and does only what is missing."""

    folder: RunFolder  # set by ``go``

    def __init__(self, setup: Setup, started: dict):
        self.started, self.setup = started, setup
        self.policy, self.task, self.method = setup.policy, setup.task, setup.method
        self.roles = assign_roles(setup.task, setup.prior, setup.held_out)
        self.tasks = [task for tasks in self.roles.values() for task in tasks]
        self.budget = setup.budget
        self.episodes = setup.episodes or self.budget["episodes"]
        points, end = self.budget["interim_points"], setup.method.iterations
        # Evaluated between the base and the end, evenly spaced: the curve along which methods are compared.
        self.interim = {round(end * k / (points + 1)) for k in range(1, points + 1)} - {0, end}
        self.drift = Drift(
            self.policy,
            self.tasks,
            self.budget,
            held_out_text=setup.held_out_text,
            seed=setup.seed,
            num_envs=setup.num_envs,
        )

    def header(self) -> dict:
        """What run.json says of the run before it begins."""
        setup = self.setup
        return {
            "verb": "run",
            "policy": setup.names.get("policy"),
            "task": self.task.name,
            "method": setup.names.get("method"),
            "penalty": None if setup.penalty is None else setup.names.get("penalty"),
            "seed": setup.seed,
            "decode": {"temperature": setup.temperature},
            "roles": {role: [task.name for task in tasks] for role, tasks in self.roles.items()},
            **identified(self.policy, self.tasks),
            "iterations": self.method.iterations,
            "instructions": {task.name: task.instruction for task in self.tasks},
            **benchmarks(self.tasks),
            **({key: self.started[key] for key in ("checkpoint", "checkpoint_state")} if self.setup.checkpoint else {}),
        }

    def go(self, folder: RunFolder) -> None:
        """All steps, into ``folder``."""
        self.folder = folder
        with self.timed("preflight"):
            slots = min(self.setup.num_envs, self.episodes)
            try_parts(self.policy, self.task, self.method, self.setup.penalty, slots)
        with self.timed("evaluate_base"):
            self.reuse_base_rows()
            self.measure_success(stage=0, iteration=0)
            self.record_videos("base")
        with self.policy.base():
            pass  # the frozen copy is taken now, before the first gradient step
        with self.timed("train"), bar(f"train {self.folder.id}", self.method.iterations) as progress:

            def advanced(iteration: int, row: dict) -> None:
                success = row.get("rollout_success")
                loss = "no signal" if row["loss"] is None else f"loss {row['loss']:.3f}"
                progress.advance(
                    iteration - progress.done, loss if success is None else f"{loss}, success {success:.2f}"
                )

            done = train(
                self.policy,
                self.task,
                self.method,
                optimiser=self.method.optimiser,
                run=self.folder,
                seed=self.setup.seed,
                penalties=[] if self.setup.penalty is None else [self.setup.penalty],
                past=self.roles["prior"],
                processes=self.setup.processes,
                after_iteration=self.interim_evaluation,
                progress=advanced,
            )
        if getattr(self.policy, "lora", None) is not None:
            self.policy.save(self.folder.path / "adapter")
        with self.timed("evaluate_final"):
            self.measure_success(stage=FINAL_STAGE, iteration=done)
        with self.timed("divergence"):
            self.drift.measure(self.folder, self.roles, stage=FINAL_STAGE, iteration=done)
        with self.timed("videos"):
            self.record_videos(self.folder.run["method"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.folder.finish(summarise(self.folder), peak_memory_bytes=peak)
        say(f"finished: {self.folder.path}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.folder.add_seconds(name, time.perf_counter() - started)

    # ---- success

    def interim_evaluation(self, iteration: int) -> None:
        if iteration in self.interim:
            self.measure_success(stage=FINAL_STAGE, iteration=iteration, interim=True)
            self.drift.measure(self.folder, self.roles, stage=FINAL_STAGE, iteration=iteration, interim=True)

    def measure_success(self, *, stage: int, iteration: int, interim: bool = False) -> None:
        """Evaluates every task at every decode; interim points at the rollout decode only, with fewer episodes."""
        for decode in ("sampled", "greedy", SCORED):
            for role, tasks in self.roles.items():
                if interim and role == "held_out":
                    continue
                for task in tasks:
                    if seeds := self.plan(task, interim=interim).get(decode):
                        self.measure_task(task, role, decode, seeds, stage, iteration)

    def plan(self, task: Task, *, interim: bool = False) -> dict[str, list[int]]:
        """Decode -> seeds on which a task is evaluated."""
        fewer = self.budget["interim_episodes"]
        if task.scored:
            count = fewer if interim else self.setup.episodes
            return {} if count == 0 else {SCORED: task.evaluation_seeds(count)}
        counts = {"sampled": fewer} if interim else self.counts()
        start = self.setup.seed_start
        return {decode: task.evaluation_seeds(count, start) for decode, count in counts.items() if count}

    def counts(self) -> dict[str, int]:
        """Episodes per task at each decode, before and after."""
        return {"sampled": self.episodes, "greedy": min(self.budget["greedy_episodes"], self.episodes)}

    def temperature(self, decode: str) -> float | None:
        return {"sampled": self.setup.temperature, "greedy": 0.0, SCORED: None}[decode]

    def measure_task(self, task: Task, role: str, decode: str, seeds: list[int], stage: int, iteration: int) -> None:
        rows = evaluate_into(
            self.folder,
            self.policy,
            task,
            seeds,
            temperature=self.temperature(decode),
            num_envs=self.setup.num_envs,
            stage=stage,
            iteration=iteration,
            trained_on=[*self.started["trained_on"], *([self.task.name] if stage else [])],
            role=role,
            decode=decode,
        )
        where = "base" if stage == 0 else f"iteration {iteration}"
        say(f"  {self.folder.id}, {where}, {decode}: " + success_line(task.name, rows))

    def reuse_base_rows(self) -> None:
        """Takes what sibling runs have measured of the same base policy."""
        wanted = {
            (0, 0, task.name, decode, self.temperature(decode), seed): number
            for task in self.tasks
            for decode, seeds in self.plan(task).items()
            for number, seed in enumerate(seeds)
        }
        reuse(self.folder, wanted, self.role_of)

    def role_of(self, name: str) -> str | None:
        return next((role for role, tasks in self.roles.items() if name in [t.name for t in tasks]), None)

    # ---- videos

    def record_videos(self, who: str) -> None:
        """The same initial states for every policy, so that before and after can be watched side by side."""
        count = self.budget["videos"]
        for role, tasks in self.roles.items():
            for task in tasks if role != "held_out" else []:
                if not task.filmed:
                    continue
                seeds = [task.seeds("test").start + VIDEO_SEED + i for i in range(count)]
                missing = [s for s in seeds if not list(self.folder.videos.glob(f"{task.name}-seed{s}-{who}-*.mp4"))]
                if missing:
                    temperature, num_envs = self.setup.temperature, self.setup.num_envs
                    record(self.policy, task, missing, self.folder.videos, who, temperature, num_envs)


# ---- shared by the commands


def benchmarks(tasks: Sequence[Task]) -> dict:
    """What run.json says of scored tasks: their protocols, and the rate that guessing reaches on the chosen items."""
    scored = [task for task in tasks if task.scored]
    return {
        "protocols": {task.name: task.settings() for task in scored},
        "chance": {task.name: task.chance(task.chosen(None)) for task in scored},
    }


@contextmanager
def open_run(run_dir: Path, config: dict, header: dict) -> Iterator[RunFolder]:
    """Opens a run folder for writing, with provenance; how it ended is written into run.json."""
    from robot_forgetting.machine.doctor import hardware, render_backend, versions

    environment = {"versions": versions(), "hardware": hardware(), "render": render_backend()}
    environment["render"]["option"] = (config.get("task") or {}).get("render", config.get("render"))
    with RunFolder.create(run_dir, config=config, run={**header, **environment}) as folder:
        yield folder


def record(
    policy: Policy, task: Task, seeds: Sequence[int], folder: Path, who: str, temperature: float, num_envs: int
) -> list[Episode]:
    """Records one mp4 per seed into ``folder``."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    episodes = []
    slots = min(num_envs, len(seeds))
    for episode in evaluate(policy, task, seeds, temperature=temperature, num_envs=slots, render=True):
        if episode.error:
            say(f"  {task.name}, seed {episode.key.seed}: no video, {episode.error}")
            continue
        name = video_name(task.name, episode.key.seed, who, episode.success)
        said = episode.instructions(task.instruction)
        write_episode(folder / name, episode.frames, said, np.stack(episode.commands), episode.success)
        episodes.append(episode)
    return sorted(episodes, key=lambda episode: episode.key.seed)
