"""Put the ball into the small bin: ManiSkill's PlaceSphere as it is."""

from __future__ import annotations

from robot_forgetting.tasks.simulator.expert import OPEN, carry_and_release, grasp, hand, move_to, position


def expert(env):
    """Grasp the ball, carry it above the bin, lower it and let go."""
    place = position(env.bin) + [0, 0, env.radius + env.block_half_size[0]]
    if env.agent.is_grasping(env.obj):
        return carry_and_release(env, env.obj, place, tolerance=0.004)
    offset = position(env.obj) - place
    if (offset[:2] ** 2).sum() < 0.02**2:
        return move_to(env, hand(env) + [0, 0, 0.03], OPEN)
    return grasp(env, env.obj)
