"""SimplerEnv's four WidowX tasks: carrot onto plate, spoon onto towel, cube onto cube, eggplant into basket.

Of each an environment as in the original, of those whose assets can be had freely ManiSkill3's own too, and an expert.
"""

from __future__ import annotations

import itertools

import numpy as np
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import put_on_in_scene as stock
from mani_skill.utils.registration import register_env

from robot_forgetting.tasks.simulator.grid import Grid
from robot_forgetting.tasks.widowx.bridge import BridgeScene, StockScene
from robot_forgetting.tasks.widowx.widowx_expert import pick_and_place

CENTRE = np.array([-0.16, 0.0])
CORNERS = np.array(list(itertools.product((-1, 1), (-1, 1))))
TABLE = ((-0.26, -0.06), (-0.11, 0.11))  # x and y where objects lie in training, metres


def about_z(degrees: float) -> list[float]:
    """Quaternion (w, x, y, z) of a turn about the vertical."""
    half = np.radians(degrees) / 2
    return [np.cos(half), 0.0, 0.0, np.sin(half)]


def pairs(half: float) -> list:
    """Source and target on two different corners of a square of edge ``2 * half`` metres: 12 places [2, 2]."""
    return [np.stack([CENTRE + half * a, CENTRE + half * b]) for a, b in itertools.permutations(CORNERS, 2)]


def table_grid(halves: tuple[float, ...], degrees: tuple[float, ...], apart: float) -> Grid:
    places = np.concatenate([pairs(half) for half in halves])
    turns = np.array([[about_z(turn), about_z(0)] for turn in degrees])
    return Grid(places, turns, source=TABLE, target=TABLE, apart=apart, turn=0.4, held_out=(0.02, 0.02))


CARROT = table_grid((0.075,), (180, -90), apart=0.1)
SPOON = table_grid((0.075,), (0, 90), apart=0.1)
CUBES = table_grid((0.05, 0.1), (0,), apart=0.07)
EGGPLANT = Grid(
    np.array([[[x, y], [-0.125, 0.025]] for x in (-0.115, -0.095) for y in np.linspace(0.191, 0.221, 4)]),
    np.array([[about_z(turn), about_z(0)] for turn in (0, 45, -45)]),
    source=((-0.13, -0.08), (0.175, 0.235)),
    target=((-0.125, -0.125), (0.025, 0.025)),  # the basket never moves
    apart=0.0,
    turn=0.4,
    held_out=(0.003, 0.0),
)


@register_env("RobotForgetting-WidowXCarrotOnPlate-v1", max_episode_steps=60)
class CarrotOnPlate(BridgeScene):
    objects_excluded_from_greenscreening = ["bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"]
    grid = CARROT


@register_env("RobotForgetting-WidowXSpoonOnTowel-v1", max_episode_steps=60)
class SpoonOnTowel(BridgeScene):
    objects_excluded_from_greenscreening = ["bridge_spoon_generated_modified", "table_cloth_generated_shorter"]
    grid, nothing_else = SPOON, False  # the spoon may lie half beside the towel


@register_env("RobotForgetting-WidowXStackCube-v1", max_episode_steps=60)
class StackCube(BridgeScene):
    MODEL_JSON = "info_bridge_custom_baked_tex_v0.json"
    objects_excluded_from_greenscreening = ["baked_green_cube_3cm", "baked_yellow_cube_3cm"]
    grid = CUBES


@register_env("RobotForgetting-WidowXPutEggplantInBasket-v1", max_episode_steps=120)
class EggplantInBasket(BridgeScene):
    """The sink and the target plane are part of the photo; only the robot and the eggplant are drawn."""

    scene_setting, bundle, photo = "sink", "bridge_sink", "bridge_sink.png"
    objects, objects_excluded_from_greenscreening = ("eggplant", "dummy_sink_target_plane"), ["eggplant"]
    grid, height, nothing_else = EGGPLANT, 0.06, False
    _load_lighting = stock.PutEggplantInBasketScene._load_lighting


for name, base, grid in (
    ("CarrotOnPlate", stock.PutCarrotOnPlateInScene, CARROT),
    ("SpoonOnTowel", stock.PutSpoonOnTableClothInScene, SPOON),
    ("StackCube", stock.StackGreenCubeOnYellowCubeBakedTexInScene, CUBES),
):
    made = type(f"Stock{name}", (StockScene, base), {"grid": grid})
    register_env(f"RobotForgetting-WidowX{name}-maniskill3-v1", max_episode_steps=60)(made)


def carrot_expert(env):
    return pick_and_place(env, grip=(0.0, 0.0), above=0.009, rest=0.024)


def spoon_expert(env):
    """By the bowl's end of the handle, near its centre of mass."""
    return pick_and_place(env, grip=(0.03, 0.0), above=0.016, rest=0.014)


def cube_expert(env):
    return pick_and_place(env, grip=(0.0, 0.0), above=0.012, rest=0.03)
