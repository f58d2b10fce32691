"""One task in a sequence of tasks that a policy learns one after the other; a single task is a sequence of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robot_forgetting.task import Task


@dataclass(frozen=True)
class Stage:
    """The training of one task. Stage 0 is the base policy, which has none.

    number: 1 .. T; task: what is learned; past: tasks seen before that can be trained on, those of earlier stages
    first, then the prior ones
    ``begin(policy, task, past)`` of a method is given these one by one, no Stage, on purpose: methods that users wrote
    for one task learn sequences as they are.
    """

    number: int
    task: Task
    past: Sequence[Task] = ()
