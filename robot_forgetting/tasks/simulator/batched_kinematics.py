"""Inverse kinematics of N arms at once, in torch: ManiSkill's batched Newton step, repeated."""

from __future__ import annotations

import torch
from mani_skill.utils.structs import Pose


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
