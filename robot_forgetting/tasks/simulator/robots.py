"""What a simulation must know of a robot: its controller, what a command means to it, and how fast it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from robot_forgetting.errors import UserError, unknown
from robot_forgetting.machine.user_modules import load_object


class Controller(ABC):
    """Turns a command into drive targets, for one CPU environment."""

    @abstractmethod
    def __init__(self, env): ...

    def reset(self) -> None:  # noqa: B027  (most controllers have nothing to do)
        """After every reset of the environment; only controllers with a memory have something to do."""

    @abstractmethod
    def apply(self, command: np.ndarray) -> None:
        """Executes a command [7] (float64, finite) in the units that the robot declares."""

    # Called before every physics step where a controller moves its targets in between; None costs nothing.
    before_simulation_step = None


class BatchedController(ABC):
    """The same for N environments at once, in torch, on the CPU or the GPU."""

    @abstractmethod
    def __init__(self, env): ...

    def begin(self, slots: torch.Tensor) -> None:  # noqa: B027  (most controllers have nothing to do)
        """After the states of some environments (indices [S]) were replaced; only controllers with a memory act."""

    @abstractmethod
    def apply(self, commands: torch.Tensor) -> dict[int, str] | None:
        """Sets the drive targets for commands [N, 7] float32, finite, in the units that the robot declares.

        May tell of slots that cannot execute theirs, and why; it ends their episodes, and nobody else's.
        """

    # As ``Controller.before_simulation_step``; it applies its targets itself, where they are a GPU's.
    before_simulation_step = None


@dataclass(frozen=True)
class Robot:
    """A robot under one controller; plain values only, so that naming one imports no simulator.

    controller: dotted name of a ``Controller``
    control_mode: ManiSkill's name of the joint drives it uses; None: the robot's only one
    rotation: what numbers 4 to 6 are, "euler_xyz" or "axis_angle" (both in radians times ``radians_per_unit``)
    metres_per_unit: of the first three numbers; scales the commands that checks and experts give
    batched: dotted name of a ``BatchedController``; None: there is none (see ``batched.py``)
    gripper_still: the gripper's command that changes nothing; None: its last one, again
    camera, noise: where the policy's camera stands, and how demonstrations are disturbed, unless a task says
    """

    controller: str
    control_mode: str | None
    rotation: str
    gripper: str
    control_hz: float
    statistics: str
    metres_per_unit: float = 1.0
    batched: str | None = None
    gripper_still: float | None = None
    camera: dict = field(default_factory=lambda: {"eye": [0.38, 0.22, 0.36], "target": [-0.01, 0.0, 0.04], "fov": 0.75})
    noise: dict = field(default_factory=lambda: {"small": 0.05, "kick": 0.3, "kick_probability": 0.15})


WIDOWX = Robot(
    controller="robot_forgetting.tasks.widowx.widowx.EndEffectorController",
    control_mode=None,
    rotation="axis_angle",
    gripper="+1 opens",
    control_hz=5.0,
    statistics="bridge_orig",
    batched="robot_forgetting.tasks.widowx.widowx.BatchedEndEffectorController",
    # A Logitech C920: [fx, fy, cx, cy] in pixels of its 640 x 480.
    camera={"size": [640, 480], "intrinsic": [623.588, 623.588, 319.501, 239.545]},
    noise={"small": 0.003, "kick": 0.015, "kick_probability": 0.1},  # metres
)
ROBOTS = {
    "panda": Robot(
        controller="robot_forgetting.tasks.panda.EndEffectorController",
        control_mode="pd_ee_delta_pose",
        rotation="euler_xyz",
        gripper="+1 opens",
        control_hz=20.0,
        statistics="maniskill_panda",
        metres_per_unit=0.1,
        batched="robot_forgetting.tasks.panda.BatchedEndEffectorController",
    ),
    "widowx": WIDOWX,
    # ManiSkill's own controller behind the same numbers: it turns by Euler angles, whatever the policy meant.
    "widowx_maniskill3": replace(
        WIDOWX, controller="robot_forgetting.tasks.widowx.widowx.StockController", batched=None
    ),
}


def find_robot(name: str) -> Robot:
    """One of ``ROBOTS``, or a ``Robot`` named by its dotted path."""
    if name in ROBOTS:
        return ROBOTS[name]
    if "." not in name:
        raise unknown("robot", name, ROBOTS)
    robot = load_object(name)
    if not isinstance(robot, Robot):
        what = f"{Robot.__module__}.{Robot.__qualname__}"
        raise UserError(f"'{name}' is a {type(robot).__name__}; a robot is a {what}")
    return robot
