"""Every policy, method and penalty on a pretended GPU: whole small runs, restarted too, with the CPU's numbers."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import tiny_lm
import torch
from gpu_nano import interrupted, methods, moved_a_little, penalties, small_run
from pretend_cuda import CUDA, OnCuda, pretended_cuda

from robot_forgetting.api.arguments import Arguments
from robot_forgetting.conformance.check_table import Table
from robot_forgetting.conformance.policy_checks import check_policy, observations
from robot_forgetting.conformance.toy_task import ToyTask, tiny_policy
from robot_forgetting.measure import BASE, TEXT, WEIGHTS, States, measured
from robot_forgetting.metrics.divergence import reverse_kl
from robot_forgetting.policy import Reference

LORA = {"rank": 2, "alpha": 4}
POLICIES = {
    "openvla": {},
    "openvla-lora": {"lora": LORA, "gradient_checkpointing": True},
    "openvla-wide": {"hidden_size": 576, "num_heads": 2, "intermediate_size": 64},  # decodes unfused
    "openvla-mixed": {"dtype": "mixed"},
    "openvla-bfloat16": {"dtype": "bfloat16", "lora": LORA},
    "language": {"tied": False},
    "language-lora": {"lora": LORA, "gradient_checkpointing": True},
    "language-mixed": {"dtype": "mixed"},
}
KINDS = {"openvla": "robot", "language": "text"}
WITH_PENALTY = {("openvla-lora", "sft"): "kl_forward", ("language-lora", "sft"): "kl_forward",
                ("openvla", "grpo"): "kl_reverse", ("language", "sft"): "kl_reverse"}  # fmt: skip
# Every method with a policy of either kind, and every policy with a method that imitates and one that samples.
CASES = [
    (policy, method, WITH_PENALTY.get((policy, method), "none"))
    for policy in POLICIES
    for method in methods(KINDS[policy.partition("-")[0]], 1, 4)
    if policy in KINDS or method == "sft" or (method == "grpo" and policy in ("openvla-lora", "openvla-wide"))
]


def built(policy: str, device: str):
    options = {"device": device, **POLICIES[policy]}
    return tiny_lm.tiny_lm(**options) if policy.startswith("language") else tiny_policy(ToyTask(), **options)


def run(folder, policy: str, method: str, penalty: str = "none", *, device="cuda", iterations: int = 1, stops=False):
    """The policy, and what was recorded."""
    text, made = policy.startswith("language"), built(policy, device)
    if made.lora is not None:  # drawn by the device's own generator
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".lora_A." in name:
                    parameter.fill_(0.1)
    task = tiny_lm.LettersTask() if text else ToyTask(max_steps=5)
    how = methods("text" if text else "robot", iterations, 4)[method](moved_a_little(made))
    how = interrupted(how) if stops else how
    return made, small_run(folder, made, task, how, penalties()[penalty])


@pytest.mark.parametrize("policy, method, penalty", CASES)
def test_a_run_on_a_pretended_gpu_gives_the_numbers_of_the_cpu(tmp_path, policy, method, penalty):
    with pretended_cuda():
        made, cuda = run(tmp_path / "a" / "run", policy, method, penalty)
        assert made.device == CUDA
        assert all(isinstance(parameter, OnCuda) for parameter in made.parameters() if parameter.requires_grad)
    _, cpu = run(tmp_path / "b" / "run", policy, method, penalty, device="cpu")
    assert cuda["summary"].keys() == cpu["summary"].keys() and len(cuda["divergence"]) == len(cpu["divergence"])
    if policy in ("openvla-mixed", "openvla-bfloat16", "language-mixed"):
        return  # sums in another order show in 8 bits
    for one, other in zip(cuda["episodes"], cpu["episodes"], strict=True):
        assert one["stage"] == 1 or one == other
    first, other = cuda["train"][0], cpu["train"][0]
    assert first.keys() == other.keys() and first["loss"] is not None
    # Later steps may differ: Adam divides by the gradient's size, also where it is rounding.
    for key in ("loss", "penalty", "grad_norm"):
        assert first[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("policy, method", [("openvla", "grpo"), ("openvla-lora", "sft"), ("language", "sdft")])
def test_a_run_on_a_pretended_gpu_continues(tmp_path, policy, method):
    with pretended_cuda():
        _, whole = run(tmp_path / "a" / "run", policy, method, iterations=2)
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path / "b" / "run", policy, method, iterations=2, stops=True)
        assert not (tmp_path / "b" / "run" / "summary.json").exists()
        _, broken = run(tmp_path / "b" / "run", policy, method, iterations=2)
    assert json.dumps(whole) == json.dumps(broken)


@pytest.mark.parametrize("policy", ["openvla-lora", "openvla-mixed", "language"])
def test_a_policy_on_a_pretended_gpu_keeps_its_promises(policy):
    text = policy.startswith("language")
    with pretended_cuda():
        made = built(policy, "cuda")
        table = Table()
        check_policy(table, made, tiny_lm.LettersTask() if text else ToyTask())
        assert table.rows and not [row for row in table.rows if row.state == "FAIL"]
        obs = (
            {"text": ["a b", "yes no two", "one", "what is", "sum"]} if text else observations(64, ["pick up the cube"])
        )
        states = States(obs, np.arange(len(next(iter(obs.values())))), TEXT if text else BASE)
        names = (
            "forward_kl,reverse_kl,cka_debiased,activation_l1_relative,weight_l1_relative,weight_spectral,weight_rank"
        )
        measures = Arguments("run", [f"measures=[{names}]"]).value("measures")
        rows = [row for place in (states, States(name=WEIGHTS)) for row in measured(measures, made, place)]
        assert {row["measure"] for row in rows} == set(names.split(",")[2 * text :])


@pytest.mark.parametrize("policy", KINDS)
def test_a_teacher_may_be_on_another_device(policy):
    task = tiny_lm.LettersTask() if policy == "language" else None
    with pretended_cuda():
        student, teacher = built(policy, "cuda"), built(policy, "cpu")
        obs = observations(64, ["pick up the cube"]) if task is None else task.observations(task.seeds("train")[:3])
        action = student.act(obs, noise=torch.full((len(next(iter(obs.values()))), 16), 0.5))
        values = student.compared(obs, action, {"kl": reverse_kl}, Reference(teacher, obs))["kl"]
        assert values.device == CUDA and values.abs().max().item() < 1e-4
