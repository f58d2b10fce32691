"""What `robot-forgetting evaluate` and `record` do: one policy on one task, of a base policy or of a finished run."""

from __future__ import annotations

from pathlib import Path

from robot_forgetting.engine.episode_rows import check_same_base, evaluate_into, identified
from robot_forgetting.engine.evaluate import check_conventions, success_line
from robot_forgetting.engine.experiment import benchmarks, open_run
from robot_forgetting.engine.films import record
from robot_forgetting.engine.run_policy import with_checkpoint
from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import Policy
from robot_forgetting.records.summary import SCORED, summarise
from robot_forgetting.records.video import Recording, write_grid
from robot_forgetting.task import Task


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
    """Success of a policy on a task, at the rollout decode and greedy; a benchmark's score by its own protocol."""
    check_conventions(policy, [task])
    if (reason := task.left_out()) is not None:
        raise UserError(reason)
    state = with_checkpoint(policy, checkpoint)
    seeds = task.evaluation_seeds(episodes or (None if task.scored else budget["episodes"]), seed_start)
    header = {"verb": "evaluate", "policy": names.get("policy"), "task": task.name, "seed": seed}
    header |= {"checkpoint": state["checkpoint"], "instructions": {task.name: task.instruction}}
    header |= identified(policy, [task])
    check_same_base(run_dir, header)
    header |= {"decode": {"temperature": temperature}, "roles": {"new": [task.name], "prior": [], "held_out": []}}
    header |= benchmarks([task]) | {key: state[key] for key in ("checkpoint_state",) if key in state}
    with open_run(run_dir, config, header) as folder:
        for decode, degree in [(SCORED, None)] if task.scored else [("sampled", temperature), ("greedy", 0.0)]:
            fields = {key: state[key] for key in ("stage", "iteration", "trained_on")}
            fields |= {"role": "new", "decode": decode}
            rows = evaluate_into(folder, policy, task, seeds, temperature=degree, num_envs=num_envs, **fields)
            how = decode if degree is None else f"{decode} (temperature {degree})"
            say(f"{how}: " + success_line(task.name, rows))
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
    made = record(policy, task, task.evaluation_seeds(episodes or 4, seed_start), folder, who, temperature, num_envs)
    if not made:
        raise UserError("no episode could be recorded; see the lines above")
    tiles = [Recording(episode.frames, episode.success) for episode in made]
    grid = write_grid(folder / f"{task.name}-{who}-grid.mp4", tiles, title=f"{task.name}: {task.instruction}")
    say(f"{sum(e.success for e in made)} of {len(made)} succeeded; videos in {folder}, all at once in {grid}")
    return 0
