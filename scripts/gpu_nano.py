"""The steps of `gpu_check.py` at nano size: whole small runs of every policy with every loss and penalty."""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LORA = {"rank": 4, "alpha": 8}
# Policy: (kind, name of its weights, options).
POLICIES = {
    "openvla": ("robot", "openvla-nano", {}),
    "language": ("text", "qwen-nano", {}),
    "openvla-lora": ("robot", "openvla-nano", {"lora": LORA, "dtype": "bfloat16", "gradient_checkpointing": True}),
    "language-lora": ("text", "qwen-nano", {"lora": LORA, "gradient_checkpointing": True}),
    "openvla-mixed": ("robot", "openvla-nano", {"dtype": "mixed"}),
    "language-mixed": ("text", "qwen-nano", {"dtype": "mixed"}),
}


def methods(kind: str, iterations: int, rows: int) -> dict[str, Callable]:
    """Every method for a kind of policy, of about ``rows`` rows an iteration; each is made for a policy."""
    from robot_forgetting.method import Optimiser
    from robot_forgetting.methods.distillation import SDFT, OnPolicyDistillation
    from robot_forgetting.methods.grpo import GRPO
    from robot_forgetting.methods.labels import Labeler, Labels
    from robot_forgetting.methods.reinforce import Reinforce
    from robot_forgetting.methods.self_sft import SelfSFT
    from robot_forgetting.methods.sft import SFT
    from robot_forgetting.methods.simpo import SimPO

    adam = Optimiser(learning_rate=1e-3, weight_decay=0.01, micro_batch=max(2, rows // 2 + 1))
    every = {"iterations": iterations, "optimiser": adam}
    supervised = {**every, "steps_per_iteration": 2, "batch_size": rows}
    on_policy = {**every, "groups": max(4, rows // 4), "group_size": 4}

    def distillation(policy):
        return OnPolicyDistillation(**on_policy, teacher=moved_a_little(policy.copied()))

    class Zeros(Labeler):
        """A wrong answer to every question of numbers."""

        def label(self, policy, task, seeds, stream) -> Labels:
            return Labels(["000"] * len(seeds))

    found = {
        "sft": lambda policy: SFT(**supervised, demonstrations=3),
        "grpo": lambda policy: GRPO(**on_policy, minibatch_size=4 * rows),
        "reinforce": lambda policy: Reinforce(**on_policy),
        "self_sft": lambda policy: SelfSFT(**supervised, states=max(2, rows // 2), iterative=True),
        "distillation": distillation,
    }
    if kind == "robot":
        return found | {"sft-smoothed": lambda policy: SFT(**supervised, demonstrations=3, label_sigma=1.5)}
    return found | {
        "simpo": lambda policy: SimPO(**supervised, negatives=Zeros()),
        "sdft": lambda policy: SDFT(**every, batch_size=rows, template="{question} {demonstration}"),
    }


def penalties() -> dict:
    from robot_forgetting.methods.kl import KL

    return {"none": None} | {f"kl_{way}": KL(coefficient=0.1, direction=way) for way in ("forward", "reverse")}


def moved_a_little(policy, size: float = 0.02):
    """The policy with every trained weight changed, by numbers that do not depend on the device."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=draw) * size).to(parameter))
    return policy


def small_run(folder: Path, policy, task, method, penalty, **options) -> dict:
    """A whole run (base, training, checkpoint, divergence); what was recorded, without durations."""
    from robot_forgetting.engine import experiment
    from robot_forgetting.records.run_folder import RunFolder

    budget = {"episodes": 2, "greedy_episodes": 1, "interim_points": 1, "interim_episodes": 1, "videos": 0}
    budget |= {"divergence_episodes": 1, "divergence_states": 3}
    arguments = {
        "policy": policy, "sequence": [task], "method": method, "penalty": penalty, "prior": [], "held_out": [],
        "budget": budget, "names": {"policy": policy.name, "method": type(method).__name__, "penalty": "none"},
        "config": {}, "run_dir": folder, "seed": 0, "temperature": 1.0, "episodes": None, "seed_start": None,
        "num_envs": 8, "processes": 1,
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        experiment.run(experiment.Setup(**arguments | options))
    run = RunFolder(folder)
    rows = {
        table: [{key: value for key, value in row.items() if "seconds" not in key} for row in run.rows(table)]
        for table in ("train", "divergence", "episodes")
    }
    return rows | {"summary": run.summary()}


def interrupted(method):
    """Another method like this one, which stops before its second iteration, as Ctrl-C would."""
    stops = copy.copy(method)
    collect = stops.collect

    def until_then(policy, task, iteration: int):
        if iteration:
            raise KeyboardInterrupt
        return collect(policy, task, iteration)

    stops.collect = until_then
    return stops


def nano(steps) -> None:
    """steps: what ``gpu_steps.Steps`` says"""
    rows = 4 if steps.dry else 16
    for policy, (kind, weights, options) in POLICIES.items():
        if steps.dry and not policy.endswith("lora"):
            continue  # every policy, method and penalty runs in the tests, on a pretended GPU
        for method in methods(kind, 1, rows):
            names = [name for name in penalties() if name == "none" or method in ("sft", "grpo")]
            if steps.dry and method != "grpo":
                continue
            for penalty in names[1:2] if steps.dry else names:
                arguments = (steps, kind, weights, options, method, penalty, rows)
                steps(f"{policy}, {method}, penalty {penalty}", lambda arguments=arguments: one_run(*arguments))
        if not steps.dry or kind == "text":
            steps(f"{policy}: restart and repetition", lambda a=(steps, kind, weights, options, rows): restarted(*a))


def built(kind: str, weights: str, options: dict, device: str):
    """A shipped small policy, and a task for it that needs no simulator."""
    import torch

    torch.manual_seed(0)  # of fresh adapters
    if kind == "robot":
        from robot_forgetting.conformance.toy_task import ToyTask
        from robot_forgetting.policies.openvla.vla import OpenVLAPolicy

        task = ToyTask(image_size=64, max_steps=5)
        task.statistics = "maniskill_panda"
        return OpenVLAPolicy(weights, name=weights, device=device, **options), task
    from robot_forgetting.policies.causal_lm.lm import CausalLM
    from robot_forgetting.tasks.text.skills import Skill

    folder = f"package:robot_forgetting/weights/{weights}"
    policy = CausalLM(folder, name=weights, max_new_tokens=8, device=device, **options)
    return policy, Skill(name="skill_over", skill="over", items=64)


def one_run(steps, kind, weights, options, method, penalty, rows) -> dict:
    policy, task = built(kind, weights, options, steps.device)
    with tempfile.TemporaryDirectory() as folder:
        made = methods(kind, 1, rows)[method](policy)
        found = small_run(Path(folder) / "run", policy, task, made, penalties()[penalty])
    dtypes = {str(parameter.dtype) for parameter in policy.parameters() if parameter.requires_grad}
    assert dtypes == {"torch.float32"}, f"what is trained is held in {dtypes}"
    assert str(policy.device).split(":")[0] == steps.device.split(":")[0], f"the policy is on {policy.device}"
    last = found["train"][-1]
    return {"loss": last["loss"], "penalty": last["penalty"], "grad_norm": last["grad_norm"]}


def restarted(steps, kind, weights, options, rows) -> dict:
    """The same run twice, and once with an interruption. On a GPU sums may come in another order: how far apart?"""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in ("first", "again", "interrupted"):
            policy, task = built(kind, weights, options, steps.device)
            method, path = methods(kind, 2, rows)["grpo"](moved_a_little(policy)), Path(folder) / name / "run"
            if name == "interrupted":
                with contextlib.suppress(KeyboardInterrupt):
                    small_run(path, policy, task, interrupted(method), None)
                policy, task = built(kind, weights, options, steps.device)
                moved_a_little(policy)
            runs.append(small_run(path, policy, task, method, None))
    apart = {name: largest_difference(runs[0], run) for name, run in zip(("again", "restarted"), runs[1:], strict=True)}
    if steps.device == "cpu":
        assert apart == {"again": 0.0, "restarted": 0.0}, apart
    return {"largest_difference": apart}


def largest_difference(one, other) -> float:
    """Of the losses and gradient norms of two runs, relative to their size; inf where their steps are not as many."""
    if len(one["train"]) != len(other["train"]):
        return float("inf")
    pairs = [
        (a[key], b[key])
        for a, b in zip(one["train"], other["train"], strict=True)
        for key in ("loss", "grad_norm")
        if a[key] is not None and b[key] is not None
    ]
    return max((abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in pairs), default=0.0)
