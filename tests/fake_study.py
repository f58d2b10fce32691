"""Run folders of a controlled study with made-up numbers, to develop and test its page against."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from robot_forgetting.records.run_folder import RunFolder

# How far a method moves and how well it learns: scale of forward KL, new-task accuracy at the end.
METHODS = {
    "grpo": (0.5, 0.975),
    "grpo_kl": (0.35, 0.97),
    "sft_1": (1.6, 0.985),
    "sft_2": (1.1, 0.98),
    "sft_oracle": (0.25, 0.98),
    "sft_oracle_soft": (0.24, 0.98),
    "reinforce_1_0": (0.6, 0.97),
    "simpo": (1.5, 0.98),
    "sft_teacher": (0.5, 0.975),
    "sft_kl": (1.2, 0.98),
    "self_sft": (0.4, 0.96),
    "iterative_sft": (0.5, 0.97),
}
BASE = {"parity_mnist": 0.84, "fashion_mnist": 0.76}
ROLES = {"new": ["parity_mnist"], "prior": ["fashion_mnist"], "held_out": []}
N = 10_000


def forgetting(kl: float) -> float:
    """The law that the numbers follow, before noise: 0.12 x - 0.008 x^2."""
    return 0.12 * kl - 0.008 * kl * kl


def make_study(
    folder: Path,
    *,
    methods=("grpo", "sft_1", "sft_oracle"),
    rates=(1e-5, 1e-4, 1e-3),
    seeds=(0,),
    checkpoints: int = 3,
    noise: float = 0.005,
    extras: bool = True,
    config: dict | None = None,
) -> Path:
    for seed in seeds:
        for method in methods:
            for rate in rates:
                make_run(folder, method, rate, seed=seed, checkpoints=checkpoints, noise=noise, config=config)
    if extras:
        _dynamics(folder, methods)
        _precision(folder)
        _theorem(folder)
        if "sft_teacher" in methods:
            make_run(folder / "teacher", "grpo", 1e-4, part="teacher", checkpoints=checkpoints, noise=noise)
    return folder


def make_run(
    folder: Path,
    method: str,
    rate: float,
    *,
    seed: int = 0,
    checkpoints: int = 3,
    noise: float = 0.005,
    part: str = "sweep",
    dtype: str | None = None,
    config: dict | None = None,
    broken: bool = False,
) -> Path:
    """One run; ``broken``: its last checkpoint is not finite."""
    generator = np.random.default_rng([seed, *map(ord, f"{method}{rate}")])
    scale, top = METHODS.get(method, (1.0, 0.97))
    size = (math.log10(rate) + 5.2) / 2.2
    success, divergence = [_success(0, 0, "parity_mnist", BASE["parity_mnist"], generator)], []
    success.append(_success(0, 0, "fashion_mnist", BASE["fashion_mnist"], generator))
    for index in range(1, checkpoints + 1):
        done = size * index / checkpoints
        kl = 3.5 * scale * done * (1 + 0.1 * generator.normal())
        new = BASE["parity_mnist"] + (top - BASE["parity_mnist"]) * (1 - math.exp(-5 * done))
        prior = BASE["fashion_mnist"] - forgetting(kl) + noise * generator.normal()
        success.append(_success(1, 100 * index, "parity_mnist", new, generator))
        success.append(_success(1, 100 * index, "fashion_mnist", prior, generator))
        divergence += _divergence(100 * index, kl, generator, None if broken and index == checkpoints else 1.0, dtype)
    settings = {"learning_rate": rate, "schedule": "constant", "epochs": 1, "seed": seed, "method": method}
    settings |= {"dtype": dtype} if dtype else {}
    name = f"{method}-lr{rate:.2e}-constant-epochs1-seed{seed}"
    with _folder(folder / name, part, method, seed, settings, config) as run:
        run.append("divergence", *divergence)
        run.finish({"success": success, "divergence": divergence}, timings={"train": 2.0, "evaluate": 0.5})
    return folder / name


def fail_run(folder: Path, method: str, rate: float, *, diverged: bool = True) -> Path:
    name = f"{method}-lr{rate:.2e}-constant-epochs1-seed0"
    settings = {"learning_rate": rate, "schedule": "constant", "epochs": 1, "seed": 0, "method": method}
    with _folder(folder / name, "sweep", method, 0, settings, None) as run:
        run.update(status="failed", error="the loss is not finite at iteration 12", diverged=diverged)
    return folder / name


def _folder(path: Path, part: str, method: str | None, seed: int, settings: dict, config: dict | None) -> RunFolder:
    shared = {
        "study": "parity_mnist",
        "checkpoints": 8,
        "batch_size": 64,
        "group_size": 8,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "images": None,
        "log_every": 100,
        "kl": {"coefficient": 0.1, "direction": "reverse"},
        "pretraining": {"images": 500, "epochs": 10, "batch_size": 64, "learning_rate": 1e-3, "warmup_ratio": 0.1},
        "probe": {"images": 2000, "similarity": 500, "fisher": 1000, "layer": 2, "k": 10},
        "sizes": [785, 512, 256, 10],
    }
    state = {
        "verb": "reproduce",
        "study": "parity_mnist",
        "part": part,
        "policy": "mlp",
        "task": "parity_mnist",
        "method": method,
        "seed": seed,
        "roles": ROLES,
        "decode": {"temperature": 1.0},
        "versions": {"python": "3.11.2", "torch": "2.13.0+cpu"},
        "hardware": {"processor": "made-up CPU", "cores": 2},
    }
    return RunFolder.create(path, config={**shared, **(config or {}), **settings}, run=state)


def _success(stage: int, iteration: int, task: str, rate: float, generator) -> dict:
    won = round(min(max(rate, 0), 1) * N)
    row = {"stage": stage, "iteration": iteration, "task": task, "role": "new" if "parity" in task else "prior"}
    return row | {"decode": "greedy", "n": N, "successes": won, "rate": won / N, "low": None, "high": None}


def _divergence(iteration: int, kl: float, generator, value: float | None, dtype: str | None) -> list[dict]:
    def row(role, name, x):
        task = {"new": "parity_mnist", "prior": "fashion_mnist"}.get(role)
        where = {"stage": 1, "iteration": iteration, "task": task, "role": role, "states": "test"}
        return where | {"measure": name, "unit": "1", "value": None if value is None else float(x), "n": 2000}

    def noisy(x, by):
        return x * (1 + by * generator.normal())

    rows = []
    for role in ("new", "prior"):
        rows += [
            row(role, "forward_kl", kl if role == "new" else noisy(kl, 0.05)),
            row(role, "reverse_kl", noisy(0.8 * kl, 0.1)),
            row(role, "total_variation", 1 - math.exp(-noisy(kl, 0.15))),
            row(role, "l2", 1 - math.exp(-noisy(kl, 0.3))),
            row(role, "activation_l1", noisy(100 * kl, 0.3)),
            row(role, "cka", 1 - 0.05 * noisy(kl, 0.2)),
            row(role, "cknna_intersection", 1 - 0.08 * noisy(kl, 0.2)),
            row(role, "cknna_union", 1.2 + 0.05 * noisy(kl, 0.2)),
            row(role, "weight_fisher_l2", noisy(kl, 0.8)),
        ]
    sparsity = 0.85 if dtype == "bfloat16" else 0.23
    rows += [row(None, "weight_l1", noisy(500 * kl, 0.8)), row(None, "weight_spectral", noisy(kl, 0.6))]
    rows += [row(None, "weight_rank", 0.97), row(None, "weight_sparsity_exact", sparsity)]
    return rows


def _dynamics(folder: Path, methods) -> None:
    for method in methods:
        generator = np.random.default_rng(list(map(ord, method)))
        rows = []
        for step in range(30):
            kl = float(10 ** generator.uniform(-4, -1))
            rows.append({"iteration": 20 * step + 1, "kl": kl, "kl_change": kl, "update_norm": 0.01})
            rows[-1]["cosine_prior"] = 0.1 * (4 + math.log10(kl)) + 0.05 * generator.normal()
            rows[-1]["cosine_new"] = -0.1 + 0.05 * generator.normal()
        settings = {
            "learning_rate": 1e-4,
            "schedule": "constant",
            "epochs": 1,
            "seed": 0,
            "method": method,
            "every": 20,
        }
        with _folder(folder / "dynamics" / f"{method}-seed0", "dynamics", method, 0, settings, None) as run:
            run.append("dynamics", *rows)
            run.finish({"dynamics": rows})


def _precision(folder: Path) -> None:
    for method in ("sft_1", "grpo"):
        for dtype in ("float32", "bfloat16"):
            where = folder / "precision" / dtype
            make_run(where, method, 1e-4, part="precision", dtype=dtype if dtype == "bfloat16" else None)


def _theorem(folder: Path) -> None:
    rows = []
    for name, rate, floor in (
        ("expectation_maximisation", 0.1, 0.0),
        ("natural_policy_gradient", 1.0, 0.0),
        ("policy_gradient_plain", 0.1, 0.2),
        ("sft_one_label", 0.1, 0.6),
        ("sft_three_labels", 0.1, 0.3),
        ("sft_oracle", 0.1, 0.0),
    ):
        for step in range(0, 401, 4):
            distance = floor + (0.5 - floor) * math.exp(-rate * step)
            rows.append({"process": name, "iteration": step, "distance": distance, "success": 1.0, "kl": 0.53 + floor})
    with _folder(folder / "theorem", "theorem", None, 0, {}, None) as run:
        run.append("theorem", *rows)
        run.finish({"theorem": rows[-1:]})
