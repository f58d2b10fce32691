"""One run of the sweep: a network fine-tuned and measured, in a run folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from robot_forgetting.engine.train import train
from robot_forgetting.errors import Diverged
from robot_forgetting.method import Method, Optimiser, Penalty
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.probe import Probe

MOST = 1e6  # a weight above it is a diverged run: squares and their sums would overflow


@dataclass(frozen=True)
class Spec:
    """What distinguishes a run of a sweep."""

    method: str
    learning_rate: float
    schedule: str
    epochs: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.method}-lr{self.learning_rate:.2e}-{self.schedule}-epochs{self.epochs}-seed{self.seed}"


@dataclass(frozen=True)
class Recipe:
    """How a method trains.

    steps: optimiser steps in all; steps_per_iteration: of the method; traits: of run.json (on_policy, negatives)
    """

    method: Method
    steps: int
    steps_per_iteration: int = 1
    penalties: Sequence[Penalty] = ()
    traits: dict = field(default_factory=dict)


def done(folder: Path, spec: Spec) -> bool:
    """Whether an earlier command finished the run, or saw it diverge (it would again)."""
    if not (folder / spec.id / "run.json").is_file():
        return False
    run = RunFolder(folder / spec.id)
    return run.finished or bool(run.run.get("diverged"))


def fine_tune(
    spec: Spec,
    recipe: Recipe,
    policy: MLPPolicy,
    tasks: dict[str, OneStepTask],
    run: RunFolder,
    *,
    settings: dict,
    after_iteration: Callable[[int], None],
) -> str | None:
    """``train`` with the sweep's settings; returns why it diverged, or None."""
    optimiser = Optimiser(
        learning_rate=spec.learning_rate,
        schedule=spec.schedule,
        warmup_steps=round(settings["warmup_ratio"] * recipe.steps),
        max_grad_norm=settings["max_grad_norm"],
        micro_batch=1_000_000,  # a batch of small rows is cheaper in one piece
    )
    try:
        train(
            policy,
            tasks["new"],
            recipe.method,
            optimiser=optimiser,
            run=run,
            seed=spec.seed,
            penalties=recipe.penalties,
            past=[tasks["prior"]],
            checkpoints=False,
            log_every=settings["log_every"],
            after_iteration=after_iteration,
        )
    except Diverged as error:
        return f"{str(error).partition(';')[0]}; lower its learning rate"
    return None


def train_run(
    spec: Spec,
    recipe: Recipe,
    weights: dict[str, Tensor],
    tasks: dict[str, OneStepTask],
    probe: Probe,
    folder: Path,
    *,
    settings: dict,
    config: dict,
    header: dict,
    dtype: str = "float32",
    advanced: Callable[[int], None] = lambda steps: None,
) -> MLPPolicy:
    """Trains, measures ``checkpoints`` times evenly spread (the last at the end), and finishes the run folder.

    weights: of the base; settings: the sweep's; config, header: of config.yaml and run.json, besides the run's own;
    advanced: told about every so many steps. A run that diverges ends as failed.
    """
    policy = MLPPolicy(sizes=settings["sizes"], weights=weights, dtype=dtype)
    iterations, checkpoints = recipe.method.iterations, settings["checkpoints"]
    measured = {-(-iterations * k // checkpoints) for k in range(1, checkpoints + 1)}
    # Before the first step the policy is the base.
    success = [{"stage": 0, "iteration": 0, **row} for row in probe.base_success()]
    divergences: list[dict] = []
    evaluating, started, told = 0.0, time.perf_counter(), 0

    def measure(iteration: int) -> None:
        nonlocal told, evaluating
        if iteration - told >= 50 or iteration == iterations:
            advanced((iteration - told) * recipe.steps_per_iteration)
            told = iteration
        if iteration not in measured:
            return
        begun = time.perf_counter()
        largest = max(float(weight.abs().max()) for weight in policy.network().values())
        if not largest < MOST:
            raise Diverged(f"a weight grew to {largest:.3g}")
        rows, found = probe.measure(policy, ranks=iteration == iterations)
        where = {"stage": 1, "iteration": iteration * recipe.steps_per_iteration}
        success.extend({**where, **row} for row in rows)
        divergences.extend({**where, **row} for row in found)
        evaluating += time.perf_counter() - begun

    header = {**header, "method": spec.method, "seed": spec.seed, "traits": recipe.traits}
    with RunFolder.create(folder / spec.id, config={**config, **asdict(spec)}, run=header) as run:
        run.keep("divergence", lambda row: False)  # an interrupted run begins again
        why = fine_tune(spec, recipe, policy, tasks, run, settings=settings, after_iteration=measure)
        timings = {"train": time.perf_counter() - started - evaluating, "evaluate": evaluating}
        if why is not None:
            advanced((iterations - told) * recipe.steps_per_iteration)
            run.update(status="failed", error=why, diverged=True, timings=timings)
        else:
            run.append("divergence", *divergences)
            run.finish({"success": success, "divergence": divergences}, timings=timings)
    return policy
