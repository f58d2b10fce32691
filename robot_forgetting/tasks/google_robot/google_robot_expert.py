"""Scripted experts for the Google robot, by proportional control: functions of the simulator's state only (Markov).

Commands are metres and a rotation vector (radians) in the robot's base frame, and the gripper (+1 closes).
"""

from __future__ import annotations

import numpy as np

CLOSE, OPEN, KEEP = 1.0, -1.0, 0.0
GAIN = 0.5  # of the way per step
STEP, TURN = 0.08, 0.3  # at most so many metres and radians per step
HOVER = 0.08  # metres over the place of the grasp
LIFT = 0.12  # metres
PALM, FLOOR = 0.05, 0.012  # metres of the tool centre point under an object's top, at most, and over the table
CARRY = 0.04  # metres over the table
BESIDE = 0.16  # metres between the middles of two objects that then are near each other
FLAT = ("baked_sponge_v2",)
NECKS = {"blue_plastic_bottle": 0.013}  # metres deeper, where there is a neck to slip from
BEFORE, PUSH = 0.12, 0.10  # metres of the tool centre point before a drawer's front, and beyond it while it pushes
REACH = 0.5  # radians by which the hand points away from the robot then, to get farther
EDGE = np.array([-0.0075, 0.0, 0.07])  # metres from the middle of a drawer's front to that of its upper edge
WIDE = 0.2  # metres to either side of the cabinet's middle, at most, where the hand pulls
OVER, UNDER = 0.04, 0.016  # metres over the edge at which the hand goes in, and under which it rests on the edge
FAR, ENOUGH = 1.1, 0.18  # radians by which the hand then leans; metres to which a drawer is pulled open
BOARD = np.array([0.02, 0.882])  # x of the cabinet's front edge in the world, z of its top
APPLE = 0.036  # metres of its middle over what it lies on
REST = 0.17  # metres over the cabinet's top where the hand waits
RAISED, LOWERED = 0.05, 0.08  # metres by which the apple is lifted, and under the cabinet's top where it is let go
WRIST = 1.70  # radians; the joint ends at 1.79, where inverse kinematics goes astray


def pick_can(env) -> np.ndarray:
    """Over the can with the hand pointing down and the fingers across it, down, close, up."""
    can = env.can._objs[0].pose
    hand = env.agent.tcp._objs[0].entity_pose
    frame = hand.to_transformation_matrix()[:3, :3]
    axis = can.to_transformation_matrix()[:3, 1]  # the can's own
    lying = abs(axis[2]) < 0.7
    grip = np.array([*can.p[:2], can.p[2] + (-0.005 if lying else 0.01)])
    across = np.array([-axis[1], axis[0], 0.0]) if lying else np.array([*frame[:2, 1], 0.0])
    turn = _turn_to(frame, across, _lean(env, frame))
    away = grip - hand.p
    held = bool(env.pressed(env.can)[0])
    risen = can.p[2] - float(env.height[0])
    if held and (env.held[0] >= 2 or risen > 0.005):  # the fingers have come to rest on it
        return command(env, np.array([0.0, 0.0, max(0.0, LIFT - risen)]), turn, KEEP)
    return _grasp(env, held, away, turn, away + [0.0, 0.0, HOVER], np.inf)


def move_near(env) -> np.ndarray:
    """Over the source, down, close; lift, carry it straight towards the target, down, open, up."""
    thing, target = env.objs[env.source_obj_name]._bodies[0], env.objs[env.target_obj_name]._bodies[0]
    hand, at = env.agent.tcp._objs[0].entity_pose, np.asarray(thing.entity_pose.p, dtype=np.float64)
    frame = hand.to_transformation_matrix()[:3, :3]
    turned = thing.entity_pose.to_transformation_matrix()[:3, :3]
    top = _top(env, env.source_obj_name) - at[2]
    grip = np.array([*at[:2], at[2] + max(top - PALM - NECKS.get(env.source_obj_name, 0.0), FLOOR - top)])
    narrow = turned[:, 0]  # across this axis of its own a sponge is narrow; the others are round
    across = np.array([*(narrow if env.source_obj_name in FLAT else frame[:, 1])[:2], 0.0])
    turn = _turn_to(frame, across, _lean(env, frame))
    held = bool(env.pressed(env.objs[env.source_obj_name])[0])
    risen = at[2] - env.start(env.source_obj_name)[2]
    way = np.asarray(target.entity_pose.p, dtype=np.float64)[:2] - at[:2]
    left = float(np.linalg.norm(way)) - BESIDE  # metres still to carry it
    clear = max(_top(env, name) for name in env.shown) + HOVER - PALM  # here the hand passes over all of them
    if not held and left < 0.02:  # it stands there
        up = max(0.0, clear + HOVER - hand.p[2])
        return command(env, np.array([0.0, 0.0, up]), np.zeros(3), _open(env))
    if held and (env.held[0] >= 2 or risen > 0.005):
        if left < 0.01 and risen < 0.004:
            return command(env, np.zeros(3), np.zeros(3), OPEN)
        high = float(np.clip(2 * left - 0.02, 0.0, CARRY))
        along = way / np.linalg.norm(way) * left * (risen > min(0.6 * CARRY, high) - 0.005)
        return command(env, np.array([*along, high - risen]), turn, KEEP)
    away = grip - hand.p
    return _grasp(env, held, away, turn, np.array([*away[:2], clear - hand.p[2]]))


def close_drawer(env) -> np.ndarray:
    """The fist before the drawer's front, then against it."""
    frame = env.agent.tcp._objs[0].entity_pose.to_transformation_matrix()
    lean = max(_lean(env, frame[:3, :3]), REACH)
    turn = _turn_to(frame[:3, :3], np.array([*frame[:2, 1], 0.0]), lean)
    way = env.front() - frame[:3, 3]
    if np.linalg.norm(way[1:]) > 0.05:  # not yet before the middle of the front
        return command(env, way + [BEFORE, 0.0, 0.0], turn, CLOSE)
    if env.opening() < 0.01:
        return command(env, np.zeros(3), np.zeros(3), CLOSE)
    return command(env, way - [PUSH, 0.0, 0.0], turn, CLOSE)


def open_drawer(env) -> np.ndarray:
    """The fist, leaning far, through the gap over the drawer's front; down onto the front's upper edge, and back.

    The handles have no collision shape; what pulls is friction on the edge.
    """
    frame = env.agent.tcp._objs[0].entity_pose.to_transformation_matrix()
    lean = max(_lean(env, frame[:3, :3]), FAR)
    turn = _turn_to(frame[:3, :3], np.array([1.0, 0.0, 0.0]), lean)
    base = env.agent.robot._objs[0].root_pose.p
    edge = env.front() + EDGE + [0.0, np.clip(base[1], -WIDE, WIDE), 0.0]
    x, y, z = frame[:3, 3] - edge
    if env.opening() > ENOUGH:
        return command(env, np.zeros(3), np.zeros(3), CLOSE)
    if x < -0.012 and z < UNDER:  # on it
        return command(env, np.array([0.1, -y, -0.04]), turn, CLOSE)
    if x < -0.03 and z < OVER + 0.02:
        return command(env, np.array([0.0, -y, -0.04]), turn, CLOSE)
    if abs(y) < 0.05 and 0.014 < z < OVER + 0.02 and x < BEFORE and np.linalg.norm(turn) < 0.2:
        return command(env, np.array([-0.06 - x, -y, 2 * (OVER - z)]), turn, CLOSE)  # it sags on its way
    return command(env, np.array([BEFORE - 0.02 - x, -y, OVER - z]), turn, CLOSE)


def place_in_drawer(env) -> np.ndarray:
    """Opens the drawer as ``open_drawer`` does and waits over it; once told to place the apple, over that, down, close;
    lift it, carry it over the open drawer, down a little, open, up."""
    apple, hand = env.apple._bodies[0], env.agent.tcp._objs[0].entity_pose
    at, frame = np.asarray(apple.entity_pose.p, dtype=np.float64), hand.to_transformation_matrix()[:3, :3]
    held = bool(env.pressed(env.apple)[0])
    fallen = at[2] < BOARD[1] and not held
    if not (held or fallen) and env.opening() < (0.1 if env.placing[0] else ENOUGH):
        return open_drawer(env)
    mouth = (BOARD[0] + env.front()[0] - 0.0375) / 2  # x of its middle: the drawer's front wall is as thick
    rest = np.array([mouth, at[1], BOARD[1] + REST])
    turn = _turn_to(frame, np.array([0.0, 1.0, 0.0]), _lean(env, frame))
    if fallen or not env.placing[0]:
        if rest[2] - hand.p[2] > 0.05:  # out of the drawer first
            return command(env, np.array([0.0, 0.0, rest[2] - hand.p[2]]), np.zeros(3), KEEP if held else _open(env))
        return command(env, rest - hand.p, turn, _open(env))
    if held and (env.held[0] >= 2 or at[2] > BOARD[1] + APPLE + 0.005):
        left, risen = mouth - at[0], at[2] - APPLE - BOARD[1]
        if abs(left) > 0.02:
            return command(env, np.array([left * (risen > RAISED - 0.03), 0.0, RAISED - risen]), turn, KEEP)
        if risen < 0.02 - LOWERED:
            return command(env, np.zeros(3), np.zeros(3), OPEN)
        return command(env, np.array([left, 0.0, -LOWERED - risen]), turn, KEEP)
    away = at + [0.0, 0.0, APPLE - PALM] - hand.p
    up = at[2] + APPLE + HOVER - PALM - hand.p[2]
    return _grasp(env, held, away, turn, np.array([*away[:2] * (up < 0.05), up]))


def _grasp(env, held: bool, away: np.ndarray, turn: np.ndarray, over: np.ndarray, aside: float = 0.05) -> np.ndarray:
    """Over the place of the grasp with the gripper open, down, close.

    away, over: the way [3] to that place and to where the hand waits over it; turn: what it still has to turn
    aside: metres to the side of the place from which on it always goes over it first
    """
    beside = np.linalg.norm(away[:2])
    if held or (beside < 0.02 and abs(away[2]) < 0.01):
        return command(env, np.zeros(3), np.zeros(3), CLOSE)
    not_yet = away[2] < -HOVER / 2 and (beside > 0.015 or np.linalg.norm(turn) > 0.12)
    return command(env, over if not_yet or beside > aside else away, turn, _open(env))


def _top(env, name: str) -> float:
    """World height of an object's top."""
    pose = env.objs[name]._bodies[0].entity_pose
    return float(pose.p[2] + np.abs(pose.to_transformation_matrix()[2, :3]) @ env.sizes[name] / 2)


def _open(env) -> float:
    return OPEN if env.agent.robot.qpos[0, env.fingers].mean() > 0.05 else KEEP


def _lean(env, frame: np.ndarray) -> float:
    """Radians by which the hand should point away from the robot, and not straight down, to spare its wrist."""
    wrist = float(env.agent.robot.qpos[0, env.wrist])
    forwards = _base(env)[:, 0]  # the robot faces -x of the world
    now = np.arctan2(frame[:, 2] @ forwards, -frame[2, 2])
    return float(np.clip(now + wrist - WRIST, 0.0, 0.6))


def _turn_to(frame: np.ndarray, across: np.ndarray, lean: float) -> np.ndarray:
    """Rotation vector [3] that points the hand's z down and its y (along which it closes) along ``across``, either way
    round."""
    from scipy.spatial.transform import Rotation

    closing = across / np.linalg.norm(across)
    closing = closing if closing @ frame[:, 1] >= 0 else -closing
    down = np.array([0.0, 0.0, -1.0])
    wanted = np.stack([np.cross(closing, down), closing, down], axis=1)
    wanted = Rotation.from_rotvec([0.0, lean, 0.0]).as_matrix() @ wanted
    return Rotation.from_matrix(wanted @ frame.T).as_rotvec()


def command(env, way: np.ndarray, turn: np.ndarray, gripper: float) -> np.ndarray:
    """A step along ``way`` [3] (metres) and about ``turn`` [3] (radians), both in the world."""
    step, angle = GAIN * np.asarray(way), GAIN * np.asarray(turn)
    step = step * min(1.0, STEP / max(float(np.linalg.norm(step)), 1e-9))
    angle = angle * min(1.0, TURN / max(float(np.linalg.norm(angle)), 1e-9))
    base = _base(env)
    return np.array([*(base.T @ step), *(base.T @ angle), gripper])


def _base(env) -> np.ndarray:
    """The base frame's axes [3, 3] in the world."""
    return env.agent.robot._objs[0].root_pose.to_transformation_matrix()[:3, :3]
