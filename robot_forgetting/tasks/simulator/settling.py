"""How SimplerEnv's objects come to rest before an episode begins."""

from __future__ import annotations

import numpy as np
import sapien


def drop(env, starts: list[tuple], height: float) -> None:
    """Objects fall with their tilt locked, then settle; whoever calls has put the robot out of the way.

    starts: (rigid body, place [2] in metres, quaternion); height: over the world's floor, metres
    """
    bodies = [body for body, _, _ in starts]
    for body, place, turn in starts:
        _still(body, sapien.Pose([*place, height], turn))
        body.set_locked_motion_axes([False, False, False, True, True, False])
    _run(env, 0.5)
    for body in bodies:
        body.set_locked_motion_axes([False] * 6)
        _still(body, body.entity_pose)
    _run(env, 0.5)
    moving = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
    turning = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
    if moving > 1e-3 or turning > 1e-2:
        _run(env, 1.5)


def _still(body, pose) -> None:
    body.entity.set_pose(pose)
    body.set_linear_velocity(np.zeros(3))
    body.set_angular_velocity(np.zeros(3))


def _run(env, seconds: float) -> None:
    for _ in range(int(env.sim_freq * seconds)):
        env.scene.step()
