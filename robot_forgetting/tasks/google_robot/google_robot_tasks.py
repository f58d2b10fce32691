"""The Google robot's tasks as a yaml file describes them; naming one imports no simulator."""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Any

from robot_forgetting.ranges import ArgumentsOf
from robot_forgetting.tasks.simulator.maniskill_task import FIXED, ManiSkillTask, twin_task
from robot_forgetting.tasks.simulator.robots import Robot

GOOGLE_ROBOT = Robot(
    controller="robot_forgetting.tasks.google_robot.google_robot.PlannedController",
    batched="robot_forgetting.tasks.google_robot.google_robot.BatchedPlannedController",
    control_mode="planned",
    rotation="axis_angle",
    gripper="+1 closes",
    control_hz=3.0,
    statistics="fractal20220817_data",
    gripper_still=0.0,
    # [fx, fy, cx, cy] in pixels of its 640 x 512.
    camera={"size": [640, 512], "intrinsic": [425.0, 425.0, 320.0, 256.0]},
    noise={"small": 0.004, "kick": 0.02, "kick_probability": 0.1},  # metres
)


# Model names of the assets; configuration k of "move near" shows triplet k % 60 // 12.
MOVE_NEAR_TRIPLETS = (
    ("blue_plastic_bottle", "baked_opened_pepsi_can_v2", "orange"),
    ("baked_opened_7up_can_v2", "baked_apple_v2", "baked_sponge_v2"),
    ("baked_opened_coke_can_v2", "baked_opened_redbull_can_v2", "baked_apple_v2"),
    ("baked_sponge_v2", "blue_plastic_bottle", "baked_opened_7up_can_v2"),
    ("orange", "baked_opened_pepsi_can_v2", "baked_opened_redbull_can_v2"),
)
MOVE_NEAR_OBJECTS = tuple(dict.fromkeys(name for names in MOVE_NEAR_TRIPLETS for name in names))


APPLE = "baked_apple_v2"


def _said(name: str) -> str:
    """A model's name without what is not said of a thing."""
    return " ".join(word for word in name.split("_") if word not in ("opened", "baked", "v2"))


def place_sentences(drawer: str) -> tuple[str, str]:
    """What is said first, and what later (``PlaceInDrawer.told``)."""
    return f"open {drawer} drawer", f"place {_said(APPLE)} into {drawer} drawer"


def move_near_sentence(source: str, target: str) -> str:
    """What an episode says."""
    return f"move {_said(source)} near {_said(target)}"


def google_robot_task(
    name: str, scene: str, instruction: str, **options: Annotated[Any, ArgumentsOf(ManiSkillTask, without=FIXED)]
) -> ManiSkillTask:
    """A task at 3 Hz, of 80 steps unless said otherwise; see ``twin_task``.

    scene: "PickCan", "MoveNear", "Drawer", "PlaceInDrawer": an environment of ``robot_forgetting.envs.google_robot``
    env_arguments: its own
    """
    options = {"max_steps": 80, "modules": ["robot_forgetting.envs.google_robot"], **options}
    robot = "robot_forgetting.tasks.google_robot.google_robot_tasks.GOOGLE_ROBOT"
    task = twin_task(name, f"RobotForgetting-GoogleRobot{scene}-v1", instruction, robot, **options)
    if scene == "MoveNear":
        pairs = [pair for names in MOVE_NEAR_TRIPLETS for pair in permutations(names, 2)]
        task.instructions = tuple(dict.fromkeys(move_near_sentence(*pair) for pair in pairs))
    if scene == "PlaceInDrawer":
        task.instructions = place_sentences(task.spec.env_arguments.get("drawer", "top"))
    if scene == "PickCan":
        # Recordings stand on the assets' mesh, and the hand stands 8 mm aside while it closes: docs/google_robot.md.
        task.recorded_with, task.recorded_pictures = {"table": "stage"}, 1.5
    orientation = task.spec.env_arguments.get("orientation", "any")
    if orientation != "any":  # recordings name the family and the orientation
        task.recorded_as = f"google_robot_pick_coke_can_{orientation}"
    return task
