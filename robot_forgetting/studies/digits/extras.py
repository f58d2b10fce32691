"""What the study measures besides the sweep: optimisation dynamics, sparsity by weight precision, the theorem."""

from __future__ import annotations

import functools
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.methods.labels import correct
from robot_forgetting.metrics import divergence, dynamics, projection
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import Action
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.train_run import Spec, done, fine_tune

GRADIENT_IMAGES = 1000


def jobs(sweep, settings: dict) -> list:
    """The jobs still to do. settings: dynamics {rates, every}, precision {methods, learning_rate}, theorem."""
    found, seed = [], sweep.seeds[0]
    if settings.get("dynamics"):
        for method in sweep.settings["methods"]:
            for rate in settings["dynamics"]["rates"]:
                spec = Spec(method, rate, "constant", 1, seed)
                # Drawing data between the steps belongs to iterative SFT's iterations; its steps cannot be told apart.
                if method != "iterative_sft" and not done(sweep.folder / "dynamics", spec):
                    found.append(functools.partial(measure_dynamics, sweep, spec, settings["dynamics"]["every"]))
    if settings.get("precision"):
        for method in settings["precision"]["methods"]:
            spec = Spec(method, settings["precision"]["learning_rate"], "constant", 1, seed)
            for dtype in ("float32", "bfloat16"):
                if not done(sweep.folder / "precision" / dtype, spec):
                    found.append(functools.partial(sweep.train, [spec], part="precision", dtype=dtype))
    if settings.get("theorem") and not (sweep.folder / "theorem" / "summary.json").is_file():
        found.append(functools.partial(check_theorem, sweep))
    return found


def measure_dynamics(sweep, spec: Spec, every: int, tell) -> None:
    """One epoch; at every ``every``-th step its KL change on new-task inputs, and its cosines with the loss gradients.

    dynamics.jsonl: iteration, kl (forward, nats, after the step), kl_change, update_norm, cosine_prior, cosine_new: of
    the step with the gradient of the prior task's (the new task's) loss before it; +1 raises that loss fastest
    (section C.3). Losses are -log of the probability of all right answers, on training pictures that pre-training did
    not see.
    """
    policy = MLPPolicy(sizes=sweep.settings["sizes"], weights=sweep.base(spec.seed))
    recipe = sweep.recipe(spec)
    losses = {role: _Loss(task) for role, task in sweep.tasks.items()}
    features = losses["new"].features
    base = policy.activations(features)[1]
    before: dict = {}
    rows: list[dict] = []

    def kl() -> Tensor:
        return divergence.forward_kl(base, policy.activations(features)[1]).mean()

    def measure(iteration: int) -> None:
        if iteration % every == 1 and before:
            update = {key: after - before["weights"][key] for key, after in policy.network().items()}
            now, length = kl(), sum(step.flatten().square().sum() for step in update.values()).sqrt()
            numbers = {"kl": now, "kl_change": now - before["kl"], "update_norm": length}
            for role, gradient in before["gradients"].items():
                numbers[f"cosine_{role}"] = dynamics.cosine(update, gradient)
            rows.append({"iteration": iteration, **{name: float(value) for name, value in numbers.items()}})
        if iteration % every == 0 and iteration < recipe.method.iterations:
            before["gradients"] = {role: loss.gradient(policy) for role, loss in losses.items()}
            before["weights"] = {key: weights.clone() for key, weights in policy.network().items()}
            before["kl"] = kl()

    config = {**sweep.config(), **asdict(spec), "every": every}
    header = {**sweep.header(), "part": "dynamics", "method": spec.method, "seed": spec.seed}
    with RunFolder.create(sweep.folder / "dynamics" / spec.id, config=config, run=header) as run:
        run.keep("dynamics", lambda row: False)
        fine_tune(spec, recipe, policy, sweep.tasks, run, settings=sweep.settings, after_iteration=measure)
        run.append("dynamics", *rows)
        run.finish({"dynamics": rows})


class _Loss:
    """-mean log of the probability of a right answer, on fixed training pictures of a task."""

    def __init__(self, task: OneStepTask):
        size = task.size("train")
        seeds = task.seeds("train").start + size - 1 - np.arange(min(GRADIENT_IMAGES, size))
        self.features = task.observations(seeds)["features"]
        self.right = correct(task, seeds)

    def gradient(self, policy: MLPPolicy) -> dict[str, Tensor]:
        """By layer name; leaves the policy's own gradients empty."""
        tokens = torch.zeros(len(self.right), 1, dtype=torch.int64)
        action = Action(tokens, torch.ones_like(tokens, dtype=torch.bool))
        logits = policy.logits({"features": self.features}, action)[:, 0]
        right = torch.where(self.right > 0, 0.0, -torch.inf)
        policy.zero_grad()
        loss = logits.logsumexp(1) - (logits + right).logsumexp(1)
        (loss.sum() / len(self.right)).backward()
        found = policy.layers(policy.matrices.grad, policy.vectors.grad)
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
