"""Stack the red cube on the green one: ManiSkill's StackCube, with a smaller spawn range on request."""

from __future__ import annotations

import torch
from mani_skill.envs.tasks.tabletop.stack_cube import StackCubeEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

from robot_forgetting.errors import check_choice
from robot_forgetting.tasks.simulator.expert import OPEN, carry_and_release, grasp, hand, move_to, position

HALF_RANGE = 0.1
CLEAR = 0.07  # metres between the centres


@register_env("RobotForgetting-StackCube-v1", max_episode_steps=100)
class StackCubeNearEnv(StackCubeEnv):
    """spawn: "stock" (ManiSkill's ranges, rotated) or "near" (both within 0.1 m of the origin, unrotated)."""

    def __init__(self, *args, spawn: str = "stock", robot_uids: str = "panda", **kwargs):
        check_choice("spawn", spawn, ("stock", "near"))
        self.spawn = spawn
        super().__init__(*args, robot_uids=robot_uids, **kwargs)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        super()._initialize_episode(env_idx, options)
        if self.spawn == "near":
            count = len(env_idx)
            first = (torch.rand((count, 2)) * 2 - 1) * HALF_RANGE
            second = (torch.rand((count, 2)) * 2 - 1) * HALF_RANGE
            while (close := (first - second).norm(dim=1) < CLEAR).any():
                second[close] = (torch.rand((int(close.sum()), 2)) * 2 - 1) * HALF_RANGE
            height, upright = torch.full((count, 1), 0.02), torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
            self.cubeA.set_pose(Pose.create_from_pq(torch.cat([first, height], dim=1), upright))
            self.cubeB.set_pose(Pose.create_from_pq(torch.cat([second, height], dim=1), upright))


def expert(env):
    """Grasp the red cube, carry it above the green one, lower it, let go and back off upwards."""
    place = position(env.cubeB) + [0, 0, 0.04]
    if env.agent.is_grasping(env.cubeA):
        return carry_and_release(env, env.cubeA, place, tolerance=0.015)
    offset = position(env.cubeA) - place
    if abs(offset[2]) < 0.01 and (offset[:2] ** 2).sum() < 0.03**2:
        return move_to(env, hand(env) + [0, 0, 0.03], OPEN)
    return grasp(env, env.cubeA)
