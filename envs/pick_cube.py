"""Pick up a cube and hold it at the green ball: ManiSkill's PickCube with the goal visible to the policy's camera."""

from __future__ import annotations

import torch
from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

from robot_forgetting.errors import check_choice
from robot_forgetting.tasks.simulator.expert import CLOSE, grasp, hand, move_to, position


@register_env("RobotForgetting-PickCube-v1", max_episode_steps=100)
class PickCubeVisibleEnv(PickCubeEnv):
    """spawn: "stock" (ManiSkill's ranges) or "near" (cube unrotated, goal at a fixed height of 0.12 m)."""

    def __init__(self, *args, spawn: str = "stock", **kwargs):
        check_choice("spawn", spawn, ("stock", "near"))
        self.spawn = spawn
        super().__init__(*args, **kwargs)

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        self._hidden_objects.remove(self.goal_site)  # an image policy has to see where to go

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        super()._initialize_episode(env_idx, options)
        if self.spawn == "near":
            self.cube.set_pose(Pose.create_from_pq(self.cube.pose.p[env_idx], torch.tensor([[1.0, 0, 0, 0]])))
            goal = self.goal_site.pose.p[env_idx]
            goal[:, 2] = 0.12
            self.goal_site.set_pose(Pose.create_from_pq(goal))


def expert(env):
    """Grasp the cube, then carry it to the goal."""
    if env.agent.is_grasping(env.cube):
        return move_to(env, hand(env) + position(env.goal_site) - position(env.cube), CLOSE)
    return grasp(env, env.cube)
