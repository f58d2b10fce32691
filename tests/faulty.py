"""Plug-ins with one thing wrong each, chosen by ``fault``; imported as a user's own module would be."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch

from robot_forgetting.conformance.toy_task import ToyEnv, ToyTask, tiny_policy
from robot_forgetting.method import Batch, Method, Optimiser, Penalty
from robot_forgetting.methods.sft import SFT
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policy import Action


class Faulty(Method):
    """Behaviour cloning with one mistake."""

    def __init__(self, fault: str = ""):
        self.fault, self.optimiser, self.trainer = fault, Optimiser(learning_rate=1e-3), os.getpid()
        self.inner = SFT(iterations=2, steps_per_iteration=1, batch_size=8, demonstrations=4, optimiser=None)
        if fault == "constructor":
            raise RuntimeError("not today")
        if fault != "no iterations":
            self.iterations = 2.0 if fault == "iterations" else 2
        if fault == "no optimiser":
            del self.optimiser

    def begin(self, policy, task, past):
        self.inner.begin(policy, task, past)
        self.scale = 1.0
        if self.fault == "begin":
            raise KeyError("past")

    def collect(self, policy, task, iteration):
        made = self.inner.collect(policy, task, iteration)
        if self.fault == "collect raises":
            raise ZeroDivisionError("division by zero\nand a second line")
        if self.fault == "ours":
            return made[0].action.cat([])  # raises in the core's code
        return {
            "None": None, "one batch": made[0], "a number": [3], "empty": [made[0][:0]],
            "short": [replace(made[0], advantage=torch.ones(3))],
            "float tokens": [replace(made[0], action=Action(made[0].action.tokens.float(), made[0].action.mask))],
        }.get(self.fault, made)  # fmt: skip

    def loss(self, policy, batch: Batch):
        if self.fault == "typo":
            return polcy.log_prob(batch.obs, batch.action).mean()  # noqa: F821
        if self.fault == "attribute":
            return policy.logprob(batch.obs, batch.action).mean()
        if self.fault == "late":  # of what only begin() sets: no fault before
            return -policy.log_prob(batch.obs, batch.action).mean() * (self.scale / 0)
        if self.fault == "child" and os.getpid() != self.trainer:
            raise ZeroDivisionError("in another process")
        value = self.inner.loss(policy, batch)
        return {
            "vector": value.repeat(2), "float": value.item(), "detached": value.detach(), "no loss": None,
            "whole": torch.ones((), dtype=torch.int64),
        }.get(self.fault, value)  # fmt: skip


class ShortSignature(Faulty):
    def loss(self, policy):
        return policy


class FaultyPenalty(Penalty):
    def __init__(self, fault: str = ""):
        self.fault = fault

    def __call__(self, policy, batch):
        value = policy.log_prob(batch.obs, batch.action).square().mean()
        if self.fault == "raises":
            raise NameError("name 'kl' is not defined")
        return {"vector": value.repeat(2), "None": None, "float": 0.1}.get(self.fault, value)


class NoPart:
    """Neither a method nor a penalty nor a task nor a policy."""


class FaultyTask(ToyTask):
    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        if fault == "instruction":
            self.instruction = 5

    def make_env(self, num_envs, *, render=False):
        if self.fault == "make_env":
            raise FileNotFoundError("no mesh.glb")
        return FaultyEnv(self, num_envs)

    def demonstrations(self, count, *, split="train", start=0):
        if self.fault == "expert":
            raise IndexError("no waypoint")
        yield from super().demonstrations(count, split=split, start=start)


class FaultyEnv(ToyEnv):
    def wait(self):
        group, transitions = super().wait()
        fault = self.task.fault
        if fault == "raises":
            raise LookupError("the arm is gone")
        if fault == "None":
            return group, [None for _ in transitions]
        return group, [replace(t, **self.spoilt(t).get(fault, {})) for t in transitions]

    def spoilt(self, transition) -> dict[str, dict]:
        image, told = transition.observation["image"], transition.observation["instruction"]
        return {
            "reward": {"reward": "much"},
            "reward tensor": {"reward": torch.ones(())},
            "success": {"success": 1},
            "no image": {"observation": {"instruction": told}},
            "float image": {"observation": {"image": image / 255, "instruction": told}},
            "instruction bytes": {"observation": {"image": image, "instruction": b"go"}},
            "always crashes": {"error": "the gripper is missing", "done": True},
        }


class FaultyPolicy(OpenVLAPolicy):
    """A tiny one, whose `act` or `decode` is wrong."""

    def act(self, obs, *, temperature=1.0, noise=None):
        action = super().act(obs, temperature=temperature, noise=noise)
        if self.fault == "raises":
            raise ValueError("no such picture")
        return {
            "tuple": (action.tokens, action.mask),
            "float tokens": replace(action, tokens=action.tokens.float()),
            "one row": action[:1],
            "flat mask": replace(action, mask=action.mask[:, 0]),
            "no log_prob": replace(action, log_prob=None),
        }.get(self.fault, action)

    def decode(self, action, *, statistics=None):
        commands = super().decode(action, statistics=statistics)
        return commands[:1] if self.fault == "one command" else None if self.fault == "None" else commands


def policy(fault: str = "sound") -> OpenVLAPolicy:
    """With a fault, the plug-in; without, our own policy."""
    made = tiny_policy(ToyTask())
    if fault != "sound":
        made.__class__, made.fault = FaultyPolicy, fault
    return made


def blind(env):
    """An expert that asks for something its environment has not."""
    return env.no_such_cube


def short(env):
    return np.zeros(3)
