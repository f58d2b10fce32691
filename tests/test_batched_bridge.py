"""SimplerEnv's Bridge tasks in a batch (``simulation=gpu``): against the ordinary path, with one slot on the CPU.

Several slots are tested in the parts that are plain torch (controller, pictures, flags), and on a GPU where there is
one.
"""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch
from bridge_tasks import RUNNABLE
from robot_tasks import configured
from test_batched import begin, drive_targets, follow, four_slots

from robot_forgetting.tasks.simulator import workers
from robot_forgetting.tasks.simulator.batched import CPU, BatchedSimulation
from robot_forgetting.tasks.simulator.pictures import BatchedCamera, Camera, Overlay, area_average, area_weights
from robot_forgetting.tasks.simulator.simulation import Simulation
from robot_forgetting.tasks.simulator.workers import POOL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_kinematics"),
    pytest.mark.usefixtures("renderer", "bundle"),
]
CARROT = "widowx_carrot_on_plate"


@pytest.fixture(scope="module")
def pairs(bundle):
    """The ordinary simulation and a batch of one, which does what it would do on a GPU as far as a CPU can.

    It computes flags as of many environments, and drops no objects: their states are put in.
    """
    made = {}

    def get(name: str) -> tuple[Simulation, BatchedSimulation]:
        if name not in made:
            spec = configured(name, "image_size=64", "full_pictures=false", "task.max_steps=40").spec
            made[name] = simulation, batch = Simulation(spec), BatchedSimulation(spec, 1, CPU)
            batch.env._found = batch.env._found_of_many
            batch.env._initialize_episode = lambda env_idx, options: batch.env._place_robot()
            assert batch.env._segmentation_ids_to_keep.tolist() == simulation.env._segmentation_ids_to_keep.tolist()
        return made[name]

    yield get
    for pair in made.values():
        for simulation in pair:
            simulation.close()


def state(simulation) -> tuple[np.ndarray, np.ndarray]:
    """Joint positions [8], and the objects' places [6]."""
    env = simulation.env
    places = [env._body(name).entity_pose.p for name in env.obj_names]
    return env.agent.robot._objs[0].qpos.copy(), np.concatenate(places)


# ---- one slot: the CPU path's episodes


@pytest.mark.parametrize("name", [CARROT, "widowx_spoon_on_towel"])
def test_an_episode_is_that_of_the_one_slot_path(pairs, name, monkeypatch):
    """The expert's commands, with the batch's own inverse kinematics; the first picture is the same to the bit.

    Measured: joints to 0.0004 rad, objects to 4 mm (the spoon slides), flags at every step, pictures to 0.7 of 255.
    """
    pair = simulation, batch = pairs(name)
    seed = 1_000_001
    image = begin(pair, seed)["observation"]["image"]
    assert np.array_equal(image, simulation.reset(seed)["image"])
    assert np.array_equal(np.concatenate(state(simulation)), np.concatenate(state(batch)))
    cameras, different, done = [one._cameras for one in pair], 0, False
    while not done:
        drawn = simulation.steps in (12, simulation.spec.max_steps - 1)  # drawing is what takes time
        for one, all_of_them in zip(pair, cameras, strict=True):
            monkeypatch.setattr(one, "_cameras", all_of_them if drawn else {})
        command = simulation.expert_command()
        observation, reward, success, done, flags = simulation.step(command)
        answer = follow(batch, command)
        joints, places = (np.abs(a - b).max() for a, b in zip(state(simulation), state(batch), strict=True))
        assert joints < 0.002 and places < 0.01 and (answer["done"], answer["info"]["configuration"]) == (done, 1)
        different += answer["info"] != flags
        if drawn:
            assert np.abs(observation["image"].astype(float) - answer["observation"]["image"]).mean() < 2
    assert success and answer["success"] and (answer["reward"], reward) == (1.0, 1.0) and not different


def test_commands_mean_the_same(pairs):
    """Targets and joints of the batched controller against the original's arithmetic, several commands in a row."""
    pair = simulation, batch = pairs(CARROT)
    one, many = simulation._controller, batch._controller
    rng = np.random.default_rng(3)
    for seed in range(6):
        begin(pair, seed)
        simulation.reset(seed)
        for _ in range(2):
            command = np.array([*rng.uniform(-0.03, 0.03, 3), *rng.uniform(-0.2, 0.2, 3), rng.uniform(-1.3, 1.3)])
            one.apply(command)
            many.apply(torch.from_numpy(command[None]).float())
            assert np.abs(many.target[0].numpy() - [*one.target.p, *one.target.q]).max() < 1e-6
            assert np.abs(drive_targets(simulation.env) - drive_targets(batch.env)).max() < 0.001


def test_an_arm_that_cannot_reach_stays_while_its_target_moves_on(pairs):
    pair = simulation, batch = pairs(CARROT)
    begin(pair, 5)
    simulation.reset(5)
    command = np.array([1.0, 0, 0, 0, 0, 0, 1])
    simulation._controller.apply(command)
    batch._controller.apply(torch.from_numpy(command[None]).float())
    for one in pair:
        assert np.abs(drive_targets(one.env)[:6] - state(one)[0][:6]).max() < 1e-6
    assert np.abs(batch._controller.target[0, :3].numpy() - simulation._controller.target.p).max() < 1e-6


def test_an_episode_begins_with_its_own_target(pairs):
    pair = _, batch = pairs(CARROT)
    begin(pair, 5)
    before = batch._controller.target.clone()
    follow(batch, np.array([0.02, 0.01, 0, 0, 0, 0.1, 1]))
    assert (batch._controller.target - before).abs().max() > 0.009
    begin(pair, 5)
    assert (batch._controller.target - before).abs().max() < 1e-6


# ---- several slots: the controller


def test_every_slot_has_its_own_target(pairs, monkeypatch):
    """Three arms in one controller, each as it would be alone; the kinematics are ManiSkill's, the arms stand-ins."""
    batch = pairs(CARROT)[1]
    many = batch._controller
    arm, gripper = many._arm, many._gripper
    start = torch.tensor(np.repeat([state(batch)[0]], 3, axis=0)) + torch.tensor([[0.0], [0.02], [-0.03]])
    commands = torch.tensor([[0.01, 0, 0, 0, 0, 0.1, 1], [0, 0.02, 0, 0.1, 0, 0, -1], [0, 0, -0.01, 0, 0.1, 0, 0.5]])
    told, qpos, here = {}, None, many.target.clone()

    def stand_in(part: str, own):
        return types.SimpleNamespace(
            active_joint_indices=own.active_joint_indices,
            config=own.config,
            articulation=types.SimpleNamespace(get_qpos=lambda: qpos),
            set_drive_targets=lambda targets: told.update({part: targets}),
        )

    monkeypatch.setattr(many, "_arm", stand_in("arm", arm))
    monkeypatch.setattr(many, "_gripper", stand_in("gripper", gripper))
    alone = []
    for row in range(3):
        many.target, qpos = here.clone(), start[row : row + 1]
        for _ in range(2):
            many.apply(commands[row : row + 1])
        alone.append((many.target, told["arm"], told["gripper"]))
    many.target, qpos = here.repeat(3, 1), start
    for _ in range(2):
        many.apply(commands)
    for found, expected in zip((many.target, told["arm"], told["gripper"]), zip(*alone, strict=True), strict=True):
        assert (found - torch.cat(expected)).abs().max() < 1e-5
    assert told["arm"].shape == (3, 6) and told["gripper"][:, 0].tolist() == pytest.approx([0.037, 0.015, 0.032])
    after = many.target.clone()
    many._arm.ee_pose_at_base = types.SimpleNamespace(raw_pose=here.repeat(3, 1))
    many.begin(torch.tensor([1]))
    assert torch.equal(many.target[1], here[0]) and torch.equal(many.target[[0, 2]], after[[0, 2]])
    many.target = here


# ---- several slots: flags


class Things:
    """Stand-in for the parts of a Bridge scene of four environments that flags are computed from.

    The source's box is 4 x 2 x 2 cm, the target's 10 x 10 x 1 cm; a finger closes along y.
    """

    def __init__(self):
        from mani_skill.utils.structs import Pose

        from robot_forgetting.tasks.widowx.bridge import BridgeScene

        for name in ("evaluate", "_stepped", "_found_of_many"):
            setattr(self, name, types.MethodType(getattr(BridgeScene, name), self))
        self.places = torch.zeros(4, 2, 3)
        self.places[:, 0] = torch.tensor([0.2, 0, 0.01])
        self.impulses = {name: torch.zeros(4, 3) for name in ("left", "right", "arena")}
        self.impulses["arena"][:, 2] = 0.01  # it lies there
        self.obj_names, self.height, self.nothing_else = ["source", "target"], 0.02, True
        self.at_rest, self._counted = self.places.clone(), torch.zeros(4, dtype=torch.int64)
        self.extents = torch.tensor([[0.04, 0.02, 0.02], [0.1, 0.1, 0.01]]).repeat(4, 1, 1)
        self.consecutive_grasp, self.configuration = torch.zeros(4, dtype=torch.int64), torch.arange(4)
        self._elapsed_steps = torch.zeros(4, dtype=torch.int32)
        self._mass_centres = [Pose.create(torch.tensor([[0.0, 0, 0, 1, 0, 0, 0]]).repeat(4, 1)) for _ in range(2)]
        self.scene, self._pose, self.gpu_sim_enabled = self, Pose, True
        fingers = [types.SimpleNamespace(name=name, pose=self.pose_of(torch.zeros(4, 3))) for name in ("left", "right")]
        self.agent = types.SimpleNamespace(scene=self, finger1_link=fingers[0], finger2_link=fingers[1])
        self.actors = {"arena": types.SimpleNamespace(name="arena")}

    def pose_of(self, places: torch.Tensor):
        return self._pose.create_from_pq(places, torch.tensor([[1.0, 0, 0, 0]]).repeat(4, 1))

    @property
    def objs(self) -> dict:
        return {
            name: types.SimpleNamespace(name=name, pose=self.pose_of(self.places[:, index]))
            for index, name in enumerate(self.obj_names)
        }

    def get_pairwise_contact_impulses(self, one, other) -> torch.Tensor:
        assert other.name == "source"
        return self.impulses[one.name]

    def step(self, *stepped: int) -> dict:
        self._elapsed_steps[list(stepped)] += 1
        return {key: value.tolist() for key, value in self.evaluate().items()}


def test_each_slot_has_its_own_box_and_place():
    """Equal places; what lay elsewhere has moved, what is taller may be higher, what is wider may be farther aside."""
    things = Things()
    things.impulses["arena"][:] = 0
    things.places[:, 0] = torch.tensor([0.06, 0, 0.04])
    things.at_rest[2, 0] = torch.tensor([0.05, 0, 0.01])
    things.extents[:, 1] = torch.tensor([[0.1, 0.1, 0.01], [0.1, 0.1, 0.03], [0.09, 0.09, 0.03], [0.06, 0.06, 0.03]])
    found = things.step(0, 1, 2, 3)
    assert found["success"] == [False, True, True, False]  # 3.5 and 4.5 cm high; 7.4, 6.7 and 4.5 cm aside
    assert found["moved_correct_obj"] == [True, True, False, True]
    things._mass_centres[1] = things.pose_of(torch.tensor([0.03, 0, 0]).repeat(4, 1))  # of the target, off its place
    assert things.step(0, 1, 2, 3)["success"] == [False, True, True, True]


def test_flags_of_each_slot():
    """0 lies where it lay, 1 is let go over the target, 2 is dragged along the table onto it, 3 moved the target."""
    things = Things()
    things.places[1, 0] = things.places[2, 0] = torch.tensor([0.03, 0, 0.02])
    things.impulses["arena"][1] = 0
    things.places[3, 1, :2] = torch.tensor([0.05, 0.01])
    assert things.step(0, 1, 2, 3) == {
        "is_src_obj_grasped": [False] * 4,
        "consecutive_grasp": [False] * 4,
        "src_on_target": [False, True, False, False],
        "moved_correct_obj": [False, True, True, False],
        "moved_wrong_obj": [False, False, False, True],
        "success": [False, True, False, False],
        "configuration": [0, 1, 2, 3],
    }
    things.nothing_else = False
    assert things.step()["success"] == [False, True, True, False]
    things.places[:, 0, 2] = torch.tensor([0.01, 0.0351, 0.0349, -0.001])  # 2 cm, and half of both boxes
    assert things.step()["success"] == [False, False, True, False]


def test_grasps_are_counted_by_slot_and_step():
    """Both fingers must press along their opening directions; a reset of another slot is no step of this one."""
    things = Things()
    things.impulses["left"][:] = torch.tensor([[0, 0.01, 0], [0, 0.01, 0], [0, 0.01, 0], [0.01, 0.005, 0]])
    things.impulses["right"][:] = torch.tensor([[0, -0.01, 0], [0, 0, 0], [0, 0.01, 0], [0, -0.01, 0]])
    for _ in range(4):
        assert things.step(0, 1, 2, 3)["is_src_obj_grasped"] == [True, False, False, False]
    for _ in range(3):
        assert things.step(1)["consecutive_grasp"] == [False] * 4
    assert things.step(0, 1)["consecutive_grasp"] == [True, False, False, False]
    things.impulses["left"][0, 1] = -0.01
    assert things.step(0)["consecutive_grasp"] == [False] * 4 and things.consecutive_grasp.tolist() == [0] * 4


# ---- several slots: pictures


@pytest.mark.parametrize("shader, kind", [("default", torch.float32), ("minimal", torch.uint8)])
def test_pictures_of_each_slot(shader, kind):
    """The photo lies where the slot itself shows nothing that is kept; another camera has its own photo."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 6, (3, 4, 5)).astype(np.int16)
    colours = rng.uniform(0, 1.01, (3, 4, 5, 4)).astype(np.float32)
    if kind == torch.uint8:
        colours = (colours.clip(0, 1) * 255).astype(np.uint8)
    names, channel = (["Color", "Segmentation"], 1) if shader == "default" else (["Color", "PositionSegmentation"], 3)
    segmentation = np.full((3, 4, 5, 4), 7, np.int16)
    segmentation[..., channel] = numbers

    def get_picture(asked):
        assert asked == names
        return [torch.from_numpy(colours), torch.from_numpy(segmentation)]

    camera = types.SimpleNamespace(width=5, height=4, take_picture=lambda: None, get_picture=get_picture)
    sensor = types.SimpleNamespace(camera=camera, config=types.SimpleNamespace(shader_pack=shader))
    drawn = colours[..., :3] if kind == torch.uint8 else (colours[..., :3].clip(0, 1) * 255).astype(np.uint8)
    for _ in range(2):
        overlay = Overlay(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), kept=[2, 4])
        found = BatchedCamera(sensor, (5, 4), overlay).take()
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        laid = [overlay.over(drawn[slot], numbers[slot]) for slot in range(3)]
        assert np.array_equal(found, laid)
        fewer = BatchedCamera(sensor, (3, 2), overlay).take()
        averaged = [area_average(picture, (3, 2)) for picture in laid]
        assert fewer.shape == (3, 2, 3, 3) and np.abs(fewer.astype(int) - averaged).max() <= 1


def test_pictures_of_one_environment(pairs):
    """Both cameras on the same one, drawn small and averaged down."""
    simulation = pairs(CARROT)[0]
    simulation.reset(5)
    simulation.env.scene.update_render()
    sensor, overlay = next(iter(simulation.env._sensors.values())), simulation._cameras["image"]._overlay
    for size in ((64, 64), (50, 24)):
        expected, (found,) = Camera(sensor, size, overlay).take(), BatchedCamera(sensor, size, overlay).take()
        assert np.abs(found.astype(int) - expected).max() <= (size != (64, 64))


@pytest.mark.parametrize("pixels, fewer", [(640, 224), (480, 224), (640, 64), (6, 3), (5, 5)])
def test_averaging_over_areas(pixels, fewer):
    """As OpenCV does it, but for the rounding of halves."""
    weights = area_weights(pixels, fewer)
    assert weights.shape == (fewer, pixels) and np.allclose(weights.sum(axis=1), 1)
    line = np.random.default_rng(1).integers(0, 256, (4, pixels, 3), dtype=np.uint8)
    exact = np.einsum("xw,hwc->hxc", weights.astype(float), line)
    assert np.abs(exact - area_average(line, (fewer, 4))).max() < 0.501


# ---- refusals, and a GPU


@pytest.mark.parametrize("full", [True, False])
def test_where_it_is_available(monkeypatch, full):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers, "BatchedVectorEnv", lambda spec, *numbers: (spec, *numbers))
    chosen = ("simulation=gpu", f"full_pictures={str(full).lower()}", "processes=3")
    spec, slots, processes = configured(CARROT, *chosen).make_env(5)
    assert (spec.robot, spec.full_pictures, slots, processes) == ("widowx", full, 5, 3)


def test_maniskills_own_port_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(Exception, match="robot 'widowx_maniskill3' of task .* has no controller for simulation=gpu"):
        configured(CARROT, "simulation=gpu", "task.variant=maniskill3")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("name, full", [*((name, False) for name in RUNNABLE), (CARROT, True)])
def test_four_slots_on_a_gpu(name, full):
    spec = configured(name, "image_size=64", f"full_pictures={str(full).lower()}").spec
    try:
        four_slots(dataclasses.replace(spec, video=full))
    finally:
        POOL.close()
