"""Put the red cube on the blue plate: a template for a robot task. Copy it, rename it, change each part."""

from __future__ import annotations

import sapien
import torch
from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
from mani_skill.utils.building import actors
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

from robot_forgetting.tasks.simulator.expert import OPEN, carry_and_release, grasp, hand, move_to, position

CUBE, PLATE = 0.02, 0.004  # half heights in metres


@register_env("PutOnPlate-v1", max_episode_steps=100)
class PutOnPlateEnv(PickCubeEnv):
    """ManiSkill's PickCube (robot, table, cube) with a plate in place of the goal."""

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        self.plate = actors.build_box(
            self.scene,
            half_sizes=[0.05, 0.05, PLATE],
            color=[0.1, 0.3, 0.9, 1.0],
            name="plate",
            body_type="kinematic",
            initial_pose=sapien.Pose([0, 0, PLATE]),
        )

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        """Initial state. ManiSkill has seeded torch's generator with the episode's seed."""
        super()._initialize_episode(env_idx, options)
        for thing, side, height in ((self.cube, -1, CUBE), (self.plate, 1, PLATE)):
            place = torch.rand((len(env_idx), 3)) * torch.tensor([0.16, 0.05 * side, 0])
            place += torch.tensor([-0.08, 0.05 * side, height])
            thing.set_pose(Pose.create_from_pq(place, torch.tensor([[1.0, 0, 0, 0]]).repeat(len(env_idx), 1)))

    def evaluate(self):
        """Flags, one per environment; `success` is the reward and ends the episode, `fail` would end it too."""
        offset = self.cube.pose.p - self.plate.pose.p
        on_plate = (offset[:, :2].norm(dim=1) < 0.04) & ((offset[:, 2] - CUBE - PLATE).abs() < 0.005)
        is_grasped = self.agent.is_grasping(self.cube)
        still = self.cube.is_static(lin_thresh=1e-2, ang_thresh=0.5)
        return {"on_plate": on_plate, "is_grasped": is_grasped, "success": on_plate & still & ~is_grasped}


def expert(env):
    """The command for the current state, 7 numbers: x, y, z (times 0.1 m), three rotations, gripper (+1 opens).

    A function of the state alone: demonstrations are disturbed on purpose, and it must know the way back.
    """
    place = position(env.plate) + [0, 0, CUBE + PLATE]
    if env.agent.is_grasping(env.cube):
        return carry_and_release(env, env.cube, place, tolerance=0.02)
    offset = position(env.cube) - place
    if abs(offset[2]) < 0.01 and (offset[:2] ** 2).sum() < 0.04**2:  # it lies there: let go and back off
        return move_to(env, hand(env) + [0, 0, 0.03], OPEN)
    return grasp(env, env.cube)
