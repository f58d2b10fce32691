"""The Google robot's tasks as a yaml file describes them; naming one imports no simulator."""

from __future__ import annotations

from itertools import permutations

from robot_forgetting.ranges import Pixels, Plain, Processes, Steps
from robot_forgetting.tasks.simulator.conventions import declared
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask, Noise
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
)
# The robot's camera: [fx, fy, cx, cy] in pixels of its 640 x 512.
GOOGLE_CAMERA = {"size": [640, 512], "intrinsic": [425.0, 425.0, 320.0, 256.0]}
GOOGLE_NOISE = {"small": 0.004, "kick": 0.02, "kick_probability": 0.1}  # metres

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
    name: str,
    scene: str,
    instruction: str,
    *,
    expert: str | None = None,
    max_steps: Steps = 80,
    image_size: Pixels = 224,
    full_pictures: bool = True,
    render: str = "stock",
    env_arguments: dict[str, Plain] | None = None,
    rotation: str | None = "axis_angle",
    gripper: str | None = "+1 closes",
    statistics: str = "fractal20220817_data",
    noise: Noise | None = None,
    processes: Processes | None = None,
    simulation: str = "cpu",
) -> ManiSkillTask:
    """A task at 3 Hz with a photo for the background; success as it stands when the time is up.

    scene: "PickCan", "MoveNear", "Drawer", "PlaceInDrawer": an environment of ``robot_forgetting.envs.google_robot``
    env_arguments: its own
    rotation, gripper: what the policy's commands mean; "euler_xyz" and "1 opens, 0 closes" are the published OpenVLA's
    full_pictures: draw 640 x 512 and average down to the square, as SimplerEnv does; false draws the small square
    """
    task = ManiSkillTask(
        name,
        f"RobotForgetting-GoogleRobot{scene}-v1",
        instruction,
        expert=expert,
        modules=["robot_forgetting.envs.google_robot"],
        max_steps=max_steps,
        camera=GOOGLE_CAMERA,
        image_size=image_size,
        render=render,
        env_arguments=env_arguments,
        noise=noise or GOOGLE_NOISE,
        statistics=statistics,
        processes=processes,
        simulation=simulation,
        robot="robot_forgetting.tasks.google_robot.google_robot_tasks.GOOGLE_ROBOT",
        overlay=True,
        full_pictures=full_pictures,
        ends_on_success=False,
        **declared(name, rotation, gripper),
    )
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
