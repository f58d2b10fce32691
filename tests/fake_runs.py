"""Run folders with made-up numbers, to develop and test the report against. Nothing in them was measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import summarise
from robot_forgetting.records.video import video_name, write_episode

ROLES = {"new": ["stack_cube"], "prior": ["pick_cube", "push_cube", "pull_cube"], "held_out": ["place_sphere"]}
INSTRUCTIONS = {
    "stack_cube": "stack the red cube on the green cube",
    "pick_cube": "lift the red cube",
    "push_cube": "push the blue cube to the target",
    "pull_cube": "pull the blue cube to the target",
    "place_sphere": "place the sphere in the bin",
}
BASE = {"stack_cube": 0.22, "pick_cube": 0.90, "push_cube": 0.93, "pull_cube": 0.88, "place_sphere": 0.15}
# What a method ends at: new-task success, share of prior skill lost, forward KL.
ENDS = {"sft": (0.88, 0.45, 1.6), "reinforce": (0.70, 0.05, 0.25), "grpo": (0.66, 0.08, 0.3)}
SPENT = {"sft": 300.0, "reinforce": 900.0, "grpo": 950.0}


def make_run(
    path: Path,
    *,
    method: str | None = "sft",
    penalty: str | None = None,
    seed: int = 0,
    n: int = 60,
    iterations: int = 10,
    evaluate_every: int = 2,
    reached: int | None = None,
    status: str = "finished",
    error: str | None = None,
    divergence: bool = True,
    videos: bool = False,
    shipped: str | None = None,
    verb: str = "run",
) -> Path:
    """One run folder. ``reached``: the iteration at which a run that is not finished stopped."""
    reached = iterations if reached is None else reached
    config = {"seed": seed, "task": {"name": "stack_cube"}, "method": {"name": method, "learning_rate": 1e-5}}
    state = {
        "verb": verb,
        "name": path.name,
        "policy": "openvla-nano",
        "task": "stack_cube",
        "method": method,
        "penalty": penalty,
        "seed": seed,
        "decode": {"temperature": 1.0},
        "roles": ROLES,
        "instructions": INSTRUCTIONS,
        "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "mani_skill": "3.0.1", "robot_forgetting": "0.1.0"},
        "hardware": {"cpu": "made-up CPU", "cores": 2, "memory_gb": 8, "gpu": None},
        "render": {"option": "low_poly", "backend": "llvmpipe 25.0", "pixels": 64},
        "shipped": shipped,
    }
    generator = np.random.default_rng([seed, len(method or ""), len(penalty or "")])
    with RunFolder.create(path, config=config, run=state) as folder:
        _evaluate(folder, 0, 0, n, BASE, generator, videos, "base")
        if method is not None:
            _train(folder, method, penalty, seed, n, iterations, evaluate_every, reached, generator, divergence, videos)
        folder.update(
            timings={"total": 1200.0 + 30 * seed, "train": 700.0, "evaluate": 400.0}, peak_memory_bytes=2_100_000_000
        )
        if status == "finished":
            folder.finish(summarise(folder))
        else:
            folder.update(status=status, error=error)
    return path


def _train(folder, method, penalty, seed, n, iterations, every, reached, generator, divergence, videos) -> None:
    new, lost, kl = ENDS[method]
    new, lost, kl = (
        new + 0.02 * generator.normal(),
        max(lost + 0.03 * generator.normal(), 0),
        kl * generator.uniform(0.8, 1.2),
    )
    if penalty:
        new, lost, kl = new - 0.04, lost * 0.5, kl * 0.4
    on_policy = method != "sft"
    rows = []
    for iteration in range(1, reached + 1):
        done = (iteration / iterations) ** 0.7
        for step in range(3):
            row = {
                "iteration": iteration,
                "step": 3 * iteration + step,
                "loss": 2 - done,
                "penalty": 0.0,
                "grad_norm": 1.0,
            }
            if step == 2:
                row |= {"seconds": SPENT[method] / iterations}
                if on_policy:
                    success = BASE["stack_cube"] + (new - BASE["stack_cube"]) * done + 0.03 * generator.normal()
                    row |= {"rollout_success": success, "episodes": 128, "env_steps": 128 * 60 - 40 * iteration}
            rows.append(row)
        if iteration % every and iteration != reached:
            continue
        rates = {task: rate * (1 - lost * done) for task, rate in BASE.items()}
        rates["stack_cube"] = BASE["stack_cube"] + (new - BASE["stack_cube"]) * done
        last = iteration == iterations
        _evaluate(folder, 1, iteration, n if last else n // 2, rates, generator, videos and last, method, last)
        if divergence:
            _diverge(folder, iteration, kl * done**1.5, last)
    folder.append("train", *rows)


def make_sequence(path: Path, *, method: str = "sft", seed: int = 0, n: int = 40, lost: float = 0.3) -> Path:
    """A run over three tasks: each stage learns its own and loses a share of all that was known."""
    learned, other = ["stack_cube", "lift_peg", "poke_cube"], {"prior": ["pick_cube"], "held_out": ["place_sphere"]}
    rates = {"stack_cube": 0.2, "lift_peg": 0.1, "poke_cube": 0.05, "pick_cube": 0.9, "place_sphere": 0.15}
    state = {"verb": "run", "policy": "openvla-nano", "task": " + ".join(learned), "method": method, "seed": seed}
    state |= {"roles": {"new": learned, **other}, "sequence": learned, "decode": {"temperature": 1.0}}
    shared = {"split": "test", "temperature": 1.0, "reward": 0.0, "steps": 5, "seconds": 0.1}
    shared |= {"error": None, "video": None, "source": None}
    generator = np.random.default_rng(seed)
    with RunFolder.create(path, config={"seed": seed, "method": {"name": method}}, run=state) as folder:
        for stage in range(len(learned) + 1):
            now, before = learned[max(stage, 1) - 1], learned[: max(stage - 1, 0)]
            roles = {"pick_cube": "prior", "place_sphere": "held_out", now: "new"} | dict.fromkeys(before, "prior")
            rates = {task: rate * (1 - lost * (stage > 0)) for task, rate in rates.items()}
            rates |= {now: 0.85} if stage else {}
            head = {**shared, "stage": stage, "iteration": 4 * (stage > 0), "trained_on": learned[:stage]}
            for task, decode in ((task, decode) for task in rates for decode in ("sampled", "greedy")):
                row = {**head, "task": task, "role": roles.get(task, "unseen"), "decode": decode}
                won = (generator.random(n) < rates[task]).tolist()
                folder.append("episodes", *({**row, "episode": i, "seed": i, "success": won[i]} for i in range(n)))
            row = {"stage": stage, "step": 0, "loss": 1.0, "seconds": 30.0}
            folder.append("train", *({**row, "iteration": i + 1} for i in range(4 if stage else 0)))
        folder.finish(summarise(folder))
    return path


def _evaluate(folder, stage, iteration, n, rates, generator, videos, who, complete=True) -> None:
    rows = []
    luck = np.random.default_rng(42)  # an easy initial state is easy for every policy
    for role, tasks in ROLES.items():
        if role == "held_out" and not complete:
            continue
        for task in tasks:
            ease = luck.random(10_000)
            for decode in ("sampled", "greedy") if complete else ("sampled",):
                for episode in range(n):
                    own = np.random.default_rng([stage, episode, len(task), decode == "greedy"]).random()
                    own = own if stage == 0 else generator.random()
                    success = bool(0.6 * ease[episode] + 0.4 * own < _threshold(rates[task]))
                    steps, video = (int(20 + 20 * own) if success else 60), None
                    if videos and episode == 0 and decode == "sampled":
                        video = f"videos/{video_name(task, 1_000_000, who, success)}"
                        write_episode(folder.path / video, *_pictures(12, len(task)), success)
                    crashed = stage == 1 and task == "pull_cube" and episode == 7 and decode == "sampled"
                    rows.append(
                        {
                            "stage": stage,
                            "iteration": iteration,
                            "trained_on": ["stack_cube"] if stage else [],
                            "task": task,
                            "role": role,
                            "split": "test",
                            "decode": decode,
                            "temperature": 1.0 if decode == "sampled" else 0.0,
                            "episode": episode,
                            "seed": 1_000_000 + episode,
                            "success": success and not crashed,
                            "reward": float(success),
                            "steps": steps,
                            "seconds": 0.5,
                            "error": "the simulation returned not-a-number poses" if crashed else None,
                            "video": video,
                            "source": None,
                        },
                    )
    folder.append("episodes", *rows)


@cache
def _threshold(rate: float) -> float:
    """The quantile of 0.6 U + 0.4 V (U, V uniform) below which a share ``rate`` lies."""
    grid = np.add.outer(np.linspace(0, 0.6, 200), np.linspace(0, 0.4, 200)).ravel()
    return float(np.quantile(grid, rate))


def _pictures(length: int, kind: int):
    frames = np.full((length + 1, 64, 64, 3), (205, 200, 190), dtype=np.uint8)
    for step, frame in enumerate(frames):
        frame[40:] = (150, 120, 90)
        frame[34:44, 8 + 3 * step : 18 + 3 * step] = (200, 40, 40) if kind % 2 else (40, 60, 200)
        frame[36:46, 48:58] = (40, 160, 70)
    return frames, "an instruction", np.sin(np.arange(length * 7).reshape(length, 7) / 5)


def _diverge(folder, iteration: int, kl: float, complete: bool) -> None:
    rows = []
    for role, tasks in ROLES.items():
        for task in tasks:
            for states in ("base", "fine_tuned", "demonstrations") if complete else ("base",):
                scale = {"new": 1.0, "prior": 0.4, "held_out": 0.5}[role] * {
                    "base": 1,
                    "fine_tuned": 1.3,
                    "demonstrations": 0.9,
                }[states]
                values = {
                    ("forward_kl", "nats/token"): kl * scale,
                    ("forward_kl", "nats/decision"): 7 * kl * scale,
                    ("reverse_kl", "nats/token"): 0.8 * kl * scale,
                    ("reverse_kl", "nats/decision"): 5.6 * kl * scale,
                    ("total_variation", "1/token"): 1 - np.exp(-kl * scale),
                    ("l2", "1/token"): 0.7 * (1 - np.exp(-kl * scale)),
                }
                for (measure, unit), value in values.items():
                    rows.append(
                        {
                            "stage": 1,
                            "iteration": iteration,
                            "task": task,
                            "role": role,
                            "states": states,
                            "measure": measure,
                            "unit": unit,
                            "value": value,
                            "standard_error": 0.08 * value,
                            "n": 256,
                            "episodes": 8,
                        },
                    )
    folder.append("divergence", *rows)


def make_demo(folder: Path, *, videos: bool = True, n: int = 60) -> list[Path]:
    """What ``make demo`` leaves: one seed each of SFT and REINFORCE, and a shipped table over 3 seeds."""
    runs = [
        make_run(folder / f"stack_cube-{method}-seed0", method=method, videos=videos, n=n)
        for method in ("sft", "reinforce")
    ]
    source = "computed on the developers' machine, see results/"
    for method in ("sft", "reinforce", "grpo"):
        for seed in range(3):
            name = f"shipped-stack_cube-{method}-seed{seed}"
            runs.append(make_run(folder / name, method=method, seed=seed, n=n, shipped=source))
    return runs


if __name__ == "__main__":
    import sys

    make_demo(Path(sys.argv[1]), n=100)
