"""SimplerEnv's tasks as a yaml file describes them; naming one imports no simulator."""

from __future__ import annotations

from typing import Annotated, Any

from robot_forgetting.errors import check_choice
from robot_forgetting.ranges import ArgumentsOf
from robot_forgetting.tasks.simulator.maniskill_task import FIXED, ManiSkillTask, twin_task

VARIANTS = ("original", "maniskill3")


def widowx_task(
    name: str,
    scene: str,
    instruction: str,
    *,
    variant: str = "original",
    **options: Annotated[Any, ArgumentsOf(ManiSkillTask, without=(*FIXED, "env_arguments"))],
) -> ManiSkillTask:
    """A Bridge task at 5 Hz; see ``twin_task``.

    scene: "WidowXCarrotOnPlate" ...: an environment of ``robot_forgetting.envs.widowx_bridge``
    variant: "original" (agrees with recordings of SAPIEN 2.2.2) or "maniskill3" (ManiSkill3's own port)
    simulation: "cpu", or "gpu" (``original`` only)
    """
    check_choice("variant", variant, VARIANTS)
    suffix, robot = ("", "widowx") if variant == "original" else ("-maniskill3", "widowx_maniskill3")
    options = {"modules": ["robot_forgetting.envs.widowx_bridge"], **options}
    return twin_task(name, f"RobotForgetting-{scene}{suffix}-v1", instruction, robot, **options)
