"""ManiSkill environments and experts with one thing wrong each; imported as a user's own module would be."""

from __future__ import annotations

import numpy as np
import torch
from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
from mani_skill.utils.registration import register_env

from robot_forgetting.tasks.simulator.expert import grasp


@register_env("Faulty-PickCube-v1", max_episode_steps=100)
class FaultyPickCubeEnv(PickCubeEnv):
    """fault: what is wrong; "": it tells of success alone, not of `is_grasped`, which its parent's observations ask."""

    def __init__(self, *args, fault: str = "", **kwargs):
        self.fault = fault
        if fault == "constructor":
            raise RuntimeError("no such gripper")
        super().__init__(*args, **kwargs)

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        if self.fault == "type":
            len(5)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        super()._initialize_episode(env_idx, options)
        if self.fault == "state":
            self.no_such_thing.set_pose(None)

    def evaluate(self):
        if self.fault == "raises":
            return {"success": self.cube.pose.p[:, 7] > 0}
        success = self.cube.pose.p[:, 2] > 0.1
        return {
            "no success": {"lifted": success},
            "plain": {"success": bool(success[0])},
            "list": [success],
        }.get(self.fault, {"success": success})


def expert(env):
    return grasp(env, env.cube)


def blind_expert(env):
    return grasp(env, env.ball)


def short_expert(env):
    return np.zeros(3)
