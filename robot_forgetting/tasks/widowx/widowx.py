"""The WidowX 250S of SimplerEnv's Bridge tasks: the original controller's arithmetic, and friction.

ManiSkill3 names its controller after the original (``arm_pd_ee_target_delta_pose_align2``), but turns by Euler angles
about the target; the original (ManiSkill2_real2sim, ``PDEEPoseController.compute_target_pose``) turns by a rotation
vector about the tool centre point as measured.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.agents.registration import register_agent
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import (
    WidowX250SBridgeDatasetFlatTable,
    WidowX250SBridgeDatasetSink,
)
from mani_skill.utils.geometry.rotation_conversions import (
    axis_angle_to_quaternion,
    quaternion_apply,
    quaternion_multiply,
)
from mani_skill.utils.structs import Pose

from robot_forgetting.tasks.simulator.arms import Arm, BatchedKinematics
from robot_forgetting.tasks.simulator.robots import BatchedController, Controller

FINGER = {"material": "gripper", "patch_radius": 0.01, "min_patch_radius": 0.01}
FRICTION = {  # ManiSkill3 leaves the fingers at its default of 0.3, without torsional friction
    "_materials": {"gripper": {"static_friction": 2.0, "dynamic_friction": 2.0, "restitution": 0.0}},
    "link": {"left_finger_link": FINGER, "right_finger_link": FINGER},
}


@register_agent()
class WidowXFlatTable(WidowX250SBridgeDatasetFlatTable):
    """ManiSkill's robot (meshes, drives, camera) with the original's fingers."""

    uid = "robot_forgetting_widowx_flat_table"
    urdf_config = FRICTION


@register_agent()
class WidowXSink(WidowX250SBridgeDatasetSink):
    """The same for the sink's camera."""

    uid = "robot_forgetting_widowx_sink"
    urdf_config = FRICTION


class EndEffectorController(Controller):
    """The original's controller for one CPU environment.

    With p, q the pose of the tool centre point (TCP) in the robot's base frame, p* and q* the last target, and dp, dR
    the command: p* <- p + dp + dR (p* - p), q* <- dR q*. The arm goes to the joint positions that inverse kinematics
    finds for it, or stays where it is if there are none; the target moves on in both cases.
    """

    def __init__(self, env):
        self._arm = Arm(env, *(env.agent.controller.controllers[key] for key in ("arm", "gripper")))
        # SAPIEN 2 (PhysX 4) clips drive targets to the joints' limits, SAPIEN 3 (PhysX 5) does not.
        limits = self._arm.robot.get_qlimits()
        self._arm_limits, self._finger_limits = limits[self._arm.indices].T, limits[int(self._arm.fingers[0])]
        self.reset()

    def reset(self) -> None:
        self.target = self._arm.robot.root_pose.inv() * self._arm.link.entity_pose

    def apply(self, command: np.ndarray) -> None:
        arm, qpos = self._arm, self._arm.robot.qpos
        arm.model.compute_forward_kinematics(qpos[arm.model_joints])
        measured = sapien.Pose(arm.model.get_link_pose(arm.end).p)
        delta = sapien.Pose(command[:3], quaternion(command[3:6]))
        self.target = measured * delta * measured.inv() * self.target
        arm.drive(np.clip(arm.solve(self.target, qpos), *self._arm_limits), command[6], self._finger_limits)


class BatchedEndEffectorController(BatchedController):
    """The same arithmetic for N environments at once, each with its own target."""

    def __init__(self, env):
        self._arm, self._gripper = (env.agent.controller.controllers[key] for key in ("arm", "gripper"))
        self._kinematics = BatchedKinematics(self._arm, iterations=10, unsolved=0.005, longest=0.3, enough=1e-4)
        limits = env.agent.robot.qlimits  # [N, joints, 2]
        self._arm_limits = limits[:, self._arm.active_joint_indices].unbind(-1)
        self._finger_limits = limits[:, self._gripper.active_joint_indices].unbind(-1)
        self.target = self._arm.ee_pose_at_base.raw_pose.clone()  # [N, 7], as ManiSkill's poses

    def begin(self, slots: torch.Tensor) -> None:
        self.target[slots] = self._arm.ee_pose_at_base.raw_pose[slots]

    def apply(self, commands: torch.Tensor) -> None:
        arm, gripper = self._arm, self._gripper
        start = arm.articulation.get_qpos()
        target = moved(self.target, self._kinematics.tip(start)[:, :3, 3], commands[:, :6])
        sound = target.isfinite().all(dim=1, keepdim=True)  # a turn of 1e30 radians has no quaternion in float32
        self.target = torch.where(sound, target, self.target)
        joints = self._kinematics.solve(Pose.create(self.target), start)
        arm.set_drive_targets(joints.clamp(*self._arm_limits))
        low, high = gripper.config.lower, gripper.config.upper
        width = low + (commands[:, 6:].clamp(-1, 1) + 1) / 2 * (high - low)
        gripper.set_drive_targets(width.clamp(*self._finger_limits))


def moved(target: torch.Tensor, measured: torch.Tensor, commands: torch.Tensor) -> torch.Tensor:
    """Targets [N, 7] (position, quaternion) after commands [N, 6], with the measured positions [N, 3]."""
    turn = axis_angle_to_quaternion(commands[:, 3:])
    place = measured + commands[:, :3] + quaternion_apply(turn, target[:, :3] - measured)
    return torch.cat([place, quaternion_multiply(turn, target[:, 3:])], dim=1)


class StockController(Controller):
    """ManiSkill's own controller, whichever the environment has."""

    def __init__(self, env):
        self._agent = env.agent
        self.before_simulation_step = env.agent.before_simulation_step

    def apply(self, command: np.ndarray) -> None:
        self._agent.set_action(torch.from_numpy(command.astype(np.float32))[None])


def quaternion(rotation_vector: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of a rotation vector in radians."""
    angle = float(np.linalg.norm(rotation_vector))
    half_sinc = 0.5 * np.sinc(angle / 2 / np.pi)  # sin(angle / 2) / angle
    return np.array([np.cos(angle / 2), *(half_sinc * np.asarray(rotation_vector))])
