"""Whether a gripper of two fingers holds an object, from the contacts of the last physics step; in numpy."""

from __future__ import annotations

import numpy as np


def pressing_fingers(agent, actor, *, least_impulse: float = 1e-6, max_angle: float = 60) -> bool:
    """Both fingers press the object by at least ``least_impulse`` (newton seconds of the last physics step), within
    ``max_angle`` degrees of their opening directions; the defaults are those of SimplerEnv's WidowX."""
    entity = actor._bodies[0].entity
    pushes: dict[str, np.ndarray] = {}
    for contact in agent.scene.px.get_contacts():
        first, second = contact.bodies[0].entity, contact.bodies[1].entity
        if entity not in (first, second):
            continue
        finger, sign = (first, 1.0) if second == entity else (second, -1.0)
        impulse = np.sum([point.impulse for point in contact.points], axis=0) * sign
        pushes[finger.name] = pushes.get(finger.name, 0.0) + impulse
    for link, side in ((agent.finger1_link, 1.0), (agent.finger2_link, -1.0)):
        finger = link._objs[0].entity
        push = pushes.get(finger.name)
        if push is None:
            return False
        size = float(np.linalg.norm(push))
        opening = finger.pose.to_transformation_matrix()[:3, 1] * side
        if size < least_impulse or opening @ push < np.cos(np.deg2rad(max_angle)) * size:
            return False
    return True
