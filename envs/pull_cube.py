"""Pull a cube towards the robot onto the target: ManiSkill's PullCube as it is."""

from __future__ import annotations

import numpy as np

from robot_forgetting.tasks.simulator.expert import CLOSE, hand, move_to, position


def expert(env):
    """Reach over the cube with closed fingers, lower behind it, then pull along -x."""
    cube, tip = position(env.obj), hand(env)
    beyond = cube + [0.055, 0, 0]
    if tip[0] > cube[0] + 0.02 and abs(tip[1] - cube[1]) < 0.015 and tip[2] < cube[2] + 0.02:
        return move_to(env, [tip[0] - 0.1, cube[1], cube[2]], CLOSE)
    if np.linalg.norm(tip[:2] - beyond[:2]) > 0.02:
        return move_to(env, [*beyond[:2], cube[2] + 0.08], CLOSE)
    return move_to(env, beyond, CLOSE)
