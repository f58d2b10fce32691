"""Robot tasks in ManiSkill: our fast step against ManiSkill's own, experts, initial states, and workers that die."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch

from robot_forgetting import configs, doctor
from robot_forgetting.errors import UserError
from robot_forgetting.evaluate import evaluate
from robot_forgetting.policy import Action
from robot_forgetting.robot.simulation import Simulation
from robot_forgetting.robot.task import ManiSkillTask
from robot_forgetting.robot.workers import POOL
from robot_forgetting.rollout import EpisodeKey, rollout

CONFIGS = Path(configs.__file__).parent
TASKS = sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.usefixtures("renderer"),
]


@pytest.fixture(scope="session")
def renderer():
    try:
        doctor.require_vulkan()
    except UserError as error:
        pytest.skip(str(error))


def configured(name: str, *overrides: str) -> ManiSkillTask:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"task={name}", *overrides])
    return hydra.utils.instantiate(config.task, _convert_="all")


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


@pytest.fixture
def blind(monkeypatch):
    """Without pictures, where only the physics matters."""
    monkeypatch.setattr(Simulation, "observe", lambda self: {})


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
    return ManiSkillTask("plain", env_id, "do it")


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
    stock, own = (
        initial(built[0]),
        initial(built[1], range(4)),
    )  # ManiSkill's StackCube has a robot that is slow to draw
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


# ---- workers


class Drifting:
    """Random commands; ``hook`` is called with the number of calls so far."""

    def __init__(self, hook=lambda calls: None):
        self.hook, self.calls = hook, 0

    def eval(self): ...

    def act(self, obs, *, temperature=1.0, noise=None):
        self.calls += 1
        self.hook(self.calls)
        tokens = (noise[:, :7] * 256).long()
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape))

    def decode(self, action, *, statistics=None):
        return action.tokens.numpy() / 128.0 - 1


@pytest.fixture(scope="module")
def workers(request):
    """The worker processes are closed at the end, so that no other test meets them."""
    yield POOL
    POOL.close()


def fragile(**arguments) -> ManiSkillTask:
    arguments = {"max_steps": 6, "processes": 2, "expert": "robot_forgetting.envs.push_cube.expert"} | arguments
    return ManiSkillTask("push", "Fragile-PushCube-v1", "push it", modules=["fragile_env"], **arguments)


SOUND = [seed for seed in range(10, 40) if seed % 5 < 3]


def outcomes(policy, seeds, task=None, num_envs=6) -> dict[int, tuple]:
    return {
        e.key.seed: (e.error, e.success, e.steps, [row["image"].tobytes() for row in e.observations])
        for e in evaluate(policy, task or fragile(), seeds, temperature=1.0, num_envs=num_envs)
    }


@pytest.fixture(scope="module")
def undisturbed(workers, renderer):
    return outcomes(Drifting(), SOUND)


def test_an_episode_does_not_depend_on_its_slot(undisturbed):
    assert len(undisturbed) == len(SOUND) and all(error is None for error, *_ in undisturbed.values())
    some = SOUND[:5][::-1]
    assert outcomes(Drifting(), some, num_envs=3) == {seed: undisturbed[seed] for seed in some}
    assert outcomes(Drifting(), some, fragile(processes=1), num_envs=2) == {seed: undisturbed[seed] for seed in some}


@pytest.mark.parametrize("moment", [4, 5])
def test_a_worker_that_is_killed(undisturbed, moment):
    """While it steps (found when we wait for it) and while it waits (found when we ask it)."""

    def kill(calls):
        if calls == moment:
            process = POOL[0].process
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    found = outcomes(Drifting(kill), SOUND)
    assert set(found) == set(SOUND)
    broken = {seed for seed, episode in found.items() if episode[0]}
    assert 1 <= len(broken) <= 3  # the episodes in its three slots
    for seed, episode in found.items():
        if seed in broken:
            assert episode[:2] == ("the simulator process died during this episode", False)
        else:
            assert episode == undisturbed[seed]
    assert outcomes(Drifting(), SOUND[:4]) == {seed: undisturbed[seed] for seed in SOUND[:4]}


def test_a_worker_killed_before_the_environment_is_left(undisturbed):
    env = fragile().make_env(2)
    env.request(0, {0: 10}, {})
    os.kill(POOL[0].process.pid, signal.SIGKILL)
    env.close()  # does not wait for an answer that never comes
    assert outcomes(Drifting(), SOUND[:2], num_envs=2) == {seed: undisturbed[seed] for seed in SOUND[:2]}


def test_a_simulation_that_raises(undisturbed):
    found = outcomes(Drifting(), range(10, 40))
    assert set(found) == set(range(10, 40))
    for seed, (error, success, steps, images) in found.items():
        if seed % 5 == 3:
            assert (error, success, steps) == ("ZeroDivisionError: physics left the building", False, 2)
        elif seed % 5 == 4:
            assert (error, success, steps) == ("RuntimeError: no such initial state", False, 0)
        else:
            assert (error, success, steps, images) == undisturbed[seed]


def test_answers_of_an_abandoned_rollout_are_not_taken_for_others(undisturbed):
    episodes = rollout(Drifting(), fragile(), [EpisodeKey(seed) for seed in SOUND], num_envs=6)
    next(episodes)
    episodes.close()
    demonstrations = fragile(max_steps=50).demonstrations(20, start=10)
    next(demonstrations)
    demonstrations.close()  # two workers are in the midst of an episode
    with pytest.raises(UserError, match="unknown ManiSkill environment"):
        ManiSkillTask("no", "NoSuchThing-v1", "do", processes=2).make_env(2)  # both answer, one is heard
    assert outcomes(Drifting(), SOUND[:4]) == {seed: undisturbed[seed] for seed in SOUND[:4]}


def test_demonstrations_are_the_same_with_any_number_of_processes(workers):
    found = [list(configured("push_cube", f"processes={count}").demonstrations(3, start=50)) for count in (1, 2)]
    for one, other in zip(*found, strict=True):
        assert one.seed == other.seed and np.array_equal(one.images, other.images)
        assert np.array_equal(one.commands, other.commands)
        length = len(one.commands)
        assert one.images.shape == (length, 64, 64, 3) and one.images.dtype == np.uint8 and length <= 50
        assert one.commands.shape == (length, 7) and np.abs(one.commands).max() <= 1
    assert [d.seed for d in found[0]] == sorted(d.seed for d in found[0])


def test_an_expert_that_never_succeeds(workers):
    hopeless = ManiSkillTask(
        "push", "PushCube-v1", "push it", max_steps=2, expert="robot_forgetting.envs.push_cube.expert", processes=2
    )
    with pytest.raises(UserError, match="the expert of task 'push' succeeded in 0 of 40 episodes"):
        list(hopeless.demonstrations(20))


def test_no_expert_no_demonstrations():
    task = ManiSkillTask("push", "PushCube-v1", "push it")
    with pytest.raises(UserError, match="task 'push' has no demonstrations; give it an expert"):
        list(task.demonstrations(1))


def test_stock_and_low_poly_show_the_same_scene(workers):
    """In one program: a worker that draws the one is replaced before it draws the other."""
    images = {}
    for render in ("low_poly", "stock"):
        task = configured("stack_cube", f"render={render}", "processes=1")
        with task.make_env(1) as env:
            env.request(0, {0: 5}, {})
            images[render] = env.wait()[1][0].observation["image"].astype(float)
    low, stock = images["low_poly"], images["stock"]
    assert low.std() > 10 and stock.std() > 10 and np.abs(low - stock).mean() > 2

    def place(image, channel):  # of the cubes, red and green
        others = [other for other in range(3) if other != channel]
        mask = image[..., channel] > 1.7 * image[..., others].max(-1) + 10
        return np.argwhere(mask).mean(0)

    for channel in (0, 1):
        assert np.abs(place(low, channel) - place(stock, channel)).max() < 2
