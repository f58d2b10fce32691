"""A scripted expert for the WidowX: pick one object up and put it onto another, by proportional control.

A function of the simulator's current state only (Markov), so that it can label any state a noisy rollout visits.
Commands are metres in the robot's base frame, a rotation vector in radians, and the gripper (+1 opens).
"""

from __future__ import annotations

import numpy as np

from robot_forgetting.tasks.simulator.grasp import pressing_fingers

OPEN, CLOSE = 1.0, -1.0
GAIN = 0.4  # of the way per step; 0.6 overshoots the lagging arm and loses grasps
STEP, TURN = 0.02, 0.2  # at most so many metres and radians per step
HOVER = 0.06  # metres above the point to grip or to put down


def pick_and_place(env, *, grip: tuple[float, float], above: float, rest: float) -> np.ndarray:
    """The command [7] for the current state.

    grip: where to take the source object, x and y in its own frame, metres
    above: height of the fingertips over the source's origin when they close
    rest: height of the source's origin over the target's where it is let go
    """
    source, target = (env.objs[name]._objs[0].pose for name in (env.source_obj_name, env.target_obj_name))
    tip = env.agent.robot.links_map["ee_gripper_link"]._objs[0].entity_pose.p
    turned = source.to_transformation_matrix()[:3, :3]
    handle = source.p + turned @ [*grip, 0.0]
    handle[2] = source.p[2] + above
    place = target.p + [0.0, 0.0, rest]
    offset = place - source.p
    sideways, height = float(np.linalg.norm(offset[:2])), float(-offset[2])
    if pressing_fingers(env.agent, env.objs[env.source_obj_name]):
        if sideways <= 0.01 and height <= 0.006:
            return command(env, np.zeros(3), OPEN)
        wanted = np.clip(3 * (sideways - 0.01), 0.0, HOVER)  # a funnel over the place: the closer, the lower
        across = 0.0 if sideways > 0.03 and height < HOVER - 0.03 else 1.0  # low and far: straight up first
        return command(env, np.array([*(across * offset[:2]), wanted - height]), CLOSE)
    if sideways <= 0.03 and height < 0.012:  # it lies there: back off upwards and stay
        return command(env, np.array([0.0, 0.0, max(0.0, place[2] + above + HOVER - tip[2])]), OPEN)
    away = handle - tip
    turn = finger_turn(env, turned)
    beside = np.linalg.norm(away[:2])
    if beside > 0.012 or abs(turn) > 0.15:
        return command(env, away + [0.0, 0.0, HOVER], OPEN, turn)
    if away[2] < -0.006:
        return command(env, away, OPEN, turn)
    return command(env, away, CLOSE)


def finger_turn(env, turned: np.ndarray) -> float:
    """Radians about the vertical by which the fingers must turn to close across the source's long axis (its x).

    Of the two ways, the one from -45 to 135 degrees, so that it is the same one near a right angle.
    """
    closing = env.agent.finger1_link._objs[0].entity_pose.to_transformation_matrix()[:3, 1]
    angle = np.arctan2(turned[1, 1], turned[0, 1]) - np.arctan2(closing[1], closing[0])
    return float((angle + np.pi / 4) % np.pi - np.pi / 4)


def command(env, way: np.ndarray, gripper: float, turn: float = 0.0) -> np.ndarray:
    """A step along ``way`` [3] (metres, world frame) and about the vertical."""
    step = GAIN * way
    step *= min(1.0, STEP / max(float(np.linalg.norm(step)), 1e-9))
    base = env.agent.robot._objs[0].root_pose.to_transformation_matrix()[:3, :3]
    return np.array([*(base.T @ step), 0.0, 0.0, np.clip(GAIN * turn, -TURN, TURN), gripper])
