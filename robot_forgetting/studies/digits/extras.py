"""What the study measures besides the sweep: optimisation dynamics, sparsity by weight precision, the theorem."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.engine.train import train
from robot_forgetting.errors import unknown
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.labels import correct
from robot_forgetting.metrics import divergence, dynamics, projection
from robot_forgetting.one_step import OneStepTask, repeated
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import Action
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.stack import Spec, done

GRADIENT_IMAGES = 1000


def jobs(sweep, settings: dict) -> list:
    """The jobs still to do. settings: dynamics {rates, every}, precision {methods, learning_rate}, theorem."""
    for key in settings:
        if key not in ("dynamics", "precision", "theorem"):
            raise unknown("key of reproduce.extras", key, ("dynamics", "precision", "theorem"))
    found, seed = [], sweep.seeds[0]
    if settings.get("dynamics"):
        every = settings["dynamics"]["every"]
        for method in sweep.settings["methods"]:
            specs = [Spec(method, rate, "constant", 1, seed) for rate in settings["dynamics"]["rates"]]
            specs = [spec for spec in specs if not done(sweep.folder / "dynamics", spec)]
            # Drawing data between the steps belongs to iterative SFT's iterations; their steps cannot be told apart.
            if specs and method != "iterative_sft":
                found.append(functools.partial(measure_dynamics, sweep, specs, every))
    if settings.get("precision"):
        for method in settings["precision"]["methods"]:
            spec = Spec(method, settings["precision"]["learning_rate"], "constant", 1, seed)
            for dtype in ("float32", "bfloat16"):
                if not done(sweep.folder / "precision" / dtype, spec):
                    found.append(functools.partial(sweep.train_in, dtype, spec))
    if settings.get("theorem") and not (sweep.folder / "theorem" / "summary.json").is_file():
        found.append(functools.partial(check_theorem, sweep))
    return found


def measure_dynamics(sweep, specs: list[Spec], every: int, tell) -> None:
    """One epoch; at every ``every``-th step its KL change on new-task inputs, and its cosines with the loss gradients.

    dynamics.jsonl: iteration, kl (forward, nats, after the step), kl_change, update_norm, cosine_prior, cosine_new: of
    the step with the gradient of the prior task's (the new task's) loss before it; +1 raises that loss fastest
    (section C.3). Losses are -log of the probability of all right answers, on training pictures that pre-training did
    not see.
    """
    policy = MLPPolicy(sizes=sweep.settings["sizes"], runs=len(specs), weights=sweep.base(specs[0].seed))
    recipe = sweep.recipe(specs[0], sweep.teacher(specs[0]))
    losses = {role: _Loss(task) for role, task in sweep.tasks.items()}
    features = losses["new"].features
    base = policy_logits(MLPPolicy(sizes=policy.sizes, weights=policy.base_network()), features)
    optimisers = [
        Optimiser(
            learning_rate=spec.learning_rate,
            warmup_steps=round(sweep.settings["warmup_ratio"] * recipe.steps),
            max_grad_norm=sweep.settings["max_grad_norm"],
            micro_batch=1_000_000,
        )
        for spec in specs
    ]
    before: dict = {}
    rows: list[list[dict]] = [[] for _ in specs]

    def measure(iteration: int) -> None:
        if iteration % every == 1 and before:
            after = policy.stacked()
            update = {key: after[key] - weights for key, weights in before["weights"].items()}
            kl = divergence.forward_kl(base, policy_logits(policy, features)).mean(1)
            length = sum(step.flatten(1).square().sum(1) for step in update.values()).sqrt()
            numbers = {"kl": kl, "kl_change": kl - before["kl"], "update_norm": length}
            for role, gradient in before["gradients"].items():
                numbers[f"cosine_{role}"] = dynamics.cosine(update, gradient, run_dims=1)
            for index, run in enumerate(rows):
                run.append({"iteration": iteration, **{name: float(value[index]) for name, value in numbers.items()}})
        if iteration % every == 0 and iteration < recipe.method.iterations:
            before["gradients"] = {role: loss.gradient(policy) for role, loss in losses.items()}
            before["weights"] = {key: weights.clone() for key, weights in policy.stacked().items()}
            before["kl"] = divergence.forward_kl(base, policy_logits(policy, features)).mean(1)

    with ExitStack() as stack:
        folders = []
        for spec in specs:
            config = {**sweep.config(), **asdict(spec), "every": every}
            header = {**sweep.header(), "part": "dynamics", "method": spec.method, "seed": spec.seed}
            folder = RunFolder.create(sweep.folder / "dynamics" / spec.id, config=config, run=header)
            folders.append(stack.enter_context(folder))
            folder.keep("dynamics", lambda row: False)
        train(
            policy,
            sweep.tasks["new"],
            recipe.method,
            optimiser=optimisers,
            run=folders,
            seed=specs[0].seed,
            penalties=recipe.penalties,
            checkpoints=False,
            log_every=sweep.settings["log_every"],
            after_iteration=measure,
            diverged=lambda index, message: None,
        )
        for folder, run in zip(folders, rows, strict=True):
            folder.append("dynamics", *run)
            folder.finish({"dynamics": run})


def policy_logits(policy: MLPPolicy, features: np.ndarray) -> Tensor:
    return policy.activations(features)[1]


class _Loss:
    """-mean log of the probability of a right answer, on fixed training pictures of a task."""

    def __init__(self, task: OneStepTask):
        size = task.size("train")
        seeds = task.seeds("train").start + size - 1 - np.arange(min(GRADIENT_IMAGES, size))
        self.features = task.observations(seeds)["features"]
        self.right = correct(task, seeds)

    def gradient(self, policy: MLPPolicy) -> dict[str, Tensor]:
        """By layer name, [R, *shape]; leaves the policy's own gradients empty."""
        tokens = torch.zeros(policy.runs * len(self.right), 1, dtype=torch.int64)
        obs = repeated({"features": self.features}, outer=policy.runs)
        logits = policy.logits(obs, Action(tokens, torch.ones_like(tokens, dtype=torch.bool)))[:, 0]
        right = torch.where(self.right > 0, 0.0, -torch.inf).repeat(policy.runs, 1)
        policy.zero_grad()
        loss = logits.logsumexp(1) - (logits + right).logsumexp(1)
        (loss.sum() / len(self.right)).backward()
        found = policy.gradients()
        policy.zero_grad()
        return found


def check_theorem(sweep, tell) -> None:
    """Theorem 5.2 on 12 answers: how near each iteration comes to argmin KL(pi || pi_0) among the correct policies.

    theorem.jsonl: process, iteration, distance (largest difference of a probability from the closed-form minimiser),
    success, kl (KL(pi || pi_0), nats). Policy gradient and EM arrive; SFT goes where its labels are.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.softmax(torch.randn(12, generator=generator, dtype=torch.float64), 0)
    reward = (torch.arange(12) % 3 == 0).double()
    one, two = torch.zeros(2, 12, dtype=torch.float64)
    one[0], two[[3, 6, 9]] = 1.0, 1 / 3
    steps = 400
    found = {
        "expectation_maximisation": projection.expectation_maximisation(base, reward, steps=steps, rate=0.1),
        # Only the natural gradient is a sequence of projections; the plain one ends elsewhere (see `projection`).
        "natural_policy_gradient": projection.policy_gradient(
            base, reward, steps=steps, learning_rate=1.0, natural=True
        ),
        "policy_gradient_plain": projection.policy_gradient(
            base, reward, steps=steps, learning_rate=1.0, natural=False
        ),
        "sft_one_label": projection.supervised(base, one, reward, steps=steps),
        "sft_three_labels": projection.supervised(base, two, reward, steps=steps),
        "sft_oracle": projection.supervised(base, projection.information_projection(base, reward), reward, steps=steps),
    }
    header = {**sweep.header(), "part": "theorem"}
    with RunFolder.create(sweep.folder / "theorem", config={"answers": 12, "steps": steps}, run=header) as run:
        run.keep("theorem", lambda row: False)
        rows, last = [], []
        for name, path in found.items():
            distance = (path.policies - path.target).abs().amax(-1)
            for step in range(steps + 1):
                row = {"process": name, "iteration": step, "distance": float(distance[step])}
                row |= {"success": float(path.success[step]), "kl": float(path.divergence[step])}
                rows.append(row)
            last.append(rows[-1])
        run.append("theorem", *rows)
        run.finish({"theorem": last})
