"""Every policy, method and penalty on a pretended GPU: whole small runs, restarted too, with the CPU's numbers."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch
from pretend_cuda import CUDA, OnCuda, pretended_cuda

from robot_forgetting import experiment
from robot_forgetting.conformance.toy import ToyTask, tiny_policy
from robot_forgetting.experiment import Setup
from robot_forgetting.methods.distillation import SDFT, OnPolicyDistillation
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT
from robot_forgetting.methods.simpo import SimPO
from robot_forgetting.records import RunFolder
from robot_forgetting.train import Optimiser

ADAM = Optimiser(learning_rate=1e-3, micro_batch=5, weight_decay=0.01)
BUDGET = {
    "episodes": 2, "greedy_episodes": 1, "interim_points": 1, "interim_episodes": 1, "divergence_episodes": 1,
    "divergence_states": 3, "videos": 0,
}  # fmt: skip
ITERATIONS = {"iterations": 2, "optimiser": ADAM}
SUPERVISED = {**ITERATIONS, "steps_per_iteration": 2, "batch_size": 4}
ON_POLICY = {**ITERATIONS, "groups": 2, "group_size": 4}


def simpo():
    return SimPO(**SUPERVISED, negatives=tiny_lm.Letters(shift=1))


def distillation(policy):
    teacher = policy.copied()
    tiny_lm.nudge(teacher)
    return OnPolicyDistillation(**ON_POLICY, teacher=teacher)


def sdft():
    return SDFT(**ITERATIONS, batch_size=4, template="{question} {demonstration}")


def robot(device: str, **options):
    return tiny_policy(ToyTask(), device=device, **options)


def language(device: str, **options):
    return tiny_lm.tiny_lm(device=device, **options)


LORA = {"rank": 2, "alpha": 4}
POLICIES = {
    "openvla": (robot, {}),
    "openvla-lora": (robot, {"lora": LORA, "gradient_checkpointing": True}),
    "openvla-wide": (robot, {"hidden_size": 576, "num_heads": 2, "intermediate_size": 64}),  # decodes unfused
    "openvla-mixed": (robot, {"dtype": "mixed"}),
    "openvla-bfloat16": (robot, {"dtype": "bfloat16", "lora": LORA}),
    "language": (language, {"tied": False}),
    "language-lora": (language, {"lora": LORA, "gradient_checkpointing": True}),
    "language-mixed": (language, {"dtype": "mixed"}),
}
METHODS = {
    "sft": lambda policy: SFT(**SUPERVISED, demonstrations=3),
    "sft-smoothed": lambda policy: SFT(**SUPERVISED, demonstrations=3, label_sigma=1.5),
    "grpo": lambda policy: GRPO(**ON_POLICY, minibatch_size=16),
    "reinforce": lambda policy: Reinforce(**ON_POLICY),
    "self_sft": lambda policy: SelfSFT(**SUPERVISED, states=2, iterative=True),
    "distillation": distillation,
    "simpo": lambda policy: simpo(),
    "sdft": lambda policy: sdft(),
}
TEXT_ONLY, ROBOT_ONLY = ("simpo", "sdft"), ("sft-smoothed",)
PENALTIES = {"none": None, "kl_forward": KL(coefficient=0.1), "kl_reverse": KL(coefficient=0.1, direction="reverse")}
WITH_PENALTY = {("openvla-lora", "sft"): "kl_forward", ("language-lora", "grpo"): "kl_forward",
                ("openvla", "grpo"): "kl_reverse", ("language", "sft"): "kl_reverse"}  # fmt: skip
# Every method with a policy of either kind, and every policy with a method that imitates and one that samples.
CASES = [
    (policy, method, WITH_PENALTY.get((policy, method), "none"))
    for policy in POLICIES
    for method in METHODS
    if method not in (ROBOT_ONLY if policy.startswith("language") else TEXT_ONLY)
    and (policy in ("openvla", "language") or method in ("sft", "grpo"))
]


def setup(path, policy, method, penalty, iterations=2) -> Setup:
    text = policy.startswith("language")
    make, options = POLICIES[policy]
    made = make("cuda" if torch.cuda.is_available() else "cpu", **options)
    task = tiny_lm.LettersTask() if text else ToyTask(max_steps=5)
    if made.lora is not None:  # drawn by the device's own generator
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".lora_A." in name:
                    parameter.fill_(0.1)
    how = METHODS[method](made)
    how.iterations = iterations
    return Setup(
        policy=made, task=task, method=how, penalty=PENALTIES[penalty], prior=[], held_out=[],
        budget=BUDGET, names={"policy": policy, "method": method, "penalty": penalty}, config={}, run_dir=path, seed=0,
        temperature=1.0, episodes=None, seed_start=None, num_envs=8, processes=1,
    )  # fmt: skip


def numbers(folder: RunFolder) -> dict:
    """What was recorded, without durations."""
    rows = {
        table: [{k: v for k, v in row.items() if "seconds" not in k} for row in folder.rows(table)]
        for table in ("train", "divergence", "episodes")
    }
    return rows | {"summary": folder.summary()}


@pytest.mark.parametrize("policy, method, penalty", CASES)
def test_a_run_on_a_pretended_gpu_gives_the_numbers_of_the_cpu(tmp_path, policy, method, penalty):
    with pretended_cuda():
        made = setup(tmp_path / "a" / "cuda", policy, method, penalty, iterations=1)
        assert made.policy.device == CUDA
        experiment.run(made)
        trained = [p for p in made.policy.parameters() if p.requires_grad]
        assert all(isinstance(parameter, OnCuda) for parameter in trained)
    experiment.run(setup(tmp_path / "b" / "cpu", policy, method, penalty, iterations=1))
    cuda, cpu = (numbers(RunFolder(tmp_path / run)) for run in ("a/cuda", "b/cpu"))
    assert cuda["summary"].keys() == cpu["summary"].keys() and len(cuda["divergence"]) == len(cpu["divergence"])
    if policy in ("openvla-mixed", "openvla-bfloat16", "language-mixed"):
        return  # sums in another order show in 8 bits
    for one, other in zip(cuda["episodes"], cpu["episodes"], strict=True):
        assert one["stage"] == 1 or one == other
    # Later steps may differ: Adam divides by the gradient's size, also where it is rounding.
    assert cuda["train"][0] == pytest.approx(cpu["train"][0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("policy, method", [("openvla", "grpo"), ("openvla-lora", "sft"), ("language", "sdft")])
def test_a_run_on_a_pretended_gpu_continues(tmp_path, policy, method):
    with pretended_cuda():
        experiment.run(setup(tmp_path / "a" / "run", policy, method, "none"))
        made = setup(tmp_path / "b" / "run", policy, method, "none")
        collect = made.method.collect

        def interrupted(policy, task, iteration):
            if iteration == 1:
                raise KeyboardInterrupt
            return collect(policy, task, iteration)

        made.method.collect = interrupted
        with pytest.raises(KeyboardInterrupt):
            experiment.run(made)
        experiment.run(setup(tmp_path / "b" / "run", policy, method, "none"))
    whole, broken = (numbers(RunFolder(tmp_path / run / "run")) for run in ("a", "b"))
    assert json.dumps(whole) == json.dumps(broken)
