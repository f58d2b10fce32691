"""One ManiSkill environment for all slots (``simulation=gpu``): against the one-slot path, with one slot on the CPU.

What only more slots show is tested on a stand-in for ManiSkill's environment, and on a GPU where there is one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import types

import numpy as np
import pytest
import torch
from robot_tasks import configured
from test_workers import Drifting, fragile
from toy import ToyPolicy

from robot_forgetting.cli import command_line as cli
from robot_forgetting.engine.episode_rows import fingerprint
from robot_forgetting.errors import UserError
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.rollout import EpisodeKey, rollout
from robot_forgetting.tasks.panda import EndEffectorController
from robot_forgetting.tasks.simulator import batched
from robot_forgetting.tasks.simulator.batched import CPU, BatchedSimulation, initial_states
from robot_forgetting.tasks.simulator.environment import SimulationSpec
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask
from robot_forgetting.tasks.simulator.simulation import Simulation, flags_of
from robot_forgetting.tasks.simulator.workers import POOL, BatchedVectorEnv, ManiSkillVectorEnv, demonstrate

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_kinematics"),
    pytest.mark.usefixtures("renderer"),
]
TASKS = ("pick_cube", "push_cube", "stack_cube")
STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])
HIDDEN = ("pick_cube", "task.env_id=PickCube-v1", "task.spawn=stock")  # its goal is not for the policy to see


@pytest.fixture(scope="module")
def pairs():
    """The one-slot simulation and a batch of one, built when first needed; push_cube's with video frames."""
    made = {}

    def get(*chosen: str) -> tuple[Simulation, BatchedSimulation]:
        if chosen not in made:
            spec = dataclasses.replace(configured(*chosen).spec, video="push_cube" in chosen)
            made[chosen] = Simulation(spec), BatchedSimulation(spec, 1, CPU)
        return made[chosen]

    yield get
    for pair in made.values():
        for simulation in pair:
            simulation.close()


def begin(pair, seed: int) -> dict:
    simulation, batch = pair
    batch.step({})  # wherever it was
    ((slot, answer),) = batch.finish(dict(enumerate(initial_states([simulation], simulation.spec, [seed]))))
    assert slot == 0
    return answer


def follow(batch: BatchedSimulation, command: np.ndarray) -> dict:
    batch.step({0: command})
    return batch.finish({})[0][1]


def drive_targets(env) -> np.ndarray:
    return np.array([joint.drive_target[0] for joint in env.agent.robot._objs[0].active_joints])


# ---- one slot: the CPU path's episodes


@pytest.mark.parametrize("name", TASKS)
def test_an_episode_is_that_of_the_one_slot_path(pairs, name, monkeypatch):
    """Once both use the same inverse kinematics: to the bit until something is touched, and with the same end.

    (On the machine where this was written, to the bit to the end; contacts magnify whatever another one rounds.)
    """
    pair = simulation, batch = pairs(name)
    controller = EndEffectorController(batch.env)
    controller._arm._kinematics = simulation._controller._arm._kinematics  # ManiSkill's mask in a batch is too short
    alone = types.SimpleNamespace(
        apply=lambda commands: controller.apply(commands[0].numpy().astype(np.float64)), begin=lambda slots: None
    )
    monkeypatch.setattr(batch, "_controller", alone)
    begin(pair, 1)
    for _ in range(3):
        follow(batch, np.ones(7))  # nothing of another episode may remain
    seed, answer, commands = 12, {}, []
    expected = [told({"observation": simulation.reset(seed)})]
    while not answer.get("done"):
        commands.append(simulation.expert_command())
        names = ("observation", "reward", "success", "done", "info")
        answer = dict(zip(names, simulation.step(commands[-1]), strict=True))
        expected.append(told(answer))
    assert answer["success"]
    found = [begin(pair, seed)]
    while not found[-1].get("done"):
        found.append(follow(batch, commands[len(found) - 1] if len(found) <= len(commands) else STILL))
    assert [told(one) for one in found[:7]] == expected[:7]
    assert found[-1]["success"] and found[-1]["reward"] == 1.0 and found[-1]["info"] == answer["info"]
    assert abs(len(found) - len(expected)) <= 5


def told(answer: dict) -> dict:
    """With pictures as bytes, which compare."""
    rows = answer["observation"].items()
    return answer | {
        "observation": {key: value.tobytes() if isinstance(value, np.ndarray) else value for key, value in rows}
    }


def test_hidden_objects_stay_hidden(pairs):
    pair = simulation, batch = pairs(*HIDDEN)
    for seed in (12, 13):
        image = begin(pair, seed)["observation"]["image"].astype(int)
        assert np.array_equal(image, simulation.reset(seed)["image"])
        assert (image[..., 1] - image[..., [0, 2]].max(-1)).max() < 20  # nothing is green


def test_commands_mean_the_same(pairs):
    """Drive targets of the batched controller against ManiSkill's arithmetic on a CPU, whose solver stops at 1e-4."""
    pair = simulation, batch = pairs("pick_cube")
    rng = np.random.default_rng(3)
    for command in rng.uniform(-0.5, 0.5, (8, 7)):
        begin(pair, int(rng.integers(100)))
        simulation._controller.apply(command)
        batch._controller.apply(torch.from_numpy(command[None]).float())
        assert np.abs(drive_targets(simulation.env) - drive_targets(batch.env)).max() < 0.0035


def test_an_arm_that_cannot_reach_stays(pairs):
    pair = simulation, batch = pairs("pick_cube")
    begin(pair, 5)
    stretched = np.array([0, 1.2, 0, -0.2, 0, 1.4, 0.8, 0.04, 0.04], np.float32)
    for one in pair:
        one.env.agent.robot.set_qpos(stretched[None])
    command = np.array([1.0, 0, 0, 0, 0, 0, 1])
    simulation._controller.apply(command)
    batch._controller.apply(torch.from_numpy(command[None]).float())
    for one in pair:
        assert np.abs(drive_targets(one.env)[:7] - stretched[:7]).max() < 1e-6


def test_the_expert_succeeds(pairs):
    """With the batch's own controller; the expert reads its state."""
    pair = _, batch = pairs("stack_cube")
    expert, answer = load_object(batch.spec.expert), begin(pair, 13)
    while not answer.get("done"):
        answer = follow(batch, np.clip(expert(batch.env), -1, 1))
    assert answer["success"] and answer["reward"] == 1.0


def test_what_a_task_remembers_of_an_episode(pairs, monkeypatch):
    """Tensors with a row per environment come along with the state; constants are left alone."""
    pair = simulation, batch = pairs("pick_cube")
    for one, values in ((simulation, ([[0.5, 0.25]], [3], [[1, 2]])), (batch, ([[0.0, 0.0]], [0], [1, 1]))):
        for name, value in zip(("aim", "_goal", "size"), values, strict=True):
            monkeypatch.setattr(one.env, name, torch.tensor(value), raising=False)
    begin(pair, 5)
    assert batch.env.aim.tolist() == [[0.5, 0.25]] and batch.env._goal.tolist() == [3]
    assert batch.env.size.tolist() == [1, 1]


def test_environments_that_a_batch_cannot_begin(pairs, monkeypatch):
    simulation, batch = pairs("pick_cube")
    (start,) = initial_states([simulation], simulation.spec, [5])
    other = start | {"state": {"actors": {"tomato": np.zeros((1, 13))}, "articulations": {}}}
    with pytest.raises(UserError, match=r"has other objects in a batch than alone \(cube, .*tomato\).*simulation=cpu"):
        batch.finish({0: other})
    monkeypatch.setattr(simulation.env, "reconfiguration_freq", 1)
    with pytest.raises(UserError, match="builds other objects for every episode.*simulation=cpu"):
        initial_states([simulation], simulation.spec, [5])


# ---- several slots, on a stand-in whose arithmetic is plain


class Line:
    """Three environments in each of which a thing moves along x by a command's first number; success beyond 1."""

    def __init__(self):
        self.device, self.gpu_sim_enabled, self.num_envs = torch.device("cpu"), True, 3
        self.states, self._elapsed_steps = torch.zeros(3, 13), torch.zeros(3, dtype=torch.int32)
        self.backend = types.SimpleNamespace(render_device=types.SimpleNamespace(is_cuda=lambda: True))
        self.applied, self.resets, self._hidden_objects, self.aim = 0, [], [], torch.zeros(3, 2)
        self.began, self.before_simulation_step = [], None
        self._sensors, self.width, self.height = {"camera": types.SimpleNamespace(camera=self)}, 2, 2
        self.scene = types.SimpleNamespace(px=self, update_render=lambda **which: None)

    def gpu_apply_articulation_target_position(self):
        self.applied += 1

    def apply(self, commands):
        self.wanted = commands
        return {slot: "no way" for slot in range(3) if commands[slot, 1] > 0}

    def begin(self, slots):
        self.began.append((slots.tolist(), self.states[slots, 0].tolist()))  # once their states are there

    def _step_action(self, action):
        self.states[:, 0] += self.wanted[:, 0]

    def reset(self, *, seed, options):
        self.resets.append((list(seed), options["env_idx"].tolist()))
        self.states[options["env_idx"]] = -1
        self._elapsed_steps[options["env_idx"]] = 0

    def get_state_dict(self):
        return {"actors": {"thing": self.states.clone()}, "controller": {"arm": torch.zeros(3, 1)}}

    def set_state_dict(self, state, env_idx):
        mask = torch.zeros(3, dtype=torch.bool)  # as ManiSkill's scene has it
        mask[env_idx] = True
        self.states[mask] = state["actors"]["thing"]

    def evaluate(self):
        return {"success": self.states[:, 0] > 1, "steps": self._elapsed_steps, "all": torch.tensor(True)}

    def take_picture(self): ...

    def close(self):
        self.closed = True

    def get_picture(self, name):
        return [(self.states[:, :1, None, None] / 4).expand(3, 2, 2, 4)]


@pytest.fixture
def line(monkeypatch):
    env = Line()
    monkeypatch.setattr(batched, "make_environment", lambda *arguments, **more: env)
    monkeypatch.setattr(batched, "load_object", lambda name: lambda made: made)
    spec = SimulationSpec("Line-v1", "go", max_steps=4, image_size=2, camera={})
    return env, BatchedSimulation(spec, 3, batched.GPU)


def test_pictures_that_are_not_drawn_on_the_gpu(line):
    env, batch = line
    env.backend.render_device.is_cuda = lambda: False
    with pytest.raises(UserError, match="pictures cannot be drawn on the GPU.*simulation=cpu"):
        BatchedSimulation(batch.spec, 3, batched.GPU)
    assert env.closed


def test_flags_are_those_with_one_value_per_environment():
    found = {
        "success": torch.tensor([True, False, False, True]),
        "steps": torch.tensor([[1], [2], [3], [4]]),
        "ends": torch.eye(2),
        "limits": torch.ones(1, 4),
        "all": torch.tensor(True),
        "name": "four",
    }
    assert flags_of(found, 4) == [
        {"success": True, "steps": 1},
        {"success": False, "steps": 2},
        {"success": False, "steps": 3},
        {"success": True, "steps": 4},
    ]
    assert flags_of({"alone": torch.tensor(True), "steps": torch.tensor([[2]]), "limits": torch.ones(1, 4)}, 1) == [
        {"alone": True, "steps": 2}
    ]


def start_at(x: float, seed: int) -> dict:
    state = np.zeros((1, 13), np.float32)
    state[0, 0] = x
    buffers = {"aim": np.full((1, 2), x, np.float32)}
    return {"seed": seed, "state": {"actors": {"thing": state}}, "buffers": buffers, "instruction": f"go on from {x}"}


def move(x: float) -> np.ndarray:
    return np.array([x, 0, 0, 0, 0, 0, 1.0])


def seen(answers: list) -> dict:
    return {slot: (round(float(a["observation"]["image"][0, 0, 0]) / 63.75, 1), a.get("done")) for slot, a in answers}


def test_a_slot_that_is_left_out_holds_what_it_has(line):
    env, batch = line
    batch.finish({slot: start_at(0.0, slot) for slot in range(3)})
    for grippers in ({}, {0: -1.0, 1: 0.5}, {1: -0.5}):
        batch.step({slot: np.array([0, 0, 0, 0, 0, 0, gripper]) for slot, gripper in grippers.items()})
    assert env.wanted.tolist() == [[0] * 6 + [gripper] for gripper in (-1.0, -0.5, 1.0)]
    batch.finish({0: start_at(0.0, 3)})
    batch.step({})
    assert env.wanted[:, 6].tolist() == [1.0, -0.5, 1.0]


def test_what_a_task_remembers_of_some_episodes(line):
    env, batch = line
    env.mark = torch.zeros(3, dtype=torch.int64)
    marked = start_at(0.5, 4) | {"buffers": {"mark": np.array([6])}}
    batch.finish({0: start_at(0.25, 3), 2: marked})
    assert env.aim.tolist() == [[0.25] * 2, [0, 0], [0, 0]] and env.mark.tolist() == [0, 0, 6]


def test_slots_start_and_end_on_their_own(line):
    env, batch = line
    answers = batch.finish({2: start_at(0.4, 7), 0: start_at(0.8, 8)})
    assert seen(answers) == {2: (0.4, None), 0: (0.8, None)} and env.resets == [([8, 0, 7], [0, 2])]
    assert env.began == [([0, 2], pytest.approx([0.8, 0.4]))]
    assert env.aim.tolist() == [[np.float32(0.8)] * 2, [0, 0], [np.float32(0.4)] * 2]
    assert [a["observation"]["instruction"] for _, a in answers] == ["go on from 0.4", "go on from 0.8"]

    batch.step({0: move(0.4), 2: move(0.4)})  # slot 0 arrives, and slot 1 begins as it is told
    answers = batch.finish({1: start_at(0.2, 9)})
    assert seen(answers) == {0: (1.2, True), 2: (0.8, False), 1: (0.2, None)} and env.applied == 1
    told = {slot: (a.get("success"), a.get("reward"), a.get("info")) for slot, a in answers}
    assert told[0] == (True, 1.0, {"success": True, "steps": 1}) and told[1] == (None, None, None)
    assert env.resets[-1] == ([8, 9, 7], [1]) and env.states[:, 0].tolist() == pytest.approx([1.2, 0.2, 0.8])

    batch.step({1: move(0.1), 2: np.full(7, np.nan)})  # a bad command ends its own episode
    answers = dict(batch.finish({0: start_at(0.0, 10)}))
    assert answers[2]["done"] and "Line-v1 was given a command that is not finite" in answers[2]["error"]
    assert env.states[:, 0].tolist() == pytest.approx([0.0, 0.3, 0.8])

    batch.finish({2: start_at(0.0, 11)})
    batch.step({2: np.array([0.5, 1, 0, 0, 0, 0, 1])})  # so does one that its controller cannot execute
    ((slot, answer),) = batch.finish({})
    assert (slot, answer["done"], answer["error"], "success" in answer) == (2, True, "no way", False)

    for steps in (2, 3, 4):  # the time limit is an episode's own
        batch.step({0: move(0.1), 1: move(0.0)})
        assert {slot: done for slot, (_, done) in seen(batch.finish({})).items()} == {0: False, 1: steps == 4}
    batch.step({0: move(0.1)})
    assert seen(batch.finish({})) == {0: (0.4, True)}


# ---- through the worker processes


@pytest.fixture(scope="module")
def workers():
    yield POOL
    POOL.close()


def test_a_rollout_over_the_batch(workers, monkeypatch):
    """Errors end the episodes that run, and nothing else; the same seed gives the same episode after them."""
    env, closed = BatchedVectorEnv(fragile().spec, 1, 1, CPU), []
    monkeypatch.setattr(env._batch, "close", lambda: closed.append(True))  # to start another one takes seconds
    seeds = (10, 14, 13, 10)  # 14 has no initial state, 13 breaks the batch in its second step
    episodes = list(rollout(Drifting(), fragile(), [EpisodeKey(seed) for seed in seeds], num_envs=1, env=env))
    assert [(e.key.seed, e.steps, e.success) for e in episodes] == [
        (10, 6, False),
        (14, 0, False),
        (13, 2, False),
        (10, 6, False),
    ]
    assert episodes[0].error is episodes[3].error is None
    assert episodes[1].error.endswith("in reset: RuntimeError: no such initial state")
    assert re.match("the batch failed: .*fragile_env.py, line .*: ZeroDivisionError: physics", episodes[2].error)
    images = [[row["image"].tobytes() for row in e.observations] for e in episodes]
    assert images[0] == images[3] and len(set(images[0])) > 5 and closed == [True]
    env.close()
    with ManiSkillVectorEnv(fragile().spec, 1, 1) as usual:
        (episode,) = rollout(Drifting(), fragile(), [EpisodeKey(10)], num_envs=1, env=usual)
    assert episode.observations[0]["image"].tobytes() == images[0][0] and episode.flags == episodes[0].flags
    for one, other in zip(episode.observations, episodes[0].observations, strict=True):
        assert np.abs(one["image"].astype(float) - other["image"]).mean() < 1  # inverse kinematics differ


def test_a_step_whose_user_has_gone(workers):
    """What came of it is not told to the next one."""
    env = BatchedVectorEnv(fragile().spec, 1, 1, CPU)
    env.request(0, {0: 10}, {})
    env.wait()
    env.request(0, {}, {0: STILL})
    env.close()
    with BatchedVectorEnv(fragile().spec, 1, 1, CPU) as other:
        other.request(0, {0: 11}, {})
        assert [(t.slot, t.reward, t.info) for t in other.wait()[1]] == [(0, 0.0, {})]


def test_a_batch_that_is_killed(workers):
    """Its episodes end with an error, and another process goes on with the next one."""
    env = BatchedVectorEnv(fragile().spec, 1, 1, CPU)
    killed = env._batch.process

    def kill(calls):
        if calls == 3:
            os.kill(killed.pid, signal.SIGKILL)
            killed.join()

    keys = [EpisodeKey(10), EpisodeKey(10)]
    broken, whole = rollout(Drifting(kill), fragile(), keys, num_envs=1, env=env)
    assert broken.error.startswith("the batch failed: a simulator process died (exit code -9)")
    assert (broken.steps, broken.success, whole.steps, whole.error) == (3, False, 6, None)
    shown = [[row["image"].tobytes() for row in episode.observations] for episode in (broken, whole)]
    assert shown[0][:3] == shown[1][:3] and len(set(shown[0][:3])) == 3
    assert env._batch.process.is_alive() and env._batch.process.pid != killed.pid


def test_a_batch_that_cannot_be_built(workers):
    """ManiSkill's words in one line, and a process that is no longer there."""
    words = r"^a batch of 2 environments could not be built: \w+Error at .*; try a smaller num_envs, or use simulation"
    with pytest.raises(UserError, match=words) as caught:
        BatchedVectorEnv(fragile().spec, 2, 1, CPU)
    assert "\n" not in str(caught.value) and not POOL._workers["batch"].process.is_alive()


# ---- refusals


def task(**arguments) -> ManiSkillTask:
    return ManiSkillTask("mine", "PushCube-v1", "push it", **{"simulation": "gpu"} | arguments)


ORIGINAL = {"size": [640, 480], "intrinsic": [600.0, 600.0, 320.0, 240.0]}  # a camera


@pytest.mark.parametrize(
    "cuda, arguments, words",
    [
        (None, {}, r"simulation=gpu needs an NVIDIA GPU and its driver \(nvidia-smi.*use simulation=cpu"),
        ("12.8", {}, r"simulation=gpu needs an NVIDIA GPU and its driver \(nvidia-smi.*use simulation=cpu"),
        (
            "12.8",
            {"robot": "widowx_maniskill3"},
            "robot 'widowx_maniskill3' of task 'mine' has no controller for simulation=gpu; use sim",
        ),
        ("12.8", {"full_pictures": True, "image_size": 512, "camera": ORIGINAL}, "image_size=512 is more"),
        (None, {"simulation": "tpu"}, "unknown simulation 'tpu'; choose one of: cpu, gpu"),
    ],
)
def test_refusals(monkeypatch, cuda, arguments, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        task(**arguments)


def test_where_it_is_available(monkeypatch):
    """The task hands everything on, and its evaluation is not the CPU path's."""
    monkeypatch.setattr(batched, "require", lambda name, spec: None)
    made = "robot_forgetting.tasks.simulator.workers.BatchedVectorEnv"
    monkeypatch.setattr(made, lambda spec, *numbers: (spec.env_id, spec.video, *numbers))
    gpu, cpu = task(processes=3), task(processes=3, simulation="cpu")
    assert gpu.make_env(5, render=True) == ("PushCube-v1", True, 5, 3) and (gpu.processes, cpu.processes) == (1, 3)
    policy = ToyPolicy()
    assert fingerprint(policy, [gpu]) != fingerprint(policy, [cpu])


def test_tasks_that_do_not_know_it(capsys):
    task = "google_robot_move_near"
    assert cli.main(["check", f"task={task}", "simulation=tpu"]) == 2
    assert "unknown simulation 'tpu'; choose one of: cpu, gpu" in capsys.readouterr().err
    assert cli.main(["check", f"task={task}", "~task.simulation", "simulation=gpu"]) == 2
    assert f"task={task} cannot be simulated on the GPU; use simulation=cpu" in capsys.readouterr().err


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("chosen", [("push_cube",), ("pick_cube",), HIDDEN], ids=["push_cube", "pick_cube", "hidden"])
def test_four_slots_on_a_gpu(workers, chosen):
    four_slots(configured(*chosen).spec)


def four_slots(spec: SimulationSpec) -> None:
    """Slots start, move, end and start again on their own; what the expert did on the CPU succeeds."""
    seeds = [20, 21, 22, 23, 24]
    quiet = {"small": 0.0, "kick": 0.0, "kick_probability": 0.0}
    shown = {seed: (rows["image"], commands) for seed, _, rows, commands in demonstrate(spec, seeds, quiet, 1)}

    def off(picture: np.ndarray, seed: int) -> float:  # from the CPU path's first picture of that seed
        return float(np.abs(picture.astype(float) - shown[seed][0][0]).mean())

    with BatchedVectorEnv(spec, 4, 2) as env:
        env.request(0, dict(enumerate(seeds[:4])), {})
        first = {t.slot: t.observation["image"] for t in env.wait()[1]}
        distances = np.array([[off(first[slot], seed) for seed in seeds] for slot in range(4)])
        assert distances.argmin(axis=1).tolist() == [0, 1, 2, 3] and distances.min(axis=1).max() < 0.5
        ended = {}
        for step in range(spec.max_steps):  # slots 0 to 2 as the expert did on the CPU; slot 3 stays
            commands = {}
            for slot in set(range(4)) - ended.keys():
                expert = shown[seeds[slot]][1] if slot < 3 else STILL[None]
                commands[slot] = expert[step] if step < len(expert) else STILL * expert[-1]
            env.request(0, {}, commands)
            answers = env.wait()[1]
            assert all(t.error is None for t in answers) and {t.slot for t in answers} == commands.keys()
            ended |= {t.slot: t.success for t in answers if t.done}
        assert sum(ended[slot] for slot in range(3)) >= 2 and not ended[3]
        before = {t.slot: t.observation["image"] for t in answers}
        env.request(0, {1: seeds[4]}, {})  # one slot anew, the others as they were
        (again,) = env.wait()[1]
        assert again.slot == 1 and off(again.observation["image"], seeds[4]) < 0.5
        env.request(0, {}, {3: STILL})
        (moved,) = env.wait()[1]
        assert np.abs(moved.observation["image"].astype(float) - before[3]).mean() < 1
