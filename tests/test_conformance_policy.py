"""`robot-forgetting check policy=...`: each deliberate mistake of a policy is found and named."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from robot_forgetting.conformance.check_table import Table
from robot_forgetting.conformance.policy_checks import check_policy
from robot_forgetting.conformance.toy_task import ToyTask, tiny_policy
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policy import Action


def failures(table: Table) -> dict[str, str]:
    return {row.name: row.detail for row in table.rows if row.state == "FAIL"}


@contextmanager
def nothing():
    yield


def blind(policy, obs):
    return {**obs, "image": np.zeros_like(obs["image"])}


LOGITS, ACT, DECODE = OpenVLAPolicy.logits, OpenVLAPolicy.act, OpenVLAPolicy.decode
MISTAKES = {
    "blind": {
        "logits": lambda self, obs, action: LOGITS(self, blind(self, obs), action),
        "act": lambda self, obs, **options: ACT(self, blind(self, obs), **options),
    },
    "half": {"logits": lambda self, obs, action: LOGITS(self, obs, action).half()},
    "ignores temperature": {"act": lambda self, obs, temperature=1.0, noise=None: ACT(self, obs, noise=noise)},
    "ignores noise": {"act": lambda self, obs, temperature=1.0, noise=None: ACT(self, obs, temperature=temperature)},
    "no log_prob": {"act": lambda self, obs, **o: replace(ACT(self, obs, **o), log_prob=None)},
    "other log_prob": {"log_prob": lambda self, obs, action: 2 * OpenVLAPolicy.log_prob(self, obs, action)},
    "batch": {"logits": lambda self, obs, action: LOGITS(self, obs, action) * (1 + len(action) / 10)},
    "off by three": {
        "decode": lambda self, action, **o: DECODE(self, Action((action.tokens - 3).clamp(0), action.mask)),
    },
    "double": {"decode": lambda self, action, **o: DECODE(self, action, **o).astype(np.float64)},
    "base": {"base": lambda self: nothing()},
    "detached": {"log_prob": lambda self, obs, action: OpenVLAPolicy.log_prob(self, obs, action).detach()},
}


@pytest.mark.parametrize(
    "mistake, name, words",
    [
        ("blind", "sees", "does not reach"),
        ("half", "logits", "float32"),
        ("ignores temperature", "greedy is the argmax", "must be greedy"),
        ("ignores noise", "act is repeatable", "other tokens"),
        ("no log_prob", "act", "one number per token"),
        ("other log_prob", "log_prob from logits", "differs from log_softmax"),
        ("other log_prob", "act's log_prob", "differ by up to"),
        ("batch", "no batch dependence", "other rows"),
        ("off by three", "encode and decode", "more than a bin"),
        ("double", "decode", "float64"),
        ("base", "base()", "is not the base policy"),
        ("detached", "gradient", "RuntimeError"),
    ],
)
def test_wrong_policies(mistake, name, words):
    policy, table = tiny_policy(ToyTask()), Table()
    policy.__class__ = type("Mistaken", (OpenVLAPolicy,), MISTAKES[mistake])
    check_policy(table, policy)
    assert words in failures(table)[name], failures(table)


def test_policy_and_task_that_disagree():
    table = Table()
    policy = tiny_policy(ToyTask())
    policy._spec["gripper"] = "+1 closes"
    check_policy(table, policy, ToyTask())
    assert "gripper: '+1 closes' against '+1 opens'" in failures(table)["same convention as task"]
