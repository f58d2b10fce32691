"""SimplerEnv's tasks as a yaml file describes them; naming one imports no simulator."""

from __future__ import annotations

from robot_forgetting.errors import unknown
from robot_forgetting.ranges import Pixels, Processes, Steps
from robot_forgetting.tasks.simulator.conventions import declared
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask, Noise

# The robot's camera, a Logitech C920: [fx, fy, cx, cy] in pixels of its 640 x 480.
WIDOWX_CAMERA = {"size": [640, 480], "intrinsic": [623.588, 623.588, 319.501, 239.545]}
WIDOWX_NOISE = {"small": 0.003, "kick": 0.015, "kick_probability": 0.1}  # metres
VARIANTS = ("original", "maniskill3")


def widowx_task(
    name: str,
    scene: str,
    instruction: str,
    *,
    variant: str = "original",
    expert: str | None = None,
    max_steps: Steps = 60,
    image_size: Pixels = 224,
    full_pictures: bool = True,
    render: str = "stock",
    rotation: str | None = "axis_angle",
    gripper: str | None = "+1 opens",
    statistics: str = "bridge_orig",
    noise: Noise | None = None,
    processes: Processes | None = None,
    simulation: str = "cpu",
) -> ManiSkillTask:
    """A Bridge task: 5 Hz, a photo for the background, success as it stands when the time is up.

    scene: "WidowXCarrotOnPlate" ...: an environment of ``robot_forgetting.envs.widowx_bridge``
    variant: "original" (agrees with recordings of SAPIEN 2.2.2) or "maniskill3" (ManiSkill3's own port)
    full_pictures: draw 640 x 480 and average down to the square, as SimplerEnv does; false draws the small square
    simulation: "cpu", or "gpu" (``original`` only)
    rotation, gripper: what the policy's commands mean; "euler_xyz" and "1 opens, 0 closes" are the published OpenVLA's
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    stock = variant == "maniskill3"
    return ManiSkillTask(
        name,
        f"RobotForgetting-{scene}{'-maniskill3' if stock else ''}-v1",
        instruction,
        expert=expert,
        modules=["robot_forgetting.envs.widowx_bridge"],
        max_steps=max_steps,
        camera=WIDOWX_CAMERA,
        image_size=image_size,
        render=render,
        noise=noise or WIDOWX_NOISE,
        statistics=statistics,
        processes=processes,
        simulation=simulation,
        robot="widowx_maniskill3" if stock else "widowx",
        overlay=True,
        full_pictures=full_pictures,
        ends_on_success=False,
        **declared(name, rotation, gripper),
    )
