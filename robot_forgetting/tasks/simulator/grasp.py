"""What touches an object, and whether the fingers hold it, from the contacts of the last physics step."""

from __future__ import annotations

import numpy as np
import torch

TOUCH = 1e-6  # newton seconds; a lesser impulse is no contact
LEANING = 60  # degrees off a finger's opening direction, at most, in which SimplerEnv's WidowX presses


def contacts(scene, entity) -> list[tuple]:
    """(the other's entity, its impulse on ``entity`` [3] in newton seconds) of all that touches it."""
    found = []
    for contact in scene.px.get_contacts():
        first, second = (body.entity for body in contact.bodies)
        if entity in (first, second):
            impulse = np.sum([point.impulse for point in contact.points], axis=0)
            found.append((second, -impulse) if first == entity else (first, impulse))
    return found


def presses(link, side: float, touching: list[tuple], least_impulse: float, max_angle: float) -> bool:
    """Whether a finger's link presses what ``touching`` (see ``contacts``) is about: by at least ``least_impulse``,
    within ``max_angle`` degrees of the link's y axis times ``side``."""
    finger = link._objs[0].entity
    pushes = [impulse for other, impulse in touching if other == finger]
    push = np.sum(pushes, axis=0) if pushes else np.zeros(3)
    size = float(np.linalg.norm(push))
    opening = finger.pose.to_transformation_matrix()[:3, 1] * side
    return bool(size >= least_impulse and opening @ push >= np.cos(np.deg2rad(max_angle)) * size)


def pressing_fingers(agent, actor, *, least_impulse: float = TOUCH, max_angle: float = LEANING) -> bool:
    """Whether both fingers of a Panda or a WidowX press the object; the defaults are those of SimplerEnv's WidowX."""
    touching = contacts(agent.scene, actor._bodies[0].entity)
    return all(
        presses(link, side, touching, least_impulse, max_angle)
        for link, side in ((agent.finger1_link, 1.0), (agent.finger2_link, -1.0))
    )


def pressing_fingers_batched(agent, actor) -> torch.Tensor:
    """``pressing_fingers`` of SimplerEnv's WidowX in N environments, [N] bool, on the CPU or the GPU."""
    one, other = (
        presses_batched(agent.scene, [link], side, actor, TOUCH, LEANING)
        for link, side in ((agent.finger1_link, 1.0), (agent.finger2_link, -1.0))
    )
    return one & other


def presses_batched(scene, links, side: float, actor, least_impulse: float, max_angle: float) -> torch.Tensor:
    """Whether one of a finger's links ``presses`` an actor in N environments, [N] bool, on the CPU or the GPU."""
    pressing = []
    for link in links:
        push = scene.get_pairwise_contact_impulses(link, actor)
        size = push.norm(dim=1)
        opening = link.pose.to_transformation_matrix()[:, :3, 1] * side
        leans = (opening * push).sum(dim=1) < np.cos(np.deg2rad(max_angle)) * size
        pressing.append((size >= least_impulse) & ~leans)
    return torch.stack(pressing).any(dim=0)
