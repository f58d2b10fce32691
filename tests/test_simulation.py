"""Robot tasks in ManiSkill: our fast step against ManiSkill's own, experts, initial states, bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from robot_tasks import TASKS, configured

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask
from robot_forgetting.tasks.simulator.simulation import Simulation

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.usefixtures("renderer"),
]


@pytest.fixture(scope="module")
def simulations():
    """One simulation per task in this process, built when first needed."""
    made = {}

    def get(name: str) -> Simulation:
        if name not in made:
            made[name] = Simulation(configured(name).spec)
        return made[name]

    yield get
    for simulation in made.values():
        simulation.close()


def joints(simulation: Simulation) -> np.ndarray:
    return simulation.env.agent.robot._objs[0].qpos.copy()


def expert_episode(simulation: Simulation, seed: int) -> tuple[bool, list[np.ndarray]]:
    simulation.reset(seed)
    commands, success, done = [], False, False
    while not done:
        commands.append(simulation.expert_command())
        _, _, success, done, _ = simulation.step(commands[-1])
    return success, commands


# ---- one simulation


@pytest.mark.parametrize("name", TASKS)
def test_our_step_is_maniskills_step(simulations, blind, name):
    """30 random commands, half of them beyond the limits: the same joints, object poses and success at every step."""
    simulation = simulations(name)
    env = simulation.env
    rng = np.random.default_rng(1)
    commands = rng.uniform(-1.5, 1.5, (30, 7)) * rng.choice([0.3, 1.0], (30, 1))
    simulation.reset(11)
    ours = []
    for command in commands:
        _, _, success, _, flags = simulation.step(command)
        ours.append((joints(simulation), success, flags))
    env.reset(seed=11)
    for command, (expected, success, flags) in zip(commands, ours, strict=True):
        _, _, terminated, _, info = env.step(torch.from_numpy(command).float())
        assert np.abs(joints(simulation) - expected).max() < 1e-4
        assert bool(info["success"]) == success == bool(terminated)
        assert {key: bool(info[key]) for key in flags} == flags


@pytest.mark.parametrize("name", TASKS)
def test_our_step_is_maniskills_step_along_an_expert(simulations, blind, name):
    """Contacts and success included, which random commands seldom reach."""
    simulation = simulations(name)
    success, commands = expert_episode(simulation, 12)
    expected = joints(simulation)
    simulation.env.reset(seed=12)
    for command in commands:
        _, _, terminated, _, info = simulation.env.step(torch.from_numpy(command))
    assert success and bool(info["success"]) and bool(terminated)
    assert np.abs(joints(simulation) - expected).max() < 1e-4


@pytest.mark.parametrize("name, thing", [("pick_cube", "cube"), ("stack_cube", "cubeA"), ("place_sphere", "obj")])
def test_grasp_test_is_maniskills(simulations, blind, name, thing):
    simulation = simulations(name)
    agent, target = simulation.env.agent, getattr(simulation.env, thing)
    simulation.reset(12)
    found, done = [], False
    while not done:
        _, _, _, done, _ = simulation.step(simulation.expert_command())
        found.append(bool(agent.is_grasping(target)))
        assert found[-1] == bool(type(agent).is_grasping(agent, target))
    assert True in found and False in found


@pytest.mark.parametrize("name", TASKS)
def test_an_episode_repeats_itself_bitwise(simulations, name):
    """After other episodes, and in an environment that has run none."""
    simulation = simulations(name)

    def replay(simulation, commands) -> list:
        trace = [simulation.reset(21)["image"].tobytes()]
        for command in commands:
            observation, *_ = simulation.step(command)
            trace += [observation["image"].tobytes(), joints(simulation).tobytes()]
        return trace

    _, commands = expert_episode(simulation, 21)
    commands = [command + 0.05 for command in commands[:20]]
    first = replay(simulation, commands)
    expert_episode(simulation, 22)
    simulation.reset(23)
    assert replay(simulation, commands) == first
    fresh = Simulation(simulation.spec)
    try:
        assert replay(fresh, commands) == first
    finally:
        fresh.close()


def test_an_object_that_fell_asleep(simulations, blind):
    """Whether the cube rested at the end of an episode does not change the next one's first contact."""
    simulation = simulations("push_cube")
    _, commands = expert_episode(simulation, 13)

    def replay() -> bytes:
        simulation.reset(13)
        for command in commands:
            simulation.step(command)
        return simulation.env.obj.pose.raw_pose.numpy().tobytes()

    assert len({replay() for _ in range(4)}) == 1


@pytest.mark.parametrize("name", TASKS)
def test_experts(simulations, blind, name):
    simulation = simulations(name)
    seeds = configured(name).seeds("train")
    results = [expert_episode(simulation, seed) for seed in seeds[:10]]
    assert sum(success for success, _ in results) >= 9
    commands = np.concatenate([commands for _, commands in results])
    assert commands.shape[1:] == (7,) and commands.dtype == np.float32 and np.abs(commands).max() <= 1
    assert np.ptp(commands[:, :3]) > 0.5


@pytest.mark.parametrize("name", TASKS)
def test_pictures(simulations, name):
    simulation = simulations(name)
    images = [simulation.reset(seed)["image"] for seed in (31, 32)]
    for image in images:
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 10
    assert not np.array_equal(*images)  # the objects lie elsewhere
    observation, reward, success, done, flags = simulation.step(np.ones(7))
    assert observation["instruction"] == simulation.spec.instruction and not np.array_equal(
        observation["image"], images[1]
    )
    assert (reward, success, done) == (0.0, False, False) and flags["success"] is False


def test_an_episode_ends_at_its_time_limit():
    simulation = Simulation(dataclasses.replace(configured("push_cube").spec, max_steps=3))
    simulation.reset(0)
    assert [simulation.step(np.zeros(7))[3] for _ in range(3)] == [False, False, True]
    simulation.close()


def test_video_frames_show_the_same_scene():
    simulation = Simulation(dataclasses.replace(configured("push_cube").spec, video=True))
    observation = simulation.reset(3)
    assert observation["frame"].shape == (256, 256, 3) and observation["frame"].dtype == np.uint8
    small = observation["frame"].reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(small - observation["image"]).mean() < 8
    simulation.close()


# ---- initial states


def plain(env_id: str) -> ManiSkillTask:
    return ManiSkillTask("plain", env_id, "do it", env_arguments={"robot_uids": "panda"})


def initial(simulation: Simulation, seeds=range(20)) -> dict[str, np.ndarray]:
    """Pose [7] (position, quaternion) of every movable object and site, per seed."""
    names = {"stack_cube": ("cubeA", "cubeB"), "pick_cube": ("cube", "goal_site")}
    found = {}
    for seed in seeds:
        simulation.reset(seed)
        for name in next(v for k, v in names.items() if hasattr(simulation.env, v[0])):
            pose = getattr(simulation.env, name).pose
            found.setdefault(name, []).append(torch.cat([pose.p[0], pose.q[0]]).numpy())
    return {name: np.stack(poses) for name, poses in found.items()}


@pytest.mark.parametrize("name, env_id", [("stack_cube", "StackCube-v1"), ("pick_cube", "PickCube-v1")])
def test_spawn(simulations, blind, name, env_id):
    """`stock` is exactly ManiSkill's; `near` is smaller, unrotated, and what the task's file says."""
    near = initial(simulations(name))
    built = [Simulation(spec) for spec in (configured(name, "task.spawn=stock").spec, plain(env_id).spec)]
    stock, own = initial(built[0]), initial(built[1], range(4))
    for simulation in built:
        simulation.close()
    for thing in stock:
        assert np.array_equal(stock[thing][:4], own[thing])
    first, second = near.values()
    assert np.abs(first[:, :2]).max() <= 0.1 and len(np.unique(first[:, 0])) == 20
    assert np.allclose(first[:, 3:], [1, 0, 0, 0])
    moved = next(iter(stock.values()))
    assert np.abs(moved[:, 3] - 1).max() > 0.01  # rotated
    if name == "stack_cube":
        assert np.abs(second[:, :2]).max() <= 0.1 and np.allclose(second[:, 3:], [1, 0, 0, 0])
        assert np.linalg.norm(first[:, :2] - second[:, :2], axis=1).min() >= 0.07 - 1e-6
        assert np.allclose(first[:, 2], 0.02) and np.allclose(second[:, 2], 0.02)
    else:
        assert np.allclose(second[:, 2], 0.12) and np.ptp(stock["goal_site"][:, 2]) > 0.1


@pytest.mark.parametrize(
    "name, spawn, words",
    [("stack_cube", "nearby", "unknown spawn 'nearby'; choose one of: near, stock"),
     ("push_cube", "near", "'PushCube-v1' does not take all of: spawn")],
)  # fmt: skip
def test_unknown_spawn(name, spawn, words):
    with pytest.raises(UserError, match=words):
        Simulation(configured(name, f"task.spawn={spawn}").spec)


@pytest.mark.parametrize("name", TASKS)
def test_task(name):
    task = configured(name)
    train, test = task.seeds("train"), task.seeds("test")
    assert not set(range(train.start, train.stop, 997)) & set(test) and train.stop <= test.start
    assert task.name == name and len(task.instruction.split()) > 3 and task.spec.instruction == task.instruction
    spec = task.convention()
    assert (spec.action_dimensions, spec.action_mode, spec.gripper) == (7, "delta", "+1 opens")
    assert spec.image_size == task.spec.image_size == 64 and spec.statistics == "maniskill_panda"
    assert task.spec.render == "low_poly" and task.max_steps == task.spec.max_steps <= 60


# ---- bad input


@pytest.mark.parametrize(
    "change, words",
    [
        ({"env_id": "NoSuchThing-v1"}, "unknown ManiSkill environment 'NoSuchThing-v1'"),
        ({"env_id": "nobody/NoSuchThing-v1"}, "unknown ManiSkill environment"),
        ({"env_id": "PushCube-v77"}, "unknown ManiSkill environment 'PushCube-v77'"),
        ({"env_id": "Push Cube!"}, "unknown ManiSkill environment"),
        ({"expert": "no_such_module.expert"}, "cannot import 'no_such_module'.*hydra.searchpath"),
        (
            {"expert": "robot_forgetting.envs.push_cube.no_such"},
            "cannot import 'robot_forgetting.envs.push_cube.no_such'",
        ),
        ({"expert": "expert"}, "cannot import 'expert' .*package.module.name"),
        ({"modules": ["no_such_module"]}, "cannot import 'no_such_module'"),
        ({"render": "pretty"}, "unknown render option 'pretty'; choose one of: low_poly, stock"),
        ({"render": "stock"}, "already draws low_poly"),
        ({"env_arguments": {"weight": 3}}, "does not take all of: weight"),
    ],
)
def test_bad_specifications(simulations, change, words):
    simulations("push_cube")  # low_poly is installed in this process
    arguments = {"name": "mine", "env_id": "PushCube-v1", "instruction": "push"} | change
    with pytest.raises(UserError, match=words):
        Simulation(ManiSkillTask(**arguments).spec)


BROKEN_COMMANDS = {
    "not a number": ([0, 0, np.nan, 0, 0, 0, 1], r"a command that is not finite, \[0, 0, nan, 0, 0, 0, 1\]; look at"),
    "infinite": ([np.inf, 0, 0, 0, 0, 0, 1], r"a command that is not finite, \[inf, 0, 0, 0, 0, 0, 1\]; look at"),
    "too short": ([0, 0, 0, 0, 0, 1], r"a command of shape \[6\]; give 7 numbers: x, y, z, three rotations, gripper"),
    "a batch": ([[0, 0, 0, 0, 0, 0, 1]], r"a command of shape \[1, 7\]; give 7 numbers"),
    "ragged": ([[0, 0], [0]], "a command of list; give 7 numbers"),
    "text": ("forward", "a command of str; give 7 numbers"),
}


@pytest.mark.parametrize("command, words", BROKEN_COMMANDS.values(), ids=BROKEN_COMMANDS)
def test_a_command_that_is_none(simulations, blind, command, words):
    """Refused before anything moves."""
    simulation = simulations("push_cube")
    simulation.reset(11)
    before = joints(simulation)
    with pytest.raises(UserError, match=f"PushCube-v1 was given {words}"):
        simulation.step(command)
    assert np.array_equal(joints(simulation), before) and simulation.steps == 0


def test_an_expert_whose_command_is_none(simulations, blind, monkeypatch):
    simulation = simulations("push_cube")
    monkeypatch.setattr(simulation, "expert", lambda env: np.full(7, np.nan))
    with pytest.raises(UserError, match="the expert robot_forgetting.envs.push_cube.expert gave a command that is not"):
        simulation.expert_command()
