"""The experiment: measure the base policy, fine-tune it on the new task, measure again. Every step can be resumed."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.evaluate import (
    check_conventions,
    demonstration_states,
    episode_row,
    evaluate,
    measure_divergence,
    policy_states,
    success_line,
    test_seeds,
)
from robot_forgetting.files import read_json
from robot_forgetting.method import Method, Penalty
from robot_forgetting.policy import Policy
from robot_forgetting.progress import bar, say
from robot_forgetting.records import RunFolder
from robot_forgetting.rollout import Episode
from robot_forgetting.summary import summarise
from robot_forgetting.task import Task
from robot_forgetting.train import latest_checkpoint, load_weights, train
from robot_forgetting.video import Recording, video_name, write_episode, write_grid

FINAL_STAGE = 1
# Divergence is measured on states of their own, neither trained on nor counted in a success rate.
DIVERGENCE_SEED = 500_000
VIDEO_SEED = 600_000


def run(
    policy: Policy,
    task: Task,
    method: Method,
    penalty: Penalty | None,
    prior: Sequence[Task],
    held_out: Sequence[Task],
    budget: dict,
    names: dict,
    config: dict,
    run_dir: Path,
    seed: int,
    temperature: float,
    episodes: int | None,
    seed_start: int | None,
    num_envs: int,
    processes: int,
) -> int:
    """Fine-tunes ``policy`` on ``task`` and records what it gained and forgot; continues an unfinished run."""
    roles = assign_roles(task, prior, held_out)
    check_conventions(policy, [t for tasks in roles.values() for t in tasks])
    header = {
        "verb": "run",
        "policy": names.get("policy"),
        "task": task.name,
        "method": names.get("method"),
        "penalty": None if penalty is None else names.get("penalty"),
        "seed": seed,
        "decode": {"temperature": temperature},
        "roles": {role: [t.name for t in tasks] for role, tasks in roles.items()},
        "fingerprint": fingerprint(policy, [t for tasks in roles.values() for t in tasks]),
        "iterations": method.iterations,
        "instructions": {t.name: t.instruction for tasks in roles.values() for t in tasks},
    }
    check_same_base(run_dir, header["fingerprint"])
    with open_run(run_dir, config, header) as folder:
        if folder.finished:
            say(f"{folder.path} is finished already; delete it to measure again")
            return 0
        experiment = Experiment(
            policy,
            task,
            method,
            penalty,
            roles,
            folder,
            budget,
            seed,
            temperature,
            episodes,
            seed_start,
            num_envs,
            processes,
        )
        experiment.go()
    return 0


def assign_roles(task: Task, prior: Sequence[Task], held_out: Sequence[Task]) -> dict[str, list[Task]]:
    """Role -> tasks. The new task is no longer held out; no task may have two roles otherwise."""
    roles = {"new": [task], "prior": list(prior), "held_out": [other for other in held_out if other.name != task.name]}
    names = [other.name for tasks in roles.values() for other in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task '{name}' has two roles; name it once among task, prior and held_out")
    return roles


class Experiment:
    """The steps of one run, each of which looks at the records first and does only what is missing."""

    def __init__(
        self,
        policy,
        task,
        method,
        penalty,
        roles,
        folder,
        budget,
        seed,
        temperature,
        episodes,
        seed_start,
        num_envs,
        processes,
    ):
        self.policy, self.task, self.method, self.penalty = policy, task, method, penalty
        self.roles, self.folder, self.budget, self.seed = roles, folder, budget, seed
        self.temperature, self.seed_start, self.num_envs = temperature, seed_start, num_envs
        self.processes = processes
        self.episodes = episodes or budget["episodes"]
        points = budget["interim_points"]
        # Evaluated between the base and the end, evenly spaced: the curve along which methods are compared.
        self.interim = {round(method.iterations * k / (points + 1)) for k in range(1, points + 1)} - {
            0,
            method.iterations,
        }

    def go(self) -> None:
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
                seed=self.seed,
                penalties=[] if self.penalty is None else [self.penalty],
                past=self.roles["prior"],
                processes=self.processes,
                after_iteration=self.interim_evaluation,
                progress=advanced,
            )
        if getattr(self.policy, "lora", None) is not None:
            self.policy.save(self.folder.path / "adapter")
        with self.timed("evaluate_final"):
            self.measure_success(stage=FINAL_STAGE, iteration=done)
        with self.timed("divergence"):
            self.measure_drift(done)
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
            self.measure_drift(iteration, interim=True)

    def measure_success(self, *, stage: int, iteration: int, interim: bool = False) -> None:
        """Evaluates every task at every decode; interim points at the rollout decode only, with fewer episodes."""
        for decode, count in ({"sampled": self.budget["interim_episodes"]} if interim else self.counts()).items():
            for role, tasks in self.roles.items():
                if interim and role == "held_out":
                    continue
                for task in tasks:
                    self.measure_task(task, role, decode, count, stage, iteration)

    def counts(self) -> dict[str, int]:
        """Episodes per task at each decode, before and after."""
        return {"sampled": self.episodes, "greedy": min(self.budget["greedy_episodes"], self.episodes)}

    def measure_task(self, task: Task, role: str, decode: str, count: int, stage: int, iteration: int) -> None:
        temperature = self.temperature if decode == "sampled" else 0.0
        seeds = test_seeds(task, count, self.seed_start)
        rows = evaluate_into(
            self.folder,
            self.policy,
            task,
            seeds,
            temperature=temperature,
            num_envs=self.num_envs,
            stage=stage,
            iteration=iteration,
            trained_on=[self.task.name] if stage else [],
            role=role,
            decode=decode,
        )
        where = "base" if stage == 0 else f"iteration {iteration}"
        say(f"  {self.folder.id}, {where}, {decode}: " + success_line(task.name, rows))

    def reuse_base_rows(self) -> None:
        """Copies the base policy's episodes from a sibling run that measured the same thing; their source is marked."""
        mine = self.folder.run
        have = {_identity(row) for row in self.folder.episodes()}
        wanted = {
            (0, 0, task.name, decode, seed): number
            for decode, count in self.counts().items()
            for tasks in self.roles.values()
            for task in tasks
            for number, seed in enumerate(test_seeds(task, count, self.seed_start))
        }
        for sibling in sorted(self.folder.path.parent.glob("*/run.json")):
            try:
                other = RunFolder(sibling.parent)
                theirs = other.run
            except UserError:  # a damaged sibling is no reason to stop a healthy run
                continue
            if other.path == self.folder.path or theirs.get("fingerprint") != mine["fingerprint"]:
                continue
            if theirs.get("decode") != mine["decode"]:
                continue
            rows = [
                {**row, "episode": wanted[_identity(row)], "source": row["source"] or other.id, "video": None}
                for row in other.episodes()
                if _identity(row) in wanted.keys() - have and row["role"] == self.role_of(row["task"])
            ]
            if rows:
                self.folder.append("episodes", *rows)
                have |= {_identity(row) for row in rows}

    def role_of(self, name: str) -> str | None:
        return next((role for role, tasks in self.roles.items() if name in [t.name for t in tasks]), None)

    # ---- divergence

    def measure_drift(self, iteration: int, *, interim: bool = False) -> None:
        """Divergence from the base on named states; interim points on the new task's base states only."""
        have = {(r["iteration"], r["task"], r["states"]) for r in self.folder.rows("divergence")}
        count, limit = self.budget["divergence_episodes"], self.budget["divergence_states"]
        for role, tasks in self.roles.items():
            for task in tasks if role != "held_out" else []:
                for name in ("base", "fine_tuned", "demonstrations"):
                    if (iteration, task.name, name) in have or (interim and (role, name) != ("new", "base")):
                        continue
                    if name == "demonstrations" and not task.has_demonstrations:
                        continue  # a task without an expert can still be learned by RL
                    states = self.states(name, task, count, limit)
                    rows = measure_divergence(self.policy, states, seed=self.seed)
                    fields = {"stage": FINAL_STAGE, "iteration": iteration, "task": task.name, "role": role}
                    self.folder.append("divergence", *({**fields, "states": name, **row} for row in rows))

    def states(self, name: str, task: Task, count: int, limit: int):
        seeds = [task.seeds("test").start + DIVERGENCE_SEED + i for i in range(count)]
        if name == "demonstrations":
            return demonstration_states(task, count, limit=limit)
        if name == "fine_tuned":
            return policy_states(self.policy, task, seeds, num_envs=self.num_envs, limit=limit)
        with self.policy.base():
            return policy_states(self.policy, task, seeds, num_envs=self.num_envs, limit=limit)

    # ---- videos

    def record_videos(self, who: str) -> None:
        """The same initial states for every policy, so that before and after can be watched side by side."""
        count = self.budget["videos"]
        for role, tasks in self.roles.items():
            for task in tasks if role != "held_out" else []:
                seeds = [task.seeds("test").start + VIDEO_SEED + i for i in range(count)]
                missing = [s for s in seeds if not list(self.folder.videos.glob(f"{task.name}-seed{s}-{who}-*.mp4"))]
                if missing:
                    record(self.policy, task, missing, self.folder.videos, who, self.temperature, self.num_envs)


# ---- shared by the commands


def _identity(row: dict) -> tuple:
    return row["stage"], row["iteration"], row["task"], row["decode"], row["seed"]


@contextmanager
def open_run(run_dir: Path, config: dict, header: dict) -> Iterator[RunFolder]:
    """Opens a run folder for writing, with provenance; how it ended is written into run.json."""
    from robot_forgetting.doctor import hardware, render_backend, versions

    environment = {"versions": versions(), "hardware": hardware(), "render": render_backend()}
    environment["render"]["option"] = config.get("render")
    with RunFolder.create(run_dir, config=config, run={**header, **environment}) as folder:
        yield folder


def fingerprint(policy: Policy, tasks: Sequence[Task]) -> str:
    """Identifies a base policy's weights together with the tasks it is measured on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        if "lora_" in name:  # fresh adapters change with the seed, the base they leave as it is does not
            continue
        digest.update(f"{name} {list(tensor.shape)}".encode())
        # A sample of the numbers: a 7B model is fingerprinted in seconds, and two checkpoints do not agree in all of
        # them. (Sums would do too, but their rounding depends on the number of threads.)
        step = max(1, tensor.numel() // 4096)
        digest.update(tensor.detach().flatten()[::step].double().cpu().numpy().tobytes())
    for task in tasks:
        spec = getattr(task, "spec", None)
        said = [type(task).__qualname__, task.name, task.instruction, task.max_steps, spec.as_dict() if spec else None]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def check_same_base(run_dir: Path, mark: str) -> None:
    """``UserError`` where a run began with other weights under the same name, as after training a base policy anew."""
    if (Path(run_dir) / "run.json").is_file():
        earlier = RunFolder(run_dir).run.get("fingerprint", mark)
        if earlier != mark:
            raise UserError(
                f"{run_dir} began with another base policy or other tasks (fingerprint {earlier}, now {mark}); "
                "delete it, or choose another run_dir"
            )


def evaluate_into(
    folder: RunFolder,
    policy: Policy,
    task: Task,
    seeds: Sequence[int],
    *,
    temperature: float,
    num_envs: int,
    **fields,
) -> list[dict]:
    """Evaluates the seeds that ``folder`` lacks, row by row; returns all rows of these seeds."""
    wanted = {(fields["stage"], fields["iteration"], task.name, fields["decode"], seed) for seed in seeds}
    rows = [row for row in folder.episodes() if _identity(row) in wanted]
    missing = [seed for seed in seeds if seed not in {row["seed"] for row in rows}]
    if not missing:
        return rows
    split = "train" if seeds[0] in task.seeds("train") else "test"
    common = {**fields, "task": task.name, "split": split, "temperature": temperature}
    with bar(f"{task.name} ({fields['decode']})", len(seeds), len(rows)) as progress:
        for episode in evaluate(policy, task, missing, temperature=temperature, num_envs=num_envs):
            row = episode_row(episode, **common, episode=seeds.index(episode.key.seed))
            folder.append("episodes", row)
            rows.append(row)
            progress.advance(1, f"success {sum(r['success'] for r in rows) / len(rows):.2f}")
    return rows


def record(
    policy: Policy, task: Task, seeds: Sequence[int], folder: Path, who: str, temperature: float, num_envs: int
) -> list[Episode]:
    """Records one mp4 per seed into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    episodes = []
    slots = min(num_envs, len(seeds))
    for episode in evaluate(policy, task, seeds, temperature=temperature, num_envs=slots, render=True):
        if episode.error:
            say(f"  {task.name}, seed {episode.key.seed}: no video, {episode.error}")
            continue
        name = video_name(task.name, episode.key.seed, who, episode.success)
        write_episode(folder / name, episode.frames, task.instruction, np.stack(episode.commands), episode.success)
        episodes.append(episode)
    return sorted(episodes, key=lambda episode: episode.key.seed)


def with_checkpoint(policy: Policy, run: str | None) -> dict:
    """Loads the fine-tuned weights of a run folder into its base policy, if asked.

    Returns what the policy now is: {"who", "checkpoint", "stage", "iteration", "trained_on"}.
    """
    if run is None:
        return {"who": "base", "checkpoint": None, "stage": 0, "iteration": 0, "trained_on": []}
    folder = RunFolder(run)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint; finish `robot-forgetting run` there first")
    load_weights(policy, checkpoint)
    iteration = read_json(checkpoint / "state.json")["iteration"]
    state = {"stage": FINAL_STAGE, "iteration": iteration, "trained_on": folder.run["roles"]["new"]}
    return {"who": folder.run["method"], "checkpoint": str(run), **state}


def evaluate_command(
    policy: Policy,
    task: Task,
    run_dir: Path,
    checkpoint: str | None,
    config: dict,
    names: dict,
    seed: int,
    episodes: int | None,
    seed_start: int | None,
    temperature: float,
    num_envs: int,
    budget: dict,
) -> int:
    """Success of a policy on a task, at the rollout decode and greedy."""
    check_conventions(policy, [task])
    state = with_checkpoint(policy, checkpoint)
    seeds = test_seeds(task, episodes or budget["episodes"], seed_start)
    header = {"verb": "evaluate", "policy": names.get("policy"), "task": task.name, "seed": seed}
    header |= {"checkpoint": state["checkpoint"], "instructions": {task.name: task.instruction}}
    header["fingerprint"] = fingerprint(policy, [task])
    check_same_base(run_dir, header["fingerprint"])
    header |= {"decode": {"temperature": temperature}, "roles": {"new": [task.name], "prior": [], "held_out": []}}
    with open_run(run_dir, config, header) as folder:
        for decode, degree in (("sampled", temperature), ("greedy", 0.0)):
            fields = {key: state[key] for key in ("stage", "iteration", "trained_on")} | {
                "role": "new",
                "decode": decode,
            }
            rows = evaluate_into(folder, policy, task, seeds, temperature=degree, num_envs=num_envs, **fields)
            say(f"{decode} (temperature {degree}): " + success_line(task.name, rows))
        folder.finish(summarise(folder))
    say(f"records: {folder.path}")
    return 0


def record_command(
    policy: Policy,
    task: Task,
    checkpoint: str | None,
    output: Path | None,
    episodes: int | None,
    seed_start: int | None,
    temperature: float,
    num_envs: int,
) -> int:
    """One mp4 per episode into ``videos/`` (or ``output``), and a grid of them all."""
    check_conventions(policy, [task])
    who = with_checkpoint(policy, checkpoint)["who"]
    folder = output or Path("videos")
    made = record(policy, task, test_seeds(task, episodes or 4, seed_start), folder, who, temperature, num_envs)
    if not made:
        raise UserError("no episode could be recorded; see the lines above")
    tiles = [Recording(e.frames, task.instruction, np.stack(e.commands), e.success) for e in made]
    grid = write_grid(folder / f"{task.name}-{who}-grid.mp4", tiles, title=f"{task.name}: {task.instruction}")
    say(f"{sum(e.success for e in made)} of {len(made)} succeeded; videos in {folder}, all at once in {grid}")
    return 0
