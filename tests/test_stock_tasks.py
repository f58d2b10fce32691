"""ManiSkill's own environments, and a user's subclasses of them: each works with a yaml, or a line says why not."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from robot_forgetting.errors import UserError, blamed, told
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask
from robot_forgetting.tasks.simulator.simulation import Simulation
from robot_forgetting.tasks.simulator.workers import POOL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("renderer"),
]
# Those whose meshes come with mani-skill and whose robot is one arm with a gripper; the rest needs a download, or is
# refused below. Their default robot carries a camera that low_poly does not draw, so the plain Panda stands in.
WORKING = ["PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1", "LiftPegUpright-v1", "PlaceSphere-v1",
           "RollBall-v1", "PokeCube-v1", "PullCubeTool-v1", "PegInsertionSide-v1", "PlugCharger-v1",
           "StackPyramid-v1", "FMBAssembly1Easy-v1"]  # fmt: skip
PANDA = {"robot_uids": "panda"}
MOVE = np.array([0.3, 0.1, -0.2, 0, 0, 0, 1.0])


def built(env_id: str = "Faulty-PickCube-v1", **arguments) -> Simulation:
    arguments = {"env_arguments": PANDA, **arguments}
    if env_id.startswith("Faulty"):
        arguments["modules"] = ["faulty_env"]
    return Simulation(ManiSkillTask("mine", env_id, "do it", **arguments).spec)


@pytest.mark.parametrize("env_id", WORKING)
def test_stock(env_id):
    """A reset and two steps of a second episode: a robot that moves, a picture of that."""
    above = {"eye": [0.9, 0.5, 0.9], "target": [-0.3, 0.0, 0.1], "fov": 1.0}
    simulation = built(env_id, camera=above)
    simulation.reset(4)
    before = simulation.reset(5)["image"]
    start = simulation.env.agent.robot._objs[0].qpos.copy()
    for _ in range(2):
        observation, reward, success, done, flags = simulation.step(MOVE)
    assert np.abs(simulation.env.agent.robot._objs[0].qpos - start).max() > 0.01
    assert (observation["image"] != before).any() and before.std() > 5
    assert (reward, success, done, flags["success"]) == (0.0, False, False, False)
    simulation.close()


@pytest.mark.parametrize(
    "env_id, arguments, words",
    [
        ("PushT-v1", {}, "'PushT-v1': its robot 'panda_stick' has no gripper, only arm; a robot task needs one arm"),
        ("TwoRobotPickCube-v1", {}, "'TwoRobotPickCube-v1' has 2 robots; a robot task has one arm with a gripper"),
        ("MS-CartpoleBalance-v1", {}, "for robot=panda: AssertionError: pd_ee_delta_pose not in supported modes"),
        ("DrawTriangle-v1", {}, "cannot build environment 'DrawTriangle-v1' for robot=panda: NotImplementedError"),
        ("Empty-v1", {}, r"EmptyEnv.evaluate\(\) gives no 'success' \(it gives nothing\); a task needs it"),
        ("AnymalC-Reach-v1", {}, "python -m mani_skill.utils.download_asset NAME"),
        ("StackCube-v1", {}, "low_poly covers the robot 'panda', but environment 'StackCube-v1' has 'panda_wristcam'"),
        ("PickCube-v1", {"camera": {"sensor": "hand"}}, "'PickCube-v1' has no camera 'hand'; leave camera.sensor out"),
    ],
)
def test_refused(env_id, arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        built(env_id, env_arguments={}, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "camera, full_pictures, words",
    [
        ({"eye": [1, 0, 1]}, False, "task 'mine': camera has eye; give eye, target and fov, or size and intrinsic"),
        ({"sensor": "hand_camera", "fov": 1.0}, False, "camera has fov; give"),
        ({"sensor": "hand_camera"}, True, "full_pictures needs camera.size"),
    ],
)
def test_half_a_camera(camera, full_pictures, words):
    with pytest.raises(UserError, match=words):
        ManiSkillTask("mine", "PickCube-v1", "do it", camera=camera, full_pictures=full_pictures)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("constructor", "in __init__: RuntimeError: no such gripper"),
        ("type", r"in _load_scene: TypeError: object of type 'int' has no len\(\)"),
        ("state", "in _initialize_episode: AttributeError: .* no attribute 'no_such_thing'"),
        ("raises", "in evaluate: IndexError: index 7 is out of bounds"),
        ("no success", r"FaultyPickCubeEnv.evaluate\(\) gives no 'success' \(it gives lifted\); a task needs it"),
        ("plain", r"FaultyPickCubeEnv.evaluate\(\) gives a bool as 'success' .*; a task needs it, a bool tensor \[1\]"),
    ],
)
def test_a_faulty_environment(fault, words):
    """The line is the plug-in's, whatever of ManiSkill lies between it and us."""
    with pytest.raises((UserError, RuntimeError, TypeError, AttributeError, IndexError)) as caught:
        built(env_arguments={**PANDA, "fault": fault})
    error = caught.value
    line = str(error) if isinstance(error, UserError) else blamed(error)
    assert line.startswith("tests/faulty_env.py, line ") and re.search(words, line), line
    assert told(error)[1] == line


def test_a_subclass_that_tells_of_success_alone():
    """Its parent's own observations would ask for `is_grasped`; nobody wants those."""
    simulation = built()
    simulation.reset(3)
    assert simulation.step(MOVE)[4] == {"success": False}
    simulation.close()


@pytest.mark.parametrize(
    "expert, words",
    [
        ("blind_expert", "faulty_env.py, line .*, in blind_expert: AttributeError: .* no attribute 'ball'"),
        ("short_expert", r"the expert faulty_env.short_expert gave a command of shape \[3\]; give 7 numbers"),
    ],
)
def test_a_faulty_expert_across_processes(expert, words):
    """Said when the environment starts, before any episode; in one line, with the worker's traceback behind it."""
    task = ManiSkillTask("mine", "PickCube-v1", "do it", expert=f"faulty_env.{expert}", processes=1)
    try:
        with pytest.raises(UserError, match=words) as caught:
            task.make_env(1)
    finally:
        POOL.close()
    assert "\n" not in str(caught.value) and "Traceback" in str(caught.value.__cause__)


def test_the_camera_that_the_policy_looks_through():
    """`check` says which of several it is; one that is named alone stays where the environment put it."""
    wrist = ManiSkillTask("mine", "PegInsertionSide-v1", "do it", camera={"sensor": "hand_camera"}, processes=1,
                          render="stock")  # fmt: skip
    try:
        with wrist.make_env(1) as env:
            assert env.camera == "hand_camera (of base_camera, hand_camera; camera.sensor chooses)"
            env.request(0, {0: 5}, {})
            (start,) = env.wait()[1]
    finally:
        POOL.close()
    assert start.error is None and start.observation["image"].std() > 5


def test_an_environment_that_is_built_anew_for_every_episode():
    """PegInsertionSide makes another peg each time: robot, camera and pictures are those of the present one."""
    simulation = built("PegInsertionSide-v1", image_size=32)
    assert simulation.env.reconfiguration_freq == 1
    first = simulation.reset(5)["image"]
    simulation.reset(6)
    assert np.array_equal(simulation.reset(5)["image"], first)
    fresh = Simulation(dataclasses.replace(simulation.spec))
    assert np.array_equal(fresh.reset(5)["image"], first)
    trace = []
    for each in (simulation, fresh):
        each.step(MOVE)
        trace.append(torch.from_numpy(each.env.agent.robot._objs[0].qpos.copy()))
    assert torch.equal(*trace)
    simulation.close()
    fresh.close()
