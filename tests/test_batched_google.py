"""The Google robot's tasks in a batch (``simulation=gpu``): against the ordinary path, with one slot on the CPU.

Several slots are tested in the parts that are plain torch (controller, flags, photos) and in what they wear, and on a
GPU where there is one.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from robot_tasks import configured
from test_batched import begin, follow, four_slots

from robot_forgetting.machine import assets
from robot_forgetting.tasks.simulator import workers
from robot_forgetting.tasks.simulator.batched import CPU, BatchedSimulation
from robot_forgetting.tasks.simulator.pictures import BatchedCamera, Overlay
from robot_forgetting.tasks.simulator.simulation import Simulation
from robot_forgetting.tasks.simulator.workers import POOL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.usefixtures("renderer", "bundle"),
]
CAN, NEAR = "google_robot_pick_standing_coke_can", "google_robot_move_near"
DRAWER, PLACE = "google_robot_open_top_drawer", "google_robot_place_apple_in_closed_top_drawer"


@pytest.fixture(scope="module")
def pairs(bundle):
    """The ordinary simulation and a batch of one, which does what it would do on a GPU as far as a CPU can: the robot
    has no weight, states are put in, nothing is held in the air, and contacts are known of two bodies only."""
    made = {}

    def get(name: str) -> tuple[Simulation, BatchedSimulation]:
        if name not in made:
            spec = configured(name, "image_size=64", "full_pictures=false").spec
            made[name] = simulation, batch = Simulation(spec), BatchedSimulation(spec, 1, CPU)
            env = batch.env
            env._initialize_episode = lambda env_idx, options: None
            for link in env.agent.robot.links:
                link.disable_gravity = True
            for thing in getattr(env, "objs", {}).values():
                thing._bodies[0].set_locked_motion_axes([False] * 6)
            if name == PLACE:
                env.inside = env.low
            assert env._segmentation_ids_to_keep.tolist() == simulation.env._segmentation_ids_to_keep.tolist()
        return made[name]

    yield get
    for pair in made.values():
        for simulation in pair:
            simulation.close()


def state(simulation) -> tuple[np.ndarray, np.ndarray]:
    """Joint positions [11], and the places of what counts [3 * M]."""
    env = simulation.env
    shown = getattr(env, "shown", getattr(env, "objs", ()))
    places = [env.objs[name].pose.p[0].numpy() for name in shown]
    opening = [env.openings().numpy()] if hasattr(env, "openings") else []
    return env.agent.robot._objs[0].qpos.copy(), np.concatenate([*places, *opening])


# ---- one slot: the CPU path's episodes


@pytest.mark.parametrize("name, seed, steps", [(CAN, 1_000_007, 40), (NEAR, 1_000_015, 62), (DRAWER, 1_000_013, 55)])
def test_an_episode_is_that_of_the_one_slot_path(pairs, name, seed, steps, monkeypatch):
    """The expert's commands; the first picture is the same but for single pixels, with its photo and colouring.

    Measured: joints to 0.004 rad (0.03 at the drawer), things to 3 mm, the same flags at every step.
    """
    pair = simulation, batch = pairs(name)
    begin(pair, seed + 1)  # nothing of another episode may remain
    follow(batch, np.full(7, 0.05))
    start = begin(pair, seed)["observation"]
    image = simulation.reset(seed)
    assert start["instruction"] == image["instruction"]
    assert np.abs(start["image"].astype(int) - image["image"]).max() <= 1
    assert (start["image"] == image["image"]).mean() > 0.999
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(state(batch), state(simulation), strict=True))
    cameras = [one._cameras for one in pair]
    for step in range(1, steps + 1):
        drawn = step in (10, steps)  # drawing is what takes time
        for one, all_of_them in zip(pair, cameras, strict=True):
            monkeypatch.setattr(one, "_cameras", all_of_them if drawn else {})
        command = simulation.expert_command()
        observation, *_, flags = simulation.step(command)
        answer = follow(batch, command)
        joints, things = (np.abs(a - b).max() for a, b in zip(state(simulation), state(batch), strict=True))
        assert joints < 0.06 and things < 0.008 and answer["info"] == flags
        if drawn:
            assert np.abs(observation["image"].astype(float) - answer["observation"]["image"]).mean() < 2
    assert flags["success"]


def test_commands_mean_the_same(pairs):
    """The targets of every step of the physics, several commands in a row: the planner is the same one."""
    pair = simulation, batch = pairs(CAN)
    one, many = simulation._controller, batch._controller
    rng = np.random.default_rng(3)
    for seed in range(3):
        begin(pair, seed)
        simulation.reset(seed)
        for _ in range(3):
            command = np.array([*rng.uniform(-0.05, 0.05, 3), *rng.uniform(-0.2, 0.2, 3), rng.uniform(-1.3, 1.3)])
            one.apply(command.astype(np.float32).astype(np.float64))
            many.apply(torch.from_numpy(command[None]).float())
            positions, velocities = (rows[:, 0].numpy() for rows in many._targets)
            assert np.abs(one._positions - positions).max() < 1e-6
            assert np.abs(one._velocities - velocities).max() < 1e-6
    joints = batch.env.agent.robot._objs[0].active_joints
    for step in (1, 2):
        many.before_simulation_step()
        assert [joint.drive_target[0] for joint in joints] == pytest.approx(positions[step])
        fingers = [joints[index].drive_velocity_target[0] for index in one.planner.fingers]
        assert fingers == pytest.approx(velocities[step])


def test_an_apple_in_the_drawer_and_what_is_said(pairs, monkeypatch):
    """By bodies, not by shapes: on the floor it counts, on the front wall, over the floor or outside it does not."""
    import sapien

    pair = _, batch = pairs(PLACE)
    monkeypatch.setattr(batch.env, "told", 2)
    told = [begin(pair, 1_000_040)["observation"]["instruction"]]
    told += [follow(batch, np.zeros(7))["observation"]["instruction"] for _ in range(3)]
    assert told == ["open top drawer"] * 3 + ["place apple into top drawer"]
    env, body = batch.env, batch.env.apple._bodies[0]
    env._set_opening(0.2)
    for place, inside in [
        ([0.09, 0.0, 0.6705], True),
        ([0.21, 0.0, 0.7905], False),
        ([0.09, 0.0, 0.70], False),
        ([-0.05, 0.03, 0.918], False),
    ]:
        body.entity.set_pose(sapien.Pose(place))
        body.set_linear_velocity(np.zeros(3))
        env.scene.step()
        assert env.low().tolist() == [inside]


# ---- several slots: the controller


def test_every_slot_has_its_own_plan(pairs):
    """Three arms in one controller, each as it would be alone; the kinematics are real, the arms stand-ins."""
    from mani_skill.utils.structs import Pose

    from robot_forgetting.tasks.google_robot.google_robot import BatchedPlannedController

    simulation, _ = pairs(CAN)
    simulation.reset(5)
    env, agent = simulation.env, simulation.env.agent
    home = agent.robot.get_qpos()[0]
    shift = torch.tensor([0.0, 0.02, -0.03])
    commands = torch.tensor([[0.01, 0, 0, 0, 0, 0.1, 1], [0, 0.02, 0, 0.1, 0, 0, -1], [0, 0, -0.01, 0, 0.1, 0, 0.3]])

    def arms(rows: list[int]):
        qpos = home + shift[rows][:, None]
        place = agent.robot.pose.raw_pose.repeat(len(rows), 1)
        tip = agent.tcp.pose.raw_pose.repeat(len(rows), 1)
        tip[:, 0] += shift[rows]
        robot = types.SimpleNamespace(
            active_joints=agent.robot.active_joints,
            links=agent.robot.links,
            _objs=agent.robot._objs,
            get_qpos=lambda: qpos,
            get_qvel=lambda: torch.zeros_like(qpos),
            pose=Pose.create(place),
        )
        tcp = types.SimpleNamespace(name=agent.tcp.name, pose=Pose.create(tip))
        stand_in = types.SimpleNamespace(robot=robot, tcp=tcp, urdf_path=agent.urdf_path)
        made = types.SimpleNamespace(
            agent=stand_in, num_envs=len(rows), sim_freq=env.sim_freq, _sim_steps_per_control=env._sim_steps_per_control
        )
        return BatchedPlannedController(made)

    together = arms([0, 1, 2])
    alone = [arms([row]) for row in range(3)]
    for _ in range(2):
        together.apply(commands)
        for row, one in enumerate(alone):
            one.apply(commands[row : row + 1])
    for index in range(2):
        found, expected = together._targets[index], [one._targets[index] for one in alone]
        assert found.shape == (172, 3, (11, 2)[index]) and torch.equal(found, torch.cat(expected, dim=1))
    assert len({tuple(rows) for rows in together._targets[0][-1].tolist()}) == 3
    ends = [planner._end for planner in together._planners]
    together.begin(torch.tensor([1]))
    assert together._planners[1]._end is None and [together._planners[slot]._end for slot in (0, 2)] == ends[::2]


def test_a_slot_that_is_nowhere_and_targets_on_a_gpu(pairs, monkeypatch):
    """It alone fails, and stands still. ManiSkill's buffers of targets have a row per articulation, of which the robots
    are some: here 1 and 3, the fingers' joints being the last two."""
    from mani_skill.utils.structs import Pose

    env, many = pairs(CAN)[1].env, pairs(CAN)[1]._controller
    qpos = env.agent.robot.get_qpos()
    nowhere = torch.cat([qpos, torch.full_like(qpos, torch.nan)])
    targets = types.SimpleNamespace(torch=lambda: buffer), types.SimpleNamespace(torch=lambda: velocities)
    buffer, velocities, applied = torch.zeros(4, 12), torch.zeros(4, 12), []
    px = types.SimpleNamespace(
        cuda_articulation_target_qpos=targets[0],
        cuda_articulation_target_qvel=targets[1],
        gpu_apply_articulation_target_position=lambda: applied.append("positions"),
        gpu_apply_articulation_target_velocity=lambda: applied.append("velocities"),
    )

    def place(joints: list) -> tuple:
        columns = torch.tensor([env.agent.robot.active_joints.index(joint) for joint in joints])
        return tuple(torch.meshgrid(torch.tensor([1, 3]), columns, indexing="ij"))

    robot = types.SimpleNamespace(
        get_qpos=lambda: nowhere,
        get_qvel=lambda: torch.zeros_like(nowhere),
        pose=Pose.create(env.agent.robot.pose.raw_pose.repeat(2, 1)),
        get_joint_target_indices=place,
    )
    monkeypatch.setattr(many, "_robot", robot)
    tip = Pose.create(env.agent.tcp.pose.raw_pose.repeat(2, 1))
    monkeypatch.setattr(many, "_tcp", types.SimpleNamespace(pose=tip))
    monkeypatch.setattr(many, "_planners", many._planners * 2)
    monkeypatch.setattr(many, "_env", types.SimpleNamespace(gpu_sim_enabled=True, scene=types.SimpleNamespace(px=px)))
    many.begin(torch.tensor([0]))
    failed = many.apply(torch.tensor([[0.02, 0, 0, 0, 0, 0, 1.0]]).repeat(2, 1))
    assert list(failed) == [1] and "Error: " in failed[1]
    for _ in range(80):
        many.before_simulation_step()
    assert applied == ["positions", "velocities"] * 80 and not buffer[[0, 2]].any() and not buffer[:, 11].any()
    assert torch.equal(buffer[1, :11], many._targets[0][80, 0]) and (buffer[1, :11] - qpos[0]).abs().max() > 0.005
    limits = env.agent.robot.qlimits[0].T
    assert torch.equal(buffer[3, :11], torch.zeros(11).clamp(*limits)) and not velocities[3].any()
    assert velocities[1].nonzero()[:, 0].tolist() == many._planners[0].fingers.tolist()


# ---- several slots: flags


class Scene:
    """Stand-in for what a scene of several environments computes its flags from: places, touches, and rows."""

    def __init__(self, kind, count: int, **rows):
        self.num_envs, self.device = count, torch.device("cpu")
        self._elapsed_steps = torch.zeros(count, dtype=torch.int32)
        self._counted, self.held = torch.zeros(2, count, dtype=torch.int64)
        self.configuration = torch.arange(count)
        self.grasps: dict[str, torch.Tensor] = {}
        for name in ("_stepped", "_count_held", "evaluate"):
            setattr(self, name, types.MethodType(getattr(kind, name), self))
        vars(self).update(rows)

    def pressed(self, thing) -> torch.Tensor:
        return self.grasps.get(thing.name, torch.zeros(self.num_envs, dtype=torch.bool))

    def step(self, *stepped: int) -> dict:
        self._elapsed_steps[list(stepped)] += 1
        return {key: value.tolist() for key, value in self.evaluate().items()}


def at(places: torch.Tensor):
    """The pose of a thing in N environments [N, 3]."""
    from mani_skill.utils.structs import Pose

    return Pose.create_from_pq(places, torch.tensor([[1.0, 0, 0, 0]]).repeat(len(places), 1))


def thing(name: str, places: Callable) -> types.SimpleNamespace:
    """Its pose is asked for anew each time."""
    kind = type("Thing", (types.SimpleNamespace,), {"pose": property(lambda self: at(places()))})
    return kind(name=name)


def test_flags_of_each_can():
    """0 lies on the table, 1 is held up, 2 is held up while it touches the table, 3 falls after five steps up."""
    from robot_forgetting.tasks.google_robot.scenes import PickCan

    places = torch.tensor([[0.0, 0, 0.9], [0, 0, 0.93], [0, 0, 0.93], [0, 0, 0.93]])
    touching = torch.tensor([True, False, True, False])
    scene = Scene(
        PickCan,
        4,
        height=torch.full((4,), 0.9),
        lifted=torch.zeros(4, dtype=torch.bool),
        high=torch.zeros(4, dtype=torch.int64),
        can=thing("can", lambda: places),
        table_top=None,
        touches=lambda one, other: touching,
    )
    scene.grasps["can"] = torch.tensor([False, True, True, True])
    found = scene.step(0, 1, 2, 3)
    assert found["success"] == [False, True, False, True] and found["configuration"] == [0, 1, 2, 3]
    for _ in range(4):
        found = scene.step(0, 2, 3)
    assert found["consecutive_grasp"] == [False, False, True, True] and scene.high.tolist() == [0, 1, 0, 5]
    places[[1, 3], 2], touching[[1, 3]] = 0.9, True
    scene.grasps["can"][[1, 3]] = False
    assert scene.step(3)["success"] == [False, True, False, True]  # 1 has not moved: another slot's step
    found = scene.step(0, 1, 2, 3)
    assert found["success"] == [False, False, False, True] and scene.held.tolist() == [0, 0, 6, 0]
    assert found["lifted_object"] == [False] * 4 and found["is_grasped"] == [False, False, True, False]


def test_flags_of_each_move():
    """Slots with other objects, of which others are to be moved; what stands aside in a slot does not count there."""
    from robot_forgetting.tasks.google_robot.move_near import OBJECTS, PAIRS, TRIPLETS, MoveNear

    triplet, pair = torch.tensor([0, 2, 2]), torch.tensor([PAIRS.index(two) for two in ((0, 1), (2, 0), (2, 0))])
    start = torch.tensor([[-0.33, 0.04, 0.9], [-0.33, 0.34, 0.9], [-0.13, 0.19, 0.9]])
    places = torch.full((3, len(OBJECTS), 3), -30.0)
    for slot in range(3):
        for index, name in enumerate(TRIPLETS[int(triplet[slot])]):
            places[slot, OBJECTS.index(name)] = start[index]
    objs = {name: thing(name, lambda index=index: places[:, index]) for index, name in enumerate(OBJECTS)}
    scene = Scene(
        MoveNear,
        3,
        triplet=triplet,
        pair=pair,
        starts=start.repeat(3, 1, 1),
        radii=torch.full((3, 3), 0.04),
        objs=objs,
        _mass_centres=[at(torch.zeros(3, 3))] * len(OBJECTS),
    )
    assert scene.step(0, 1, 2)["moved_correct_obj"] == [False] * 3
    places[0, OBJECTS.index("blue_plastic_bottle")] = torch.tensor([-0.33, 0.17, 0.9])  # beside the can
    places[1, OBJECTS.index("baked_apple_v2")] = torch.tensor([-0.33, 0.12, 0.9])  # beside the coke can
    places[2, OBJECTS.index("baked_opened_redbull_can_v2")] = torch.tensor([-0.33, 0.20, 0.9])  # which is the third
    scene.grasps = {
        "baked_apple_v2": torch.tensor([True, True, False]),
        "blue_plastic_bottle": torch.tensor([False, True, True]),
    }
    found = scene.step(0, 1, 2)
    assert found["success"] == [True, True, False] and found["moved_wrong_obj"] == [False, False, True]
    assert found["is_grasped"] == [False, True, False] and scene.held.tolist() == [0, 1, 0]
    places[1, OBJECTS.index("baked_opened_coke_can_v2"), 2] = 0.7
    assert scene.step()["all_obj_keep_height"] == [True, False, True]


def test_flags_of_each_drawer():
    from robot_forgetting.tasks.google_robot.cabinet import Drawer, PlaceInDrawer

    openings = torch.tensor([0.16, 0.149, 0.051, 0.04])
    scene = Scene(Drawer, 4, closing=False, openings=lambda: openings)
    assert scene.step()["success"] == [True, False, False, False]
    scene.closing = True
    assert scene.step()["success"] == [False, False, False, True]
    inside = torch.tensor([True, True, False, True])
    never = torch.zeros(4, dtype=torch.bool)
    scene = Scene(
        PlaceInDrawer,
        4,
        openings=lambda: openings,
        inside=lambda: inside,
        apple=types.SimpleNamespace(name="apple"),
        was_open=never,
        was_in=never.clone(),
        placing=torch.tensor([True, False, True, True]),
    )
    found = scene.step(0, 1, 2)  # 3 has not moved
    assert found["is_drawer_open"] == [True, False, False, False] and found["has_contact"] == [True, True, False, False]
    assert found["success"] == [True, False, False, False]
    openings[:2], inside[:] = 0.06, False
    scene.placing[1] = True
    assert scene.step(0, 1, 2, 3)["success"] == [True, True, False, False]


# ---- several slots: looks


def test_each_slot_wears_its_colouring(pairs):
    """Three robots' links of the same mesh."""
    from sapien import Entity
    from sapien.wrapper.actor_builder import ActorBuilder

    from robot_forgetting.tasks.google_robot.google_robot import urdf
    from robot_forgetting.tasks.google_robot.scenes import GoogleScene, materials

    env = pairs(CAN)[0].env
    bodies = []
    for _ in range(3):
        builder, entity = ActorBuilder(), Entity()
        builder.add_visual_from_file(str(urdf().parent / "3obj" / "link_bicep.3obj.obj"))
        entity.add_component(builder.build_render_component())
        bodies.append(types.SimpleNamespace(entity=entity))
    links = {"link_bicep": types.SimpleNamespace(_bodies=bodies)}
    scene = types.SimpleNamespace(
        agent=types.SimpleNamespace(robot=types.SimpleNamespace(links_map=links)),
        colouring=torch.tensor([2, 1, 3]),
        _textures={colours: {"link_bicep": textures["link_bicep"]} for colours, textures in env._textures.items()},
    )

    def worn() -> list[str]:
        shown = [next(materials(body.entity.components[0])).base_color_texture.filename for body in bodies]
        return [file.split("/")[-2].removeprefix("3obj").removeprefix("_") for file in shown]

    assert worn() == ["", "", ""]
    GoogleScene.dress(scene, [0, 2])
    assert worn() == [assets.COLOURS[2], "", assets.COLOURS[3]]
    scene.colouring[:] = 0
    GoogleScene.dress(scene, [0, 1])
    assert worn() == ["", "", assets.COLOURS[3]]


def test_each_slot_has_its_photo(tmp_path):
    """Where it shows nothing that is kept; photos are read once."""
    import imageio.v3 as imageio

    photos = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    for name, photo in zip("ab", photos, strict=True):
        imageio.imwrite(tmp_path / f"{name}.png", photo)
    segmentation = torch.zeros(3, 4, 5, 4, dtype=torch.int16)
    segmentation[..., 0, 1] = 3  # the first column is the robot
    pictures = [torch.full((3, 4, 5, 4), 0.5), segmentation]
    camera = types.SimpleNamespace(width=5, height=4, take_picture=lambda: None, get_picture=lambda names: pictures)
    sensor = types.SimpleNamespace(camera=camera, config=types.SimpleNamespace(shader_pack="default"))
    ours = BatchedCamera(sensor, (5, 4), Overlay(photos[0], kept=[3]))
    for shown in ("aba", "bbb", "abb"):
        ours.change_photos([str(tmp_path / f"{name}.png") for name in shown])
        found = ours.take()
        assert (found[:, :, 0] == 127).all()
        assert np.array_equal(found[:, :, 1:], [photos["ab".index(name)][:, 1:] for name in shown])
        for name in shown:
            (tmp_path / f"{name}.png").unlink(missing_ok=True)


def test_a_slots_photo_is_its_episodes(pairs, bundle):
    pair = simulation, batch = pairs(DRAWER)
    for number, station in ((3, "b0"), (8, "c2")):
        image = begin(pair, 1_000_000 + number)["observation"]["image"]
        assert batch._photos[0].endswith(f"open_drawer_{station}.png")
        assert (image == simulation.reset(1_000_000 + number)["image"]).mean() > 0.999


def test_a_gripper_without_a_command_keeps_what_it_has(pairs, monkeypatch):
    pair = _, batch = pairs(CAN)
    given, apply = [], batch._controller.apply
    monkeypatch.setattr(batch._controller, "apply", lambda moves: given.append(moves[0, 6].item()) or apply(moves))
    begin(pair, 5)
    for commands in ({0: np.array([0, 0, 0, 0, 0, 0, 0.5])}, {}, {}):
        batch.step(commands)
    assert given[-3:] == [0.5, 0.0, 0.0]


# ---- where it is available, and a GPU


@pytest.mark.parametrize("name", [CAN, DRAWER])
def test_where_it_is_available(monkeypatch, name):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers, "BatchedVectorEnv", lambda spec, *numbers: (spec, *numbers))
    spec, slots, processes = configured(name, "simulation=gpu", "processes=3").make_env(5)
    assert (spec.overlay, slots, processes) == (True, 5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("name, full", [(CAN, False), (NEAR, False), (DRAWER, False), (PLACE, False), (DRAWER, True)])
def test_four_slots_on_a_gpu(name, full):
    spec = configured(name, "image_size=64", f"full_pictures={str(full).lower()}").spec
    try:
        four_slots(dataclasses.replace(spec, video=full))
    finally:
        POOL.close()
