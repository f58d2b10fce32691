"""What a policy's commands mean, turned into what a robot takes, and back.

The published OpenVLA checkpoints give Euler angles and a gripper between 0 (closed) and 1 (open). SimplerEnv's wrapper
(``simpler_env/policies/openvla/openvla_model.py``, ``OpenVLAInference.step``) turns the angles into a rotation vector
(transforms3d's ``euler2axangle``, axes "sxyz": R = Rz(yaw) Ry(pitch) Rx(roll)) and, for the WidowX, opens the gripper
where the number is above 0.5. The Google robot's gripper is told changes, not states: where the number changes by
more than 0.5 from one step to the next, what it falls by is the command of 15 steps (``sticky_gripper_num_repeat``).
A task does the same where the policy declares ``rotation: euler_xyz`` and ``gripper: "1 opens, 0 closes"``.
"""

from __future__ import annotations

import numpy as np

from robot_forgetting.errors import UserError, check_choice, unknown
from robot_forgetting.tasks.simulator.robots import Robot

ABSOLUTE = "1 opens, 0 closes"
REPEATS = 15  # steps for which the Google robot's gripper goes on


def declared(name: str, rotation: str | None, gripper: str | None) -> dict[str, str | None]:
    """What a policy says its commands mean, as ``Boundary`` takes it; ``UserError`` where it says nothing.

    A gripper command between -1 and 1 is taken as the robot's own; which way round it is, is compared with the task's
    convention before the first step.
    """
    for key, value, example in (("rotation", rotation, "euler_xyz"), ("gripper", gripper, f"'{ABSOLUTE}'")):
        if value is None:
            raise UserError(
                f"task '{name}' must know what the policy's commands mean; give policy.{key}, as of published OpenVLA "
                f'checkpoints "policy.{key}={example}" (policy=openvla-7b-simpler has it)'
            )
    return {"rotation": rotation, "gripper": None if gripper in ("+1 opens", "+1 closes") else gripper}


class Boundary:
    """Between a policy that declares ``rotation`` and ``gripper`` (None: the robot's own) and a robot."""

    def __init__(self, robot: Robot, rotation: str | None = None, gripper: str | None = None):
        rotation, gripper = rotation or robot.rotation, gripper or robot.gripper
        if rotation != robot.rotation and (rotation, robot.rotation) != ("euler_xyz", "axis_angle"):
            raise unknown("rotation", rotation, {robot.rotation, "euler_xyz"})
        check_choice("gripper", gripper, (robot.gripper, ABSOLUTE))
        self._turn, self._binarise = rotation != robot.rotation, gripper != robot.gripper
        self._sticky = self._binarise and robot.gripper == "+1 closes"
        self.reset()

    def reset(self) -> None:
        """At the start of an episode; only a gripper that is told changes has something to forget."""
        self._before, self._change, self._left, self._state = None, 0.0, 0, 1.0

    def to_robot(self, command: np.ndarray) -> np.ndarray:
        """A policy's command [7] as the robot's."""
        if not (self._turn or self._binarise):
            return command
        command = command.copy()
        if self._turn:
            command[3:6] = rotation_vector(command[3:6])
        if self._binarise:
            command[6] = self._changed(command[6]) if self._sticky else 1.0 if command[6] > 0.5 else -1.0
        return command

    def _changed(self, now: float) -> float:
        """The gripper's command at a step, from what the policy says now and what it said before."""
        change = 0.0 if self._before is None else self._before - now
        self._before = now
        if abs(change) > 0.5 and not self._left:
            self._change, self._left = change, REPEATS
        if self._left:
            self._left -= 1
            return self._change
        return change

    def to_policy(self, command: np.ndarray) -> np.ndarray:
        """A robot's command [7] (an expert's) as a policy would have given it."""
        if not (self._turn or self._binarise):
            return command
        command = command.copy()
        if self._turn:
            command[3:6] = euler_angles(command[3:6])
        if self._binarise:
            if self._sticky:  # what was said last stands where the expert says nothing
                self._state = float(command[6] < 0) if command[6] else self._state
                command[6] = self._state
            else:
                command[6] = float(command[6] > 0)
        return command


def rotation_vector(angles: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of R = Rz(yaw) Ry(pitch) Rx(roll) for [roll, pitch, yaw]; all in radians."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles).as_rotvec()


def euler_angles(vector: np.ndarray) -> np.ndarray:
    """The inverse of ``rotation_vector`` for turns of less than a quarter."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(vector).as_euler("xyz")
