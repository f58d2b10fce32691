"""Trains runs that differ in learning rate and schedule only as one stack of networks; one run folder each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from robot_forgetting.engine.train import train
from robot_forgetting.method import Method, Optimiser, Penalty
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.probe import Probe

MOST = 1e6  # a weight above it is a diverged run: squares and their sums would overflow


@dataclass(frozen=True)
class Spec:
    """One run of a sweep; ``epochs`` and ``method`` decide which runs can be stacked."""

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
    """How a method trains: built once per stack.

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


def train_stack(
    specs: Sequence[Spec],
    recipe: Recipe,
    weights: dict[str, Tensor],
    tasks: dict[str, OneStepTask],
    probe: Probe,
    folder: Path,
    *,
    config: dict,
    header: dict,
    warmup_ratio: float,
    max_grad_norm: float | None,
    checkpoints: int,
    log_every: int,
    dtype: str = "float32",
    advanced: Callable[[int], None] = lambda steps: None,
) -> MLPPolicy:
    """Trains, measures ``checkpoints`` times evenly spread (the last at the end), and finishes the run folders.

    weights: of the base; config: what the runs share, recorded with each one's own settings; advanced: told about
    every so many steps of all runs together. A run that diverges ends as failed, the others go on.
    """
    policy = MLPPolicy(sizes=config["sizes"], runs=len(specs), weights=weights, dtype=dtype)
    optimisers = [
        Optimiser(
            learning_rate=spec.learning_rate,
            schedule=spec.schedule,
            warmup_steps=round(warmup_ratio * recipe.steps),
            max_grad_norm=max_grad_norm,
            micro_batch=1_000_000,  # a batch of small rows is cheaper in one piece
        )
        for spec in specs
    ]
    iterations = recipe.method.iterations
    measured = {-(-iterations * k // checkpoints) for k in range(1, checkpoints + 1)}
    # Before the first step the policy is the base.
    success = [[{"stage": 0, "iteration": 0, **row} for row in rows] for rows in probe.success(policy)]
    divergences: list[list[dict]] = [[] for _ in specs]
    seconds, started, told = {"evaluate": 0.0}, time.perf_counter(), 0
    with ExitStack() as stack:
        folders = []
        for spec in specs:
            settings = {**config, **asdict(spec)}
            run = {**header, "method": spec.method, "seed": spec.seed, "traits": recipe.traits}
            folders.append(stack.enter_context(RunFolder.create(folder / spec.id, config=settings, run=run)))
            folders[-1].keep("divergence", lambda row: False)  # an interrupted run begins again
        failed: dict[int, str] = {}

        def measure(iteration: int) -> None:
            nonlocal told
            if iteration - told >= 50 or iteration == iterations:
                advanced((iteration - told) * recipe.steps_per_iteration * len(specs))
                told = iteration
            if iteration not in measured:
                return
            begun = time.perf_counter()
            for index, largest in enumerate(policy.largest_weights()):
                if index not in failed and not largest < MOST:
                    failed[index] = f"a weight grew to {largest:.3g}; lower its learning rate"
                if index in failed:  # what is left of it must not disturb the others' measures
                    policy.reset(index)
            rows, found = probe.measure(policy, ranks=iteration == iterations)
            where = {"stage": 1, "iteration": iteration * recipe.steps_per_iteration}
            for index in range(len(specs)):
                if index not in failed:
                    success[index] += [{**where, **row} for row in rows[index]]
                    divergences[index] += [{**where, **row} for row in found[index]]
            seconds["evaluate"] += time.perf_counter() - begun

        train(
            policy,
            tasks["new"],
            recipe.method,
            optimiser=optimisers,
            run=folders,
            seed=specs[0].seed,
            penalties=recipe.penalties,
            past=[tasks["prior"]],
            checkpoints=False,
            log_every=log_every,
            after_iteration=measure,
            diverged=failed.__setitem__,
        )
        total = time.perf_counter() - started
        timings = {"train": (total - seconds["evaluate"]) / len(specs), "evaluate": seconds["evaluate"] / len(specs)}
        for index, run in enumerate(folders):
            if index in failed:
                run.update(status="failed", error=failed[index], diverged=True, timings=timings)
                continue
            run.append("divergence", *divergences[index])
            run.finish({"success": success[index], "divergence": divergences[index]}, timings=timings)
    return policy
