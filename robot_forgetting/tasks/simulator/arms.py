"""Inverse kinematics: of one arm by SAPIEN, and of N at once in torch by ManiSkill's batched Newton step, repeated."""

from __future__ import annotations

import numpy as np
import torch
from mani_skill.utils.structs import Pose


class Arm:
    """An arm with a gripper in one CPU environment.

    arm, gripper: ManiSkill's controllers of them; robot, link: SAPIEN's articulation and the tool centre point's link
    """

    def __init__(self, env, arm, gripper):
        self.robot, self.link = env.agent.robot._objs[0], arm.ee_link._objs[0]
        joints = self.robot.active_joints
        self.indices, self.fingers = (np.asarray(one.active_joint_indices) for one in (arm, gripper))
        self._joints, self._finger_joints = ([joints[int(i)] for i in some] for some in (self.indices, self.fingers))
        self._low, self._high = float(gripper.config.lower), float(gripper.config.upper)
        self._kinematics, self.model = arm.kinematics, arm.kinematics.pmodel
        self.end = arm.kinematics.end_link_idx
        self.model_joints = np.asarray(arm.kinematics.pmodel_active_joint_indices)
        self._controlled = np.asarray(arm.kinematics.pmodel_controlled_joint_indices)

    def solve(self, target, qpos: np.ndarray) -> np.ndarray:
        """The arm's joint positions for a pose of SAPIEN's in the base frame; where it stands if there are none."""
        solution, solved, _ = self.model.compute_inverse_kinematics(
            self.end,
            target,
            initial_qpos=qpos[self.model_joints],
            active_qmask=self._kinematics.qmask,
            max_iterations=100,
        )
        return solution[self._controlled] if solved else qpos[self.indices]

    def drive(self, positions: np.ndarray, gripper: float, limits: tuple[float, float] = (-np.inf, np.inf)) -> None:
        """gripper: from -1 to 1, the lower and the upper end of its controller's range; limits: of a finger's joint"""
        for joint, value in zip(self._joints, positions, strict=True):
            joint.set_drive_target(value)
        width = self._low + (np.clip(gripper, -1, 1) + 1) / 2 * (self._high - self._low)
        for joint in self._finger_joints:
            joint.set_drive_target(np.clip(width, *limits))


class BatchedKinematics:
    """Joint positions for poses of the tool centre point.

    arm: ManiSkill's controller of the arm
    iterations: Newton steps, at most; far from the target a full one overshoots
    longest, enough: radians of a joint in one step, at most, and under which no other follows
    unsolved: metres off its target, from which on a place counts as one that cannot be reached
    """

    def __init__(self, arm, *, iterations: int, unsolved: float, longest: float | None = None, enough: float = 0.0):
        self._kinematics, self._arm = arm.kinematics, arm.active_joint_indices
        self._iterations, self._unsolved, self._longest, self._enough = iterations, unsolved, longest, enough
        if not self._kinematics.use_gpu_ik:  # a CPU environment
            self._kinematics._setup_gpu()

    def tip(self, joints: torch.Tensor) -> torch.Tensor:
        """The tool centre point's pose [N, 4, 4] in the base frame, for all joints' positions [N, J]."""
        chain = joints[:, self._kinematics.active_ancestor_joint_idxs]
        return self._kinematics.pk_chain.forward_kinematics(chain).get_matrix()

    def solve(self, target: Pose, start: torch.Tensor) -> torch.Tensor:
        """The arms' joint positions [N, A] for the targets, near ``start`` [N, J], or those of ``start``."""
        joints = start.clone()
        for _ in range(self._iterations):
            step = self._kinematics.compute_ik(target, joints) - joints[:, self._arm]
            joints[:, self._arm] += step if self._longest is None else step.clamp(-self._longest, self._longest)
            if self._enough and step.abs().max() < self._enough:
                break
        off = (self.tip(joints)[:, :3, 3] - target.p).norm(dim=1, keepdim=True)
        return torch.where(off < self._unsolved, joints, start)[:, self._arm]
