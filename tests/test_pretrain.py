"""Base policies: what `pretrain` saves acts as the policy that was trained, and its card says how it was made."""

from __future__ import annotations

import numpy as np
import pytest

from robot_forgetting.conformance.toy_task import ToyTask, tiny_policy
from robot_forgetting.engine.pretrain import Mixture, pretrain, ranges
from robot_forgetting.errors import UserError
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policy import Policy
from robot_forgetting.task import Demonstration, Task

pytestmark = pytest.mark.usefixtures("no_renderer")
SETTINGS = {
    "demonstrations": {"toy": 4, "other": 2}, "iterations": 2, "steps_per_iteration": 2, "batch_size": 4,
    "label_sigma": 0.0, "episodes": 3, "optimiser": {"learning_rate": 1e-3},
}  # fmt: skip
HALF = {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 7}}


def trained(policy, path) -> None:
    tasks = {"task": ToyTask(), "prior": [ToyTask("other")], "held_out": []}
    options = {"names": {"policy": "tiny"}, "config": {"policy": {}}, "seed": 0, "temperature": 1.0, "num_envs": 2}
    options |= {"run_dir": path / "run", "output": path / "saved", "processes": 1,
                "overrides": ["pretrain.demonstrations={a: 1}"]}  # fmt: skip
    assert pretrain(policy, pretrain=SETTINGS, **tasks, **options) == 0


def bins(policy) -> np.ndarray:
    """What the lowest, the middle and the highest token of every dimension mean."""
    action = policy.encode(np.zeros((3, 7)), statistics="toy")
    action.tokens[:] = action.tokens.new_tensor([[0], [127], [255]])
    return policy.decode(action, statistics="toy")


def test_a_whole_policy_is_saved_with_the_measured_ranges(tmp_path):
    policy = tiny_policy(ToyTask())
    trained(policy, tmp_path)
    again = OpenVLAPolicy(str(tmp_path / "saved"), check_images=False, device="cpu")
    assert np.array_equal(bins(again), bins(policy))
    assert again.statistics.dimensions("toy") == 7
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "- command: `robot-forgetting pretrain 'pretrain.demonstrations={a: 1}'`" in card
    assert "demonstrations: 4 of toy, 2 of other" in card and "optimiser steps: 4 of 4 decisions" in card
    assert card.count("/3 |") == 4  # two tasks, sampled and greedy


def test_an_adapter_leaves_the_ranges_of_its_checkpoint(tmp_path):
    parent = tiny_policy(ToyTask())
    parent.set_statistics({"toy": HALF})
    parent.save(tmp_path / "parent")
    options = {"check_images": False, "device": "cpu"}
    lora = {"rank": 2, "alpha": 4, "targets": None}
    policy = OpenVLAPolicy(str(tmp_path / "parent"), lora=lora, **options)
    trained(policy, tmp_path)
    assert not (tmp_path / "saved" / "dataset_statistics.json").exists()
    again = OpenVLAPolicy(str(tmp_path / "parent"), lora={**lora, "adapter": str(tmp_path / "saved")}, **options)
    assert np.array_equal(bins(again), bins(policy)) and np.array_equal(bins(policy), bins(parent))


def test_ranges_are_percentiles_of_all_commands():
    commands = np.zeros((101, 7), np.float32)
    commands[:, 0] = np.arange(101)
    halves = [Demonstration(np.zeros((0,)), part, "go", 0) for part in (commands[:40], commands[40:])]
    table = ranges(halves)["action"]
    assert (table["q01"][0], table["q99"][0], table["min"][0], table["max"][0]) == (1.0, 99.0, 0.0, 100.0)
    assert table["mask"] == [True] * 6 + [False]


@pytest.mark.parametrize(
    "counts, words",
    [({"toy": 1, "toi": 1}, "names \\['toi'\\]; these tasks are not in this run"), ({}, "asks for none")],
)
def test_wrong_counts(counts, words):
    with pytest.raises(UserError, match=words):
        Mixture([ToyTask()], counts)


class Unsaved(OpenVLAPolicy):
    set_statistics, save = Policy.set_statistics, Policy.save


class Uncollected(ToyTask):
    def demonstrations(self, count, *, split="train", start=0):
        raise AssertionError("collected before the policy was looked at")


def test_a_policy_without_what_pretrain_needs_is_refused_before_anything_is_collected(tmp_path):
    policy = tiny_policy(ToyTask())
    policy.__class__ = Unsaved
    words = r"test_pretrain.py, line \d+: Unsaved lacks `save` and `set_statistics`, which pretrain needs"
    with pytest.raises(UserError, match=words):
        pretrain(policy, Uncollected(), [], [], {**SETTINGS, "demonstrations": {"toy": 4}}, {"policy": {}}, {},
                 tmp_path / "run", None, 0, 1.0, 2, 1)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_task_without_an_expert_is_refused_before_the_others_are_collected():
    class NoExpert(ToyTask):
        demonstrations = Task.demonstrations

    with pytest.raises(UserError, match="task 'other' has no demonstrations"):
        Mixture([Uncollected(), NoExpert("other")], {"toy": 1, "other": 1})
