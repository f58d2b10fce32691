"""SimplerEnv's WidowX tasks: recordings of the original simulator decide; then spec, states, photos, experts."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from bridge_tasks import RUNNABLE
from robot_tasks import configured

from robot_forgetting.conformance import check
from robot_forgetting.conformance.recordings import Player, complaints
from robot_forgetting.errors import UserError
from robot_forgetting.machine import assets
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.tasks.simulator.pictures import area_average, read_photo
from robot_forgetting.tasks.simulator.simulation import Simulation

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.usefixtures("renderer", "bundle"),
]
RECORDINGS = (
    "widowx_carrot_on_plate_ep00_pickplace",
    "widowx_carrot_on_plate_ep02_wiggle",
    "widowx_spoon_on_towel_ep05_pickplace",
    "widowx_stack_cube_ep00_pickplace",
)


@pytest.fixture(scope="module")
def recordings(shared):
    folder = shared / "golden" / "simpler"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: recordings of the original simulator")
    return folder


# ---- the original's recordings


@pytest.mark.parametrize("name", RECORDINGS)
def test_recording(players, recordings, name):
    file = recordings / f"{name}.npz"
    replay = players(name[: name.index("_ep")]).replay(file)
    assert not complaints(replay), str(replay)
    assert replay.success[0] == ("pickplace" in name)
    assert replay.tcp.max() < 1.5 and replay.source[0] < 0.1  # millimetres
    assert len(replay.pictures) == 3 and replay.pictures[0] < 0.02
    assert replay.flags["is_src_obj_grasped"] == replay.flags["moved_correct_obj"] == 1
    assert replay.flags["success"] >= 0.97


@pytest.mark.parametrize("broken, words", [("tcp", "off by a median"), ("outcome", "another outcome"), (None, "")])
def test_check_finds_what_differs(recordings, tmp_path, capsys, broken, words):
    name = "widowx_carrot_on_plate_ep02_wiggle"
    for file in recordings.glob(f"{name}*"):
        shutil.copy(file, tmp_path)
    with np.load(recordings / f"{name}.npz") as opened:
        arrays = dict(opened)
    arrays = {key: value[:6] if key in ("action", "success") else value for key, value in arrays.items()}
    arrays["image_steps"] = arrays["image_steps"][:1]
    if broken == "tcp":
        arrays["tcp"] = arrays["tcp"] + np.float32(0.01)
    if broken == "outcome":
        arrays["success"] = ~arrays["success"]
    arrays = {key: value[: len(arrays["action"])] if value.dtype == bool else value for key, value in arrays.items()}
    (tmp_path / f"{name}.npz").chmod(0o644)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    code = check(task=configured("widowx_carrot_on_plate"), recordings=str(tmp_path))
    printed = capsys.readouterr().out
    assert code == (2 if broken else 0) and ("FAIL" in printed) == bool(broken)
    assert words in printed and "ep02_wiggle" in printed and "tcp mean" in printed


def test_recordings_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        check(task=configured("widowx_stack_cube"), recordings=str(tmp_path / "no"))
    with pytest.raises(UserError, match="holds no recording of task 'widowx_stack_cube'"):
        check(task=configured("widowx_stack_cube"), recordings=str(tmp_path))
    with pytest.raises(UserError, match="needs the task"):
        check(recordings=str(tmp_path))


def test_the_last_step_decides(players, recordings, blind):
    """The episode goes on after success, and ends at the time limit with the success that then holds."""
    simulation = players("widowx_stack_cube").simulation
    with np.load(recordings / "widowx_stack_cube_ep00_pickplace.npz") as opened:
        actions, recorded = opened["action"], opened["success"]
    before = simulation.spec
    simulation.spec = dataclasses.replace(before, max_steps=len(actions))
    try:
        simulation.reset(0, {"episode_id": 0})
        steps = [simulation.step(action) for action in actions]
    finally:
        simulation.spec = before
    assert recorded.sum() > 2
    assert [done for _, _, _, done, _ in steps] == [False] * (len(actions) - 1) + [True]
    assert [reward for _, reward, _, _, _ in steps] == [0.0] * (len(actions) - 1) + [1.0]
    assert steps[-1][4]["configuration"] == 0


# ---- what the tasks say


@pytest.mark.parametrize("name", [*RUNNABLE, "widowx_put_eggplant_in_basket"])
def test_task(name):
    task = configured(name, "policy=openvla-nano-bridge")
    expected = ConventionSpec(7, "delta", "axis_angle", "+1 opens", 64, 5.0, "bridge_orig")
    assert task.convention() == expected and task.name == name
    assert task.max_steps == (120 if "eggplant" in name else 60) and not task.spec.ends_on_success
    openvla = configured(name, "policy=openvla-7b-simpler").convention()
    assert (openvla.rotation, openvla.gripper) == ("euler_xyz", "1 opens, 0 closes")
    with pytest.raises(Exception, match="commands mean; give policy.gripper"):
        configured(name, "policy=openvla-7b")  # which is for tasks that it is fine-tuned on
    assert configured(name, "policy=mlp").convention() == expected  # says nothing of the sort: the robot's own
    assert not ConventionSpec(7, "delta", "euler_xyz", None, None, 5.0, "bridge_orig").mismatches(openvla)
    for key, words in (("variant=v2", "unknown variant 'v2'; choose one of: maniskill3, original"),
                       ("rotation=quaternion", "unknown rotation 'quaternion'; choose one of: axis_angle, euler_xyz"),
                       ("gripper=open", "unknown gripper 'open'")):  # fmt: skip
        with pytest.raises(Exception, match=words):
            configured(name, f"task.{key}")


@pytest.mark.parametrize("name", RUNNABLE)
def test_test_seeds_are_the_evaluation_configurations(players, blind, name):
    simulation = players(name).simulation
    env, lying = simulation.env, []
    for seed in (1_000_003, 1_000_003 + 24, 5):
        simulation.reset(seed)
        lying.append(np.concatenate([env._body(thing).entity.pose.p for thing in env.obj_names]))
        assert env.configuration == (3 if seed > 5 else -1)
    assert np.array_equal(lying[0], lying[1]) and not np.allclose(lying[0], lying[2], atol=1e-3)
    places = env.grid.places[3 // len(env.grid.turns)]
    assert np.abs(lying[0].reshape(2, 3)[:, :2] - places).max() < 0.005  # they may roll a little


# ---- pictures


def test_photos_do_not_leak(bundle):
    """Two environments of one process, same camera name, other photos: each keeps its own."""
    from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
    from mani_skill.utils.registration import REGISTERED_ENVS, register_env
    from robot_forgetting.envs.widowx_bridge import StackCube

    if "InTheSink-v1" not in REGISTERED_ENVS:

        @register_env("InTheSink-v1", max_episode_steps=60)
        class InTheSink(StackCube):
            photo = "bridge_sink.png"

    folder = bundle / "data" / "tasks" / "bridge_v2_real2sim_dataset" / "real_inpainting"
    spec = configured("widowx_stack_cube").spec
    simulations, photos = [], []
    for env_id, photo in ((spec.env_id, "bridge_real_eval_1.png"), ("InTheSink-v1", "bridge_sink.png")):
        simulations.append(Simulation(dataclasses.replace(spec, env_id=env_id)))
        photos.append(read_photo(folder / photo, (64, 64)).astype(int))
    assert np.abs(photos[0] - photos[1]).mean() > 20
    for turn in range(2):
        for simulation, own, other in zip(simulations, photos, photos[::-1], strict=True):
            image = simulation.reset(1_000_000 + turn)["image"].astype(int)
            same, wrong = ((image == photo).all(-1).mean() for photo in (own, other))
            assert same > 0.6 and wrong < 0.2  # robot and cubes hide the rest
    assert not BaseDigitalTwinEnv._rgb_overlay_images
    for simulation in simulations:
        simulation.close()


def test_small_pictures_show_what_full_ones_do():
    pictures = {}
    for full in (True, False):
        task = configured("widowx_carrot_on_plate", f"task.full_pictures={str(full).lower()}", "image_size=112")
        simulation = Simulation(dataclasses.replace(task.spec, video=True))
        observation = simulation.reset(1_000_000)
        pictures[full], frame = observation["image"].astype(float), observation["frame"]
        simulation.close()
    assert pictures[True].shape == (112, 112, 3)
    assert np.abs(pictures[True] - pictures[False]).mean() < 4
    assert np.abs(area_average(frame, (112, 112)) - pictures[False]).mean() < 4  # the video shows the policy's view


# ---- experts, workers, variants


EXPERT_SEEDS = {"widowx_carrot_on_plate": (1_000_001, 7), "widowx_spoon_on_towel": (1_000_000, 7),
                "widowx_stack_cube": (1_000_013, 7)}  # fmt: skip


@pytest.mark.parametrize("name", RUNNABLE)
def test_expert(players, blind, monkeypatch, name):
    from robot_forgetting.machine.user_modules import load_object

    simulation = players(name).simulation
    monkeypatch.setattr(simulation, "expert", load_object(configured(name).spec.expert))
    for seed in EXPERT_SEEDS[name]:
        simulation.reset(seed)
        commands, success = [], []
        for _ in range(60):
            commands.append(simulation.expert_command())
            success.append(simulation.step(commands[-1])[2])
        assert success[-1] and not success[0]
        commands = np.stack(commands)
        assert np.linalg.norm(commands[:, :3], axis=1).max() <= 0.0201 and np.abs(commands[-1, :6]).max() < 0.01
        assert set(np.unique(commands[:, 6])) == {-1.0, 1.0}


def test_workers_demonstrate_and_a_policy_acts():
    """Through the same processes as the Panda tasks, with an OpenVLA of random weights at its own picture size."""
    from robot_forgetting.engine.evaluate import check_conventions, evaluate
    from robot_forgetting.policies.openvla.vla import new_nano
    from robot_forgetting.tasks.simulator.workers import POOL

    task = configured("widowx_stack_cube", "processes=1", "task.rotation=euler_xyz", "image_size=64")
    try:
        episode = next(iter(task.demonstrations(1)))
        images = episode.observations["image"]
        assert images.shape[1:] == (64, 64, 3) and len(images) == len(episode.commands) < 60
        ranges = {"q01": [-0.02] * 6 + [-1], "q99": [0.02] * 6 + [1], "mask": [True] * 6 + [False]}
        policy = new_nano(instructions=[task.instruction], norm_stats={"bridge_orig": {"action": ranges}}, device="cpu",
                          rotation="euler_xyz", gripper="+1 opens", control_hz=5)  # fmt: skip
        check_conventions(policy, [task])
        task.spec = dataclasses.replace(task.spec, max_steps=3)
        (found,) = evaluate(policy, task, [1_000_009], temperature=1.0, num_envs=1)
        assert found.error is None and found.steps == 3 and not found.success
        assert found.flags["configuration"] == 9 and found.flags["consecutive_grasp"] is False
    finally:
        POOL.close()


def test_maniskill3_variant(recordings, blind):
    """The stock port drifts where the hand turns; our seeds and photos hold for it too."""
    player = Player(configured("widowx_carrot_on_plate", "task.variant=maniskill3"))
    with np.load(recordings / "widowx_carrot_on_plate_ep02_wiggle.npz") as opened:
        commands, tcp = opened["action"], opened["tcp"]
    simulation = player.simulation
    simulation.reset(1_000_002)
    for command in commands:
        flags = simulation.step(command)[4]
    hand = simulation.env.agent.robot.links_map["ee_gripper_link"].pose.p[0].numpy()
    assert flags["configuration"] == 2 and not flags["success"]
    assert 0.005 < np.linalg.norm(hand - tcp[-1][:3]) < 0.05
    player.close()


# ---- assets


def test_missing_assets(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(UserError, match="the bridge assets lack robots/widowx.*type: robot-forgetting assets bridge"):
        Simulation(configured("widowx_stack_cube").spec)


def test_the_eggplant_says_what_it_lacks():
    if not assets.missing("bridge_sink"):
        pytest.skip("its mesh is there")
    with pytest.raises(UserError, match="lack .*eggplant/collision.obj in .*type: robot-forgetting assets bridge_sink"):
        Simulation(configured("widowx_put_eggplant_in_basket").spec)
