"""Push a cube away from the robot onto the target: ManiSkill's PushCube as it is."""

from __future__ import annotations

import numpy as np

from robot_forgetting.tasks.simulator.expert import CLOSE, hand, move_to, position


def expert(env):
    """Go behind the cube with closed fingers, then push along +x."""
    cube, tip = position(env.obj), hand(env)
    behind = cube - [0.055, 0, 0]
    if tip[0] < cube[0] - 0.02 and abs(tip[1] - cube[1]) < 0.015 and tip[2] < cube[2] + 0.02:
        return move_to(env, [tip[0] + 0.1, cube[1], cube[2]], CLOSE)
    if np.linalg.norm(tip[:2] - behind[:2]) > 0.02:
        # Travel above the cube's height until behind it.
        return move_to(env, [*behind[:2], cube[2] + 0.06], CLOSE)
    return move_to(env, behind, CLOSE)
