"""Building blocks for scripted experts: functions of the simulator's current state only (Markov), so that they can
label any state a noisy rollout visits."""

from __future__ import annotations

import numpy as np

OPEN, CLOSE = 1.0, -1.0
METRES_PER_UNIT = 0.1  # of a command's first three numbers
FAR = 0.016  # metres; beyond it the hand is not "at" a point


def position(thing) -> np.ndarray:
    """World position [3] of an actor, a link or a pose, in metres."""
    pose = getattr(thing, "pose", thing)
    return pose.p[0].numpy().astype(np.float64)


def hand(env) -> np.ndarray:
    """World position [3] of the tool centre point."""
    return np.asarray(env.agent.tcp._objs[0].entity_pose.p, dtype=np.float64)


def move_to(env, target, gripper: float, *, gain: float = 0.8, limit: float = 0.5) -> np.ndarray:
    """Proportional command towards ``target`` [3] (metres), at most ``limit`` (of 0.1 m) per axis and step."""
    step = np.clip(gain * (np.asarray(target) - hand(env)) / METRES_PER_UNIT, -limit, limit)
    return np.array([*step, 0.0, 0.0, 0.0, gripper])


def grasp(env, thing, *, hover: float = 0.06) -> np.ndarray:
    """Goes above an object, descends, closes. The caller checks whether the object is already held."""
    centre = position(thing)
    offset = centre - hand(env)
    sideways = np.linalg.norm(offset[:2])
    if sideways > FAR and -offset[2] < hover - 0.02:  # low and beside it: up first, so that nothing is knocked over
        return move_to(env, [*hand(env)[:2] + offset[:2] * 0.5, centre[2] + hover], OPEN)
    if sideways > FAR:
        return move_to(env, [*centre[:2], centre[2] + hover], OPEN)
    if abs(offset[2]) > 0.012:
        return move_to(env, centre, OPEN)
    return move_to(env, centre, CLOSE)


def carry_and_release(env, thing, place, *, clearance: float = 0.05, tolerance: float = 0.008) -> np.ndarray:
    """Lifts a held object, carries it above ``place`` (where its centre shall rest), lowers it and lets go.

    The height is a funnel over the place: the closer sideways, the lower. A rule with a threshold instead (down when
    aligned, up when not) makes a policy that cannot see the threshold bob up and down over it for ever.
    """
    offset = np.asarray(place) - position(thing)
    sideways, height = np.linalg.norm(offset[:2]), -offset[2]
    if sideways <= tolerance and height <= 0.004:
        return move_to(env, hand(env), OPEN)
    wanted = np.clip(3 * (sideways - tolerance), 0.0, clearance)
    travel = 0.0 if sideways > 0.03 and height < clearance - 0.02 else 1.0  # low and far: straight up first
    step = np.array([*(offset[:2] * travel), wanted - height])
    return move_to(env, hand(env) + step, CLOSE, limit=0.5 if sideways > 0.03 else 0.3)
