"""The Panda under ManiSkill's ``pd_ee_delta_pose``: its arithmetic, and its grasp test, in numpy.

ManiSkill's batched torch calls cost more than the physics of one CPU environment; a test holds both to the same
trajectory.
"""

from __future__ import annotations

import functools

import numpy as np
import sapien
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.simulator.arms import Arm, BatchedKinematics
from robot_forgetting.tasks.simulator.grasp import pressing_fingers
from robot_forgetting.tasks.simulator.robots import BatchedController, Controller


class EndEffectorController(Controller):
    """ManiSkill's ``pd_ee_delta_pose`` (root-frame translation, root-aligned body rotation) for one CPU environment."""

    def __init__(self, env):
        arm, gripper = _arm_and_gripper(env)
        config = arm.config
        self._position_scale = float(config.pos_upper)
        self._rotation_scale = float(config.rot_lower)  # ManiSkill scales rotations by the *lower* limit: a sign flip
        self._arm = Arm(env, arm, gripper)
        if env.agent.uid.startswith("panda"):
            env.agent.is_grasping = functools.partial(is_grasping, env.agent)

    def apply(self, command: np.ndarray) -> None:
        position = np.clip(command[:3], -1, 1) * self._position_scale
        rotation = command[3:6] / max(1.0, np.linalg.norm(command[3:6])) * self._rotation_scale
        current = self._arm.robot.root_pose.inv() * self._arm.link.entity_pose
        turn = sapien.Pose(q=_quaternion_xyz(rotation)) * sapien.Pose(q=current.q)
        target = sapien.Pose(p=current.p + position, q=turn.q)
        self._arm.drive(self._arm.solve(target, self._arm.robot.qpos), command[6])


class BatchedEndEffectorController(BatchedController):
    """The same commands for N environments at once.

    ManiSkill's own batched controller takes one Newton step of inverse kinematics, which under commands of up to 5 cm
    misses the joint positions that it finds on a CPU by up to 0.041 rad. Two steps come within 0.0035 rad; more do not
    come nearer, since the CPU's solver is no more precise.
    """

    def __init__(self, env):
        self._arm, self._gripper = _arm_and_gripper(env)
        self._kinematics = BatchedKinematics(self._arm, iterations=2, unsolved=0.02)

    def apply(self, commands: torch.Tensor) -> None:
        arm = self._arm
        start = arm.articulation.get_qpos()
        target = arm.compute_target_pose(arm.ee_pose_at_base, arm._preprocess_action(commands[:, :6]))
        arm.set_drive_targets(self._kinematics.solve(target, start))
        self._gripper.set_action(commands[:, 6:])


def _arm_and_gripper(env):
    """ManiSkill's two controllers; ``UserError`` unless the arm's is the one whose arithmetic is here."""
    controllers = env.agent.controller.controllers
    if missing := [part for part in ("arm", "gripper") if part not in controllers]:
        raise UserError(
            f"environment '{env.spec.id}': its robot '{env.agent.uid}' has no {' and no '.join(missing)}, only "
            f"{', '.join(controllers)}; a robot task needs one arm with a gripper"
        )
    arm, gripper = controllers["arm"], controllers["gripper"]
    config = arm.config
    if config.use_target or config.frame != "root_translation:root_aligned_body_rotation" or config.interpolate:
        raise UserError(
            f"environment '{env.spec.id}' uses an end-effector controller that is not supported; "
            "use a robot whose pd_ee_delta_pose moves relative to the measured pose in the root frame"
        )
    return arm, gripper


def is_grasping(agent, object, min_force: float = 0.5, max_angle: float = 85) -> torch.Tensor:
    """The Panda agent's grasp test for one CPU environment in numpy, [1] bool.

    Both fingers must press on the object with at least ``min_force`` newtons, within ``max_angle`` degrees of their
    opening directions.
    """
    least_impulse = min_force * agent.scene.px.timestep
    return torch.tensor([pressing_fingers(agent, object, least_impulse=least_impulse, max_angle=max_angle)])


def _quaternion_xyz(angles: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of R = Rx(a) Ry(b) Rz(c), angles in radians."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles / 2), np.sin(angles / 2)
    return np.array(
        [
            ca * cb * cc - sa * sb * sc,
            sa * cb * cc + ca * sb * sc,
            ca * sb * cc - sa * cb * sc,
            ca * cb * sc + sa * sb * cc,
        ]
    )
