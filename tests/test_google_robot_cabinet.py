"""SimplerEnv's cabinet for the Google robot: success of its tasks, configurations, photos, experts."""

from __future__ import annotations

import dataclasses

import hydra
import numpy as np
import pytest
from robot_tasks import CONFIGS, configured

from robot_forgetting.errors import UserError
from robot_forgetting.machine import assets
from robot_forgetting.tasks.simulator.simulation import Simulation

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
]
DRAWER, PLACE = "google_robot_open_top_drawer", "google_robot_place_apple_in_closed_top_drawer"


# ---- success


@pytest.mark.parametrize(
    "closing, opening, success", [(False, 0.149, 0), (False, 0.151, 1), (True, 0.051, 0), (True, 0.049, 1)]
)
def test_success_of_a_drawer(players, blind, monkeypatch, closing, opening, success):
    env = players(DRAWER).simulation.env
    monkeypatch.setattr(env, "closing", closing)
    qpos = np.full(3, 0.1 if closing else 0.3)  # the others do not count
    qpos[env.index] = opening
    env.cabinet._objs[0].set_qpos(qpos)
    assert bool(env.evaluate()["success"]) == bool(success) and env.opening() == pytest.approx(opening)


# An apple on the drawer's floor, pressed in by 0.7 mm, and one on the cabinet's top.
FLOOR, TOP = [0.09, 0.0, 0.6705], [-0.05, 0.03, 0.918]
STEPS = {  # (control steps so far, metres the drawer is open, the apple's place) ... -> open once, there once, success
    "as it began": ([(1, 0.0, TOP)], (False, False, False)),
    "opened": ([(101, 0.151, TOP)], (True, False, False)),
    "not far enough": ([(101, 0.149, TOP)], (False, False, False)),
    "in it, before the second instruction": ([(100, 0.2, FLOOR)], (True, True, False)),
    "in it": ([(101, 0.2, FLOOR)], (True, True, True)),
    "in it before, and the drawer still open": ([(60, 0.2, FLOOR), (101, 0.2, TOP)], (True, True, True)),
    "and 5 cm open": ([(60, 0.2, FLOOR), (101, 0.051, TOP)], (True, True, True)),
    "and closed": ([(60, 0.2, FLOOR), (101, 0.049, TOP)], (True, True, False)),
    "over it": ([(101, 0.2, [0.09, 0.0, 0.70])], (True, False, False)),
    "on the front wall": ([(101, 0.2, [0.21, 0.0, 0.7905])], (True, False, False)),
}


@pytest.mark.parametrize("steps, expected", STEPS.values(), ids=STEPS)
def test_flags_of_an_apple(players, blind, steps, expected):
    import sapien

    simulation = players(PLACE).simulation
    simulation.reset(1_000_040)
    env, body = simulation.env, simulation.env.apple._bodies[0]
    for count, opening, place in steps:
        env._elapsed_steps[:] = count
        env._set_opening(opening)
        body.entity.set_pose(sapien.Pose(place))
        body.set_linear_velocity(np.zeros(3))
        env.scene.step()
        flags = env.evaluate()
        assert env.opening() == pytest.approx(opening, abs=2e-4)
    assert tuple(bool(flags[name]) for name in ("is_drawer_open", "has_contact", "success")) == expected


def test_the_instruction_changes_within_an_episode(players, monkeypatch):
    """The original moves on before its step 101 and says so after it; with told=2, before and after the third."""
    from robot_forgetting.methods.sft import demonstration_columns
    from robot_forgetting.task import Demonstration
    from robot_forgetting.tasks.simulator.serving import demonstration

    simulation, (first, then) = players(PLACE).simulation, ("open top drawer", "place apple into top drawer")
    assert simulation.env.told == 100 and configured(PLACE).sentences == (first, then)
    monkeypatch.setattr(simulation.env, "told", 2)
    monkeypatch.setattr(simulation, "spec", dataclasses.replace(simulation.spec, max_steps=5))
    monkeypatch.setattr(simulation, "expert", lambda env: np.zeros(7))
    said = [simulation.reset(1_000_000)["instruction"]]
    said += [simulation.step(np.zeros(7))[0]["instruction"] for _ in range(5)]
    assert said == [first] * 3 + [then] * 3
    _, rows, commands = demonstration(simulation, 0, {"small": 0, "kick": 0, "kick_probability": 0})
    images, told = rows["image"], rows["instruction"]
    assert told == [first] * 3 + [then] * 2
    two = [Demonstration(images, commands, told, 0), Demonstration(images[:2], commands[:2], "wait", 1)]
    assert demonstration_columns(None, two)["instruction"] == [*told, "wait", "wait"]


# ---- initial states


def test_configurations_of_a_drawer():
    pytest.importorskip("mani_skill")
    from robot_forgetting.tasks.google_robot.cabinet import STATIONS, drawer_state

    rng = np.random.default_rng(0)
    states = [drawer_state(number, rng, tuple(STATIONS)) for number in range(27)]
    assert [state[0] for state in states] == list(range(27)) and len({state[1:] for state in states}) == 27
    assert [state[1] for state in states] == list(STATIONS) * 3
    assert states[10][1:] == ("a1", assets.COLOURS[3]) and states[1][2] == assets.COLOURS[2]
    assert drawer_state(28, rng, tuple(STATIONS)) == states[1]
    assert drawer_state(4, rng, ("b0",)) == (1, "b0", states[1][2])


def test_configurations_of_an_apple():
    """3 stations times 9 places times 4 colourings: all places of a station first, x slowest; colourings last."""
    pytest.importorskip("mani_skill")
    from robot_forgetting.tasks.google_robot.cabinet import place_state

    rng = np.random.default_rng(0)
    states = [place_state(number, rng) for number in range(108)]
    assert [state[0] for state in states] == list(range(108))
    assert [state[1] for state in states] == [station for station in ("a0", "b0", "c0") for _ in range(9)] * 4
    places = [[x, y] for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08)]
    assert np.allclose([state[2] for state in states], places * 12)
    assert [state[3] for state in states[25:29]] == [assets.COLOURS[index] for index in (1, 2, 1, 2)]
    assert len({(state[1], *state[2], state[3]) for state in states}) == 108
    assert place_state(111, rng)[0] == 3 and place_state(40, rng, ("b0",))[:2] == (4, "b0")
    drawn = [place_state(None, rng) for _ in range(400)]
    found = np.stack([state[2] for state in drawn])
    assert np.linalg.norm(found[:, None] - np.array(places), axis=2).min() >= 0.01
    assert np.ptp(found, axis=0) == pytest.approx([0.08, 0.14], abs=0.01)
    assert {state[0] for state in drawn} == {-1} and {state[1] for state in drawn} == {"a0", "b0", "c0"}
    assert {state[3] for state in drawn} == set(assets.COLOURS)


def test_an_apple_starts_on_the_cabinet(players, blind):
    simulation = players(PLACE).simulation
    env, body, starts = simulation.env, simulation.env.apple._bodies[0], []
    for seed in (1_000_010, 1_000_107, 1_000_118, 7):
        simulation.reset(seed)
        starts.append(np.array(body.entity_pose.p))
        assert env.opening() == 0 and np.linalg.norm(body.linear_velocity) < 1e-3
    assert np.allclose([start[2] for start in starts], 0.882 + 0.036, atol=1e-3)
    assert np.linalg.norm(starts[0][:2] - [-0.08, 0.03]) < 2e-3 and np.array_equal(starts[0], starts[2])
    assert np.linalg.norm(starts[1][:2] - [-0.02, 0.08]) < 2e-3 and env.configuration == -1
    assert body.mass == pytest.approx(0.053611 * 4, rel=2e-3)  # 800 kg / m3, where move near's has 200


def test_each_station_has_its_photo(players, bundle):
    from robot_forgetting.tasks.simulator.pictures import read_photo

    simulation = players(DRAWER).simulation
    folder = bundle / "data" / assets.GOOGLE / "real_inpainting"
    for number, station in ((0, "a0"), (8, "c2"), (9, "a0")):
        image = simulation.reset(1_000_000 + number)["image"]
        photo = read_photo(folder / f"open_drawer_{station}.png", (320, 256))
        assert (np.abs(image.astype(int) - photo).max(-1) < 25).mean() > 0.4  # the cabinet hides the rest
        assert np.abs(image[:30, :30].astype(int) - photo[:30, :30]).mean() < 3
    # What a photo does not hide is a list of the class in ManiSkill: other environments would add to this one's.
    assert type(simulation.env)._objects_to_remove_from_greenscreen == []


@pytest.mark.parametrize(
    "override, words",
    [
        ("station=d4", "unknown station 'd4'; choose one of: a0, a1, .*c2"),
        ("drawer=upper", "unknown drawer 'upper'; choose one of: bottom, middle, top"),
    ],
)
def test_unknown_names_of_a_drawer(renderer, bundle, override, words):
    with pytest.raises(UserError, match=words):
        Simulation(configured(DRAWER, f"task.env_arguments.{override}").spec)


# ---- experts


def test_expert_closes_a_drawer(players, blind, monkeypatch):
    from robot_forgetting.machine.user_modules import load_object

    simulation = players(DRAWER).simulation
    monkeypatch.setattr(simulation.env, "closing", True)
    monkeypatch.setattr(simulation, "expert", load_object(configured("google_robot_close_top_drawer").spec.expert))
    simulation.reset(1_000_003)  # station b0
    assert simulation.env.opening() == pytest.approx(0.2)
    flags = [simulation.step(simulation.expert_command())[4]["success"] for _ in range(45)]
    assert flags[-1] and not any(flags[:20]) and simulation.env.opening() < 0.04


def test_the_small_policy_closes_a_drawer(players):
    """The weights that come with the package, as `policy=openvla-nano-google` builds them; it closed all 27 of 27."""
    from robot_forgetting.engine.evaluate import check_conventions
    from robot_forgetting.rollout import columns

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = hydra.compose("config", overrides=["policy=openvla-nano-google", "device=cpu"]).policy
    policy = hydra.utils.instantiate(settings, _convert_="all")
    name = "google_robot_close_top_drawer"
    check_conventions(policy, [configured(name, "policy=openvla-nano-google")])
    simulation, closed = Simulation(configured(name, "policy=openvla-nano-google", "image_size=64").spec), []
    observation = simulation.reset(1_000_003)
    for _ in range(60):
        action = policy.act(columns([observation]), temperature=0.0)
        observation, _, success, _, _ = simulation.step(policy.decode(action)[0])
        closed.append(success)
    simulation.close()
    assert closed[-1] and not closed[0]


def test_expert_opens_a_drawer(players, blind, monkeypatch):
    from robot_forgetting.machine.user_modules import load_object

    simulation = players(DRAWER).simulation
    monkeypatch.setattr(simulation, "expert", load_object(configured(DRAWER).spec.expert))
    simulation.reset(1_000_003)  # station b0
    flags = [simulation.step(simulation.expert_command())[4]["success"] for _ in range(55)]
    assert flags[-1] and not any(flags[:30]) and 0.17 < simulation.env.opening() < 0.25


def test_expert_places_an_apple(players, blind, monkeypatch):
    """Into a drawer that is open already: the rest is the test above."""
    from robot_forgetting.machine.user_modules import load_object

    simulation = players(PLACE).simulation
    monkeypatch.setattr(simulation, "expert", load_object(configured(PLACE).spec.expert))
    monkeypatch.setattr(simulation.env, "told", 0)
    simulation.reset(1_000_013)  # station b0, the middle place
    simulation.env._set_opening(0.2)
    flags = []
    while len(flags) < 90 and not (flags and flags[-1]["success"]):
        flags.append(simulation.step(simulation.expert_command())[4])
    assert flags[-1]["success"] and 10 < sum(flag["is_grasped"] for flag in flags) < len(flags) - 10
    assert simulation.env.opening() == pytest.approx(0.2, abs=0.01)
