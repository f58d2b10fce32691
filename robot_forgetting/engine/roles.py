"""Which task plays which role in a run, and in each stage of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robot_forgetting.errors import UserError
from robot_forgetting.stage import Stage
from robot_forgetting.task import Task

Roles = Mapping[str, Sequence[Task]]  # role -> tasks


def assign_roles(sequence: Sequence[Task], prior: Sequence[Task], held_out: Sequence[Task]) -> dict[str, list[Task]]:
    """Role -> tasks, of a whole run. A new task is no longer held out; no task may have two roles otherwise."""
    if not sequence:
        raise UserError("the sequence has no task; name at least one: sequence=[a,b]")
    learned = [task.name for task in sequence]
    for name in learned:
        if learned.count(name) > 1:
            raise UserError(f"task '{name}' stands twice in the sequence; a task can be learned once in a run")
    others = [task for task in held_out if task.name not in learned]
    roles = {"new": list(sequence), "prior": list(prior), "held_out": others}
    names = [task.name for tasks in roles.values() for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task '{name}' has two roles; name it once among task (or sequence), prior and held_out")
    return roles


def roles_in(roles: Roles, stage: int) -> dict[str, list[Task]]:
    """Role -> tasks in a stage of a run; those of the base policy (stage 0) are the first stage's.

    A sequence's earlier tasks are prior ones, its later ones "unseen": learned in this run, but not yet.
    """
    number = max(stage, 1)
    sequence = roles["new"]
    found = {
        "new": [sequence[number - 1]],
        "prior": [*sequence[: number - 1], *roles["prior"]],
        "held_out": list(roles["held_out"]),
    }
    return found | ({"unseen": list(sequence[number:])} if number < len(sequence) else {})


def stages_of(roles: Roles) -> list[Stage]:
    """A run's stages: one for each of its new tasks."""
    found = []
    for number, task in enumerate(roles["new"], start=1):
        past = [other for other in roles_in(roles, number)["prior"] if other.untrainable() is None]
        found.append(Stage(number, task, past))
    return found
