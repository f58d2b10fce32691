"""Episodes of the base policy that a run takes over from a sibling: the same measurement, or none."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy import ToyPolicy, ToyTask
from toy_runs import BUDGET, run, sources, summary

from robot_forgetting.built_with import BuiltWith
from robot_forgetting.conformance import toy_task as toy
from robot_forgetting.engine import code_digest, episode_rows
from robot_forgetting.engine.code_digest import code_of
from robot_forgetting.engine.episode_rows import evaluate_into, fingerprint
from robot_forgetting.engine.one_task import evaluate_command
from robot_forgetting.errors import UserError
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask

pytestmark = pytest.mark.usefixtures("no_renderer")


def test_base_rows_come_from_a_sibling(tmp_path, monkeypatch):
    first = run(tmp_path / "first")
    evaluated = []
    real = episode_rows.evaluate

    def listening(policy, task, seeds, **options):
        evaluated.append(list(seeds))
        return real(policy, task, seeds, **options)

    monkeypatch.setattr(episode_rows, "evaluate", listening)
    second = run(tmp_path / "second", "sft")
    assert sources(first) == {None} and sources(second) == {"first"}
    assert {row["source"] for row in second.episodes() if row["stage"] == 1} == {None}
    assert len(evaluated) == 2 + 4  # interim: two tasks; end: two tasks at two decodes; base: none
    base = [line for line in summary(second)["success"] if line["stage"] == 0]
    assert base == [line for line in summary(first)["success"] if line["stage"] == 0]
    third = run(tmp_path / "third", "sft")
    assert sources(third) == {"first"}  # where it was measured, not where it was found
    assert summary(third)["success"] == summary(second)["success"]


@pytest.mark.parametrize(
    "change",
    [{"policy": ToyPolicy(seed=2)}, {"temperature": 0.7}, {"task": ToyTask("reach", max_steps=5)},
     {"prior": [ToyTask("mirror"), ToyTask("reach_again")]}],
    ids=["policy", "temperature", "max_steps", "tasks"],
)  # fmt: skip
def test_base_rows_of_another_measurement_are_not_taken(tmp_path, monkeypatch, change):
    monkeypatch.setattr("toy.INSTRUCTIONS", ("reach", "mirror", "reach_again"))
    monkeypatch.setattr(ToyPolicy, "_states", _states_of_three)
    run(tmp_path / "first")
    assert sources(run(tmp_path / "second", **change)) == {None}


def _states_of_three(self, obs):
    images = np.asarray(obs["image"])
    state = images[:, 0, :, 0].argmax(1) * 4 + images[:, -1, :, 0].argmax(1)
    return torch.tensor([int(text == "mirror") for text in obs["instruction"]]), torch.from_numpy(state)


def test_only_missing_base_rows_are_measured(tmp_path):
    """A sibling with fewer episodes gives what it has; one with more gives what is needed and no more."""
    run(tmp_path / "few", budget={"episodes": 2, "greedy_episodes": 1})
    middle = run(tmp_path / "middle")
    assert sources(middle) == {None, "few"}
    run(tmp_path / "z_many", budget={"episodes": 9, "greedy_episodes": 9})
    alone = run(tmp_path / "elsewhere" / "alone")
    assert summary(middle)["success"] == summary(alone)["success"]
    last = run(tmp_path / "last", budget={"episodes": 4})
    assert [line["n"] for line in summary(last)["success"] if line["stage"] == 0] == [4, 4, 3, 3]


def test_fingerprint():
    tasks = [ToyTask(), ToyTask("mirror")]
    policy = ToyPolicy(seed=1)
    mark = fingerprint(policy, tasks)
    assert mark == fingerprint(ToyPolicy(seed=1), tasks) and len(mark) == 16
    assert mark != fingerprint(policy, tasks[:1]) and mark == fingerprint(policy, tasks[::-1])
    with torch.no_grad():
        policy.table[0, 3, 1, 0] += 1e-3
        policy.table[0, 3, 1, 1] -= 1e-3  # the sum stays
    assert mark != fingerprint(policy, tasks)


@dataclasses.dataclass
class Ranges:
    norm_stats: dict


def ranged(high: float) -> ToyPolicy:
    """A policy whose un-normalisation is no weight."""
    policy = ToyPolicy(seed=1)
    policy.config = Ranges({"panda": {"q99": [high]}})
    return policy


@pytest.mark.parametrize(
    "change",
    [{"render": "stock"}, {"image_size": 128}, {"max_steps": 80}, {"statistics": "bridge"}, {"spawn": "near"},
     {"instruction": "take it"}, {"env_arguments": {"robot_uids": "panda"}},
     {"camera": {"eye": [0, 0, 1], "target": [0, 0, 0], "fov": 1.0}}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_fingerprint_of_another_measurement(change):
    """Whatever changes the meaning of a row: rows of two fingerprints are neither copied nor pooled."""
    policy, usual = ToyPolicy(seed=1), {"env_id": "PickCube-v1", "instruction": "pick it"}
    mark = fingerprint(policy, [ManiSkillTask("pick", **usual)])
    assert mark == fingerprint(policy, [ManiSkillTask("pick", **usual, processes=7)])
    assert mark != fingerprint(policy, [ManiSkillTask("pick", **(usual | change))])


def test_fingerprint_of_other_ranges():
    assert fingerprint(ranged(1.0), [ToyTask()]) == fingerprint(ranged(1.0), [ToyTask()])
    assert fingerprint(ranged(1.0), [ToyTask()]) != fingerprint(ranged(2.0), [ToyTask()])
    assert fingerprint(ToyPolicy(seed=1, image_size=None), [ToyTask()]) != fingerprint(ToyPolicy(seed=1), [ToyTask()])


def test_rows_of_another_temperature_are_measured_again(tmp_path):
    fields = {"stage": 0, "iteration": 0, "trained_on": [], "role": "new", "decode": "sampled"}
    with RunFolder.create(tmp_path / "a", config={}) as folder:
        for temperature, expected in ((1.0, 2), (0.5, 4), (1.0, 4)):
            found = evaluate_into(
                folder, ToyPolicy(seed=1), ToyTask(), [10**6, 10**6 + 1], temperature=temperature, num_envs=2, **fields
            )
            assert [row["temperature"] for row in found] == [temperature] * 2 and len(folder.episodes()) == expected


def test_fingerprint_does_not_depend_on_the_number_of_threads():
    class Big(ToyPolicy):
        def __init__(self):
            super().__init__()
            self.big = torch.nn.Parameter(torch.randn(700, 700, generator=torch.Generator().manual_seed(0)))

    threads, marks = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            marks.add(fingerprint(Big(), [ToyTask()]))
    finally:
        torch.set_num_threads(threads)
    assert len(marks) == 1


def test_fingerprint_of_adapters(tmp_path):
    """Fresh ones are no part of the base, those that were trained before are."""
    parent, lora = toy.tiny_policy(toy.ToyTask()), {"rank": 2, "alpha": 4}
    parent.save(tmp_path / "parent")
    marks = []
    for name, number in (("fresh", 0), ("a", 1), ("b", 2)):
        policy = OpenVLAPolicy(str(tmp_path / "parent"), lora=lora, check_images=False, device="cpu")
        marks.append(fingerprint(policy, []))
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.fill_(0.01 * number)
        policy.save(tmp_path / name)
    assert len(set(marks)) == 1  # though the adapters were drawn anew
    for name in ("a", "b"):
        again = OpenVLAPolicy(
            str(tmp_path / "parent"), lora={**lora, "adapter": str(tmp_path / name)}, check_images=False, device="cpu"
        )
        marks.append(fingerprint(again, []))
    assert len(set(marks)) == 3


# ---- code


OWN = """
from toy import ToyPolicy, ToyTask
from {helper} import goal

class OwnTask(ToyTask):
    '''Walks.'''
    def goal(self, mark):
        return goal(mark)

class OwnPolicy(ToyPolicy):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a user's modules, and imports them as a new process would."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "mine"), *sys.path])
    name = f"own_{tmp_path.name.replace('-', '_')}"

    def written(source: str = OWN, helper: str = "def goal(mark):\n    return mark\n"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / f"{name}.py").write_text(source.format(helper=f"{name}_helper"))
        (tmp_path / "mine" / f"{name}_helper.py").write_text(helper)
        for module in (name, f"{name}_helper"):
            sys.modules.pop(module, None)
        for function in (code_digest.file_of, code_digest._spec, code_digest._installed, code_digest._digest):
            function.cache_clear()
        importlib.invalidate_caches()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "dont_write_bytecode", True)
            return importlib.import_module(name)

    return written


@pytest.mark.parametrize(
    "source, helper, same",
    [
        (OWN, "def goal(mark):\n    return mark\n", True),
        (OWN, '"""Goals."""\n\n\ndef goal(mark):  # where to go\n    """The mark."""\n    return mark\n', True),
        (OWN, "def goal(mark):\n    return 3 - mark\n", False),
        (OWN.replace("return goal(mark)", "return 3 - goal(mark)"), "def goal(mark):\n    return mark\n", False),
        (OWN.replace("    pass", "    temperature = 2"), "def goal(mark):\n    return mark\n", False),
    ],
    ids=["the same", "comments", "helper", "task", "policy"],
)  # fmt: skip
def test_base_rows_of_other_code_are_not_taken(tmp_path, own, source, helper, same):
    module = own()
    run(tmp_path / "first", task=module.OwnTask(), policy=module.OwnPolicy(seed=1))
    module = own(source, helper)
    second = run(tmp_path / "second", task=module.OwnTask(), policy=module.OwnPolicy(seed=1))
    assert sources(second) == ({"first"} if same else {None})


def test_a_run_is_not_continued_with_other_code(tmp_path, own):
    """Neither a run nor an evaluation: their rows would be of two tasks. What changed is named."""
    made = own()
    run(tmp_path / "run", task=made.OwnTask())
    evaluation = {
        "policy": ToyPolicy(seed=1), "run_dir": tmp_path / "evaluation", "checkpoint": None, "config": {}, "names": {},
        "seed": 0, "episodes": 5, "seed_start": 20, "temperature": 1.0, "num_envs": 3, "budget": BUDGET,
    }  # fmt: skip
    evaluate_command(**evaluation, task=made.OwnTask())
    made = own(helper="def goal(mark):\n    return 3 - mark\n")
    words = rf"began with other code \(changed since: {made.__name__}_helper\).* choose another run_dir"
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", task=made.OwnTask())
    with pytest.raises(UserError, match=words):
        evaluate_command(**evaluation, task=made.OwnTask())
    made = own()
    run(tmp_path / "run", task=made.OwnTask())


def test_what_changed_is_named(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(UserError, match="began with other settings of task reach .fingerprint"):
        run(tmp_path / "run", task=ToyTask(max_steps=9))
    with pytest.raises(UserError, match="began with another base policy .fingerprint"):
        run(tmp_path / "run", policy=ToyPolicy(seed=2))
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    del state["fingerprint_parts"]
    state["fingerprint"] = "of an earlier version"
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="under an earlier version, whose records do not identify code"):
        run(tmp_path / "run")


def test_code_of_environment_expert_and_robot():
    task = ManiSkillTask("pick", "PickCube-v1", "pick it", expert="robot_forgetting.envs.pick_cube.expert")
    found = code_of([task], task.code_modules())
    simulator = ("expert", "workers", "simulation", "maniskill_task")
    for module in ("envs.pick_cube", "tasks.panda", *(f"tasks.simulator.{name}" for name in simulator)):
        assert f"robot_forgetting.{module}" in found
    assert not [name for name in found if not name.startswith("robot_forgetting.")]
    unread = ("records.run_folder", "engine.experiment", "cli.command_line")
    assert not {f"robot_forgetting.{module}" for module in unread} & found.keys()


def test_code_without_a_source():
    """A class that was typed into a notebook is known by its compiled functions, and by those that they call."""
    text = "def goal(mark):\n    return {goal}\n\nclass Typed(BuiltWith):\n"
    text += "    def act(self, x): return goal(x) + {plus}\n    def __init__(self): self.start = {start}\n"

    def typed(**values):
        space = {"__name__": "a_notebook", "BuiltWith": BuiltWith}
        exec(text.format(**{"goal": "mark", "plus": 1, "start": 3} | values), space)
        return code_of([space["Typed"]()])

    assert list(typed()) == ["a_notebook:Typed"]
    assert typed() == typed() and typed() != typed(plus=2) and typed() != typed(goal="3 - mark")
    assert typed() != typed(start=4), "what remembers a constructor's arguments hides nothing of it"


def test_digests_are_the_same_in_another_process():
    command = "from robot_forgetting.engine.code_digest import code_of; "
    command += "from robot_forgetting.policies.mlp import MLPPolicy; "
    command += "import json; print(json.dumps(code_of([MLPPolicy(sizes=(2, 2))])))"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == code_of([MLPPolicy(sizes=(2, 2))])
