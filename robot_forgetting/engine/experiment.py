"""The experiment: measure the base policy, fine-tune it on one task after the other, measure after each. Every step can
be resumed."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from robot_forgetting.engine.drift_rows import Drift
from robot_forgetting.engine.episode_rows import check_same_base, identified
from robot_forgetting.engine.evaluate import check_conventions
from robot_forgetting.engine.films import record_missing
from robot_forgetting.engine.preflight import check_parts, try_parts
from robot_forgetting.engine.roles import assign_roles, roles_in, stages_of
from robot_forgetting.engine.run_policy import start_from
from robot_forgetting.engine.success import Success
from robot_forgetting.engine.train import restore, train
from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import Bar, bar, say
from robot_forgetting.measure import Measure
from robot_forgetting.method import Method, Penalty
from robot_forgetting.methods.labels import check_targets
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import drop_moments, drop_stages, stage_store
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import summarise
from robot_forgetting.scored import measurable
from robot_forgetting.stage import Stage
from robot_forgetting.task import Task


@dataclass(frozen=True)
class Setup:
    """What one run is made of: the objects, and how they are measured.

    sequence: the new tasks, learned one after the other
    budget: episodes, greedy_episodes, interim_points, interim_episodes, divergence_episodes, divergence_states, videos
    names: group -> the name chosen in it, for the records; config: the resolved configuration, kept with them
    measures: of the change at a checkpoint; held_out_text: on which a language model's layers are compared, see
        ``held_out_texts``; None, or without a source: they are not
    checkpoint: a finished run whose fine-tuned policy is this one's base; None: the policy as it is
    temperature: of the sampled decode; episodes: per task, None for the budget's; seed_start: first initial state, None
        for the first of the test split
    keep_stages: whether the weights after each stage of a sequence are kept once it is done, not the last ones alone
    """

    policy: Policy
    sequence: Sequence[Task]
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
    measures: Sequence[Measure] = ()
    held_out_text: dict | None = None
    checkpoint: str | None = None
    keep_stages: bool = False


def run(setup: Setup) -> int:
    """Fine-tunes the policy on the tasks and records what it gained and forgot; continues an unfinished run."""
    for task in setup.sequence:
        check_parts(setup.policy, task, setup.method, setup.penalty)
        check_data(setup.method, task)
    prior, left_out = measurable(setup.prior)
    started = start_from(setup.policy, setup.checkpoint, setup.config)
    experiment = Experiment(replace(setup, prior=prior), started)
    left_out |= experiment.drift.without
    for reason in dict.fromkeys(left_out.values()):
        say(f"left out: {reason}")
    check_conventions(setup.policy, experiment.tasks)
    setup.policy.check_training()
    for task in setup.sequence:
        setup.method.check(setup.policy, task)
    header = experiment.header() | {"left_out": left_out, "undefined": experiment.drift.undefined}
    check_same_base(setup.run_dir, header)
    with open_run(setup.run_dir, setup.config, header) as folder:
        if folder.finished:
            if not setup.keep_stages:
                drop_stages(folder)  # where it was stopped before it could
            say(f"{folder.path} is finished already; delete it to measure again")
            return 0
        experiment.go(folder)
    return 0


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
        self.policy, self.method, self.budget = setup.policy, setup.method, setup.budget
        self.penalties = [] if setup.penalty is None else [setup.penalty]
        self.roles = assign_roles(setup.sequence, setup.prior, setup.held_out)
        self.stages = stages_of(self.roles)
        self.tasks = [task for tasks in self.roles.values() for task in tasks]
        points, end = self.budget["interim_points"], setup.method.iterations
        # Evaluated within each stage, evenly spaced: the curve along which methods are compared.
        self.interim = {round(end * k / (points + 1)) for k in range(1, points + 1)} - {0, end}
        self.success = Success(
            self.policy,
            self.budget,
            temperature=setup.temperature,
            episodes=setup.episodes,
            seed_start=setup.seed_start,
            num_envs=setup.num_envs,
        )
        self.drift = Drift(
            setup.measures,
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
        learned = _names(self.roles["new"])
        return {
            "verb": "run",
            "policy": setup.names.get("policy"),
            "task": " + ".join(learned),
            "method": setup.names.get("method"),
            "measures": {one.name: {"title": one.title, "similarity": one.similarity} for one in self.drift.measures},
            "penalty": None if setup.penalty is None else setup.names.get("penalty"),
            "seed": setup.seed,
            "decode": {"temperature": setup.temperature},
            "roles": {role: _names(tasks) for role, tasks in self.roles.items()},
            "sequence": learned,
            "stages": [
                {role: _names(tasks) for role, tasks in roles_in(self.roles, stage.number).items()}
                for stage in self.stages
            ],
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
            slots = min(self.setup.num_envs, self.success.episodes)
            for stage in self.stages:
                try_parts(self.policy, stage.task, self.method, self.setup.penalty, slots)
        with self.timed("evaluate_base"):
            roles = roles_in(self.roles, 0)
            self.success.reuse_base_rows(folder, roles)
            self.success.measure(folder, roles, stage=0, iteration=0, trained_on=self.started["trained_on"])
            self.record_videos([task for role in roles if role != "held_out" for task in roles[role]], "base")
        with self.policy.base():
            pass  # the frozen copy is taken now, before the first gradient step
        first = min(max(1, folder.run.get("stage") or 1), len(self.stages))
        if first > 1:
            with self.timed("train"):
                self.go_back_to(self.stages[first - 2])
        for stage in self.stages[first - 1 :]:
            self.go_through(stage)
        if getattr(self.policy, "lora", None) is not None:
            self.policy.save(folder.path / "adapter")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        folder.finish(summarise(folder), peak_memory_bytes=peak)
        if not self.setup.keep_stages:
            drop_stages(folder)
        say(f"finished: {folder.path}")

    def store(self, stage: Stage) -> Path:
        """Where a stage's checkpoint is."""
        return self.folder.checkpoints if len(self.stages) == 1 else stage_store(self.folder, stage.number)

    def go_back_to(self, stage: Stage) -> None:
        """Policy, method and penalties as they were at the end of a stage."""
        before = self.store(self.stages[stage.number - 2]) if stage.number > 1 else None
        restore(self.policy, stage, self.method, self.penalties, start=before, store=self.store(stage))

    def go_through(self, stage: Stage) -> None:
        """Trains one stage and measures what it did."""
        number = stage.number
        if number > 1:
            self.folder.update(stage=number)  # what a restart begins with
            drop_moments(self.store(self.stages[number - 2]))
        title = f"train {self.folder.id}" + (f", {stage.task.name}" if len(self.stages) > 1 else "")
        with self.timed("train"), bar(title, self.method.iterations) as progress:
            done = train(
                self.policy,
                stage.task,
                self.method,
                optimiser=self.method.optimiser,
                run=self.folder,
                seed=self.setup.seed,
                penalties=self.penalties,
                past=stage.past,
                stage=number,
                store=self.store(stage),
                processes=self.setup.processes,
                after_iteration=lambda iteration: self.interim_evaluation(stage, iteration),
                progress=lambda iteration, row: _show(progress, iteration, row),
            )
        with self.timed("evaluate_final"):
            self.measure_success(stage, done)
        with self.timed("divergence"):
            self.measure_drift(stage, done)
        with self.timed("videos"):
            method = self.folder.run["method"]
            who = method if len(self.stages) == 1 else f"{method}_stage{number}"
            roles = roles_in(self.roles, number)
            self.record_videos([*roles["new"], *roles["prior"]], who)

    def interim_evaluation(self, stage: Stage, iteration: int) -> None:
        if iteration in self.interim:
            self.measure_success(stage, iteration, interim=True)
            self.measure_drift(stage, iteration, interim=True)

    def measure_success(self, stage: Stage, iteration: int, interim: bool = False) -> None:
        roles = roles_in(self.roles, stage.number)
        learned = [*self.started["trained_on"], *_names(self.roles["new"][: stage.number])]
        where = {"stage": stage.number, "iteration": iteration, "interim": interim}
        self.success.measure(self.folder, roles, trained_on=learned, **where)

    def measure_drift(self, stage: Stage, iteration: int, interim: bool = False) -> None:
        roles = roles_in(self.roles, stage.number)
        seen = {role: tasks for role, tasks in roles.items() if role != "unseen"}
        self.drift.measure(self.folder, seen, stage=stage.number, iteration=iteration, interim=interim)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.folder.add_seconds(name, time.perf_counter() - started)

    def record_videos(self, tasks: Sequence[Task], who: str) -> None:
        temperature, num_envs = self.setup.temperature, self.setup.num_envs
        record_missing(self.policy, tasks, self.budget["videos"], self.folder.videos, who, temperature, num_envs)


def _names(tasks: Sequence[Task]) -> list[str]:
    return [task.name for task in tasks]


def _show(progress: Bar, iteration: int, row: dict) -> None:
    success = row.get("rollout_success")
    loss = "no signal" if row["loss"] is None else f"loss {row['loss']:.3f}"
    progress.advance(iteration - progress.done, loss if success is None else f"{loss}, success {success:.2f}")


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
