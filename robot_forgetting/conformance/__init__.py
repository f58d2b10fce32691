"""`robot-forgetting check`: what is wrong with a task, method, penalty, measure or policy, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from robot_forgetting.conformance.check_table import Table
from robot_forgetting.errors import UserError
from robot_forgetting.measure import Measure
from robot_forgetting.method import Method, Penalty
from robot_forgetting.policy import Policy
from robot_forgetting.task import Task


def check(
    policy: Policy | None = None,
    task: Task | None = None,
    method: Method | None = None,
    penalty: Penalty | None = None,
    measure: Measure | None = None,
    golden: Path | None = None,
    recordings: str | None = None,
    output: Path | None = None,
    episodes: int | None = None,
) -> int:
    """Checks whatever is given, one printed line per check; returns 0, or 2 where one failed.

    golden: a folder of reference tensors; OpenVLA's arithmetic is then compared with them, and no policy is checked
    recordings: a folder of recorded episodes of the original simulator; the task is then compared with them, and
        nothing else of it is checked
    output: a png file for the initial states of a task
    episodes: initial states of the evaluation on which a task's expert is run too
    A method or penalty is tried on the given task, or on a toy task that needs no simulator; and on a tiny policy of
    tokens, or on the given one where that has none. A measure: on the given policy and what the given task shows, or on
    the tiny one.
    """
    if not any((policy, task, method, penalty, measure, golden, recordings)):
        names = "task=NAME, method=NAME, penalty=NAME, measure=NAME, policy=NAME"
        raise UserError(f"name what to check: {names}, or golden=FOLDER")
    from robot_forgetting.conformance.measure_checks import check_measure
    from robot_forgetting.conformance.method_checks import check_method, check_penalty
    from robot_forgetting.conformance.policy_checks import check_golden_tensors, check_policy
    from robot_forgetting.conformance.recordings import check_recordings
    from robot_forgetting.conformance.task_checks import check_task

    table = Table()
    if golden is not None:
        check_golden_tensors(table, golden)
    if recordings is not None:
        if task is None:
            raise UserError("recordings= needs the task that they are of: task=NAME")
        check_recordings(table, task, Path(recordings))
        return table.finish()
    if policy is not None:
        check_policy(table, policy, task)
    if task is not None and check_task(table, task, output, episodes) and (method or penalty):
        table.note("the method is not tried on a task that has failed; correct the task first")
        return table.finish()
    tried_on = None if policy is None or policy.can("logits") else policy
    if method is not None:
        check_method(table, method, task, tried_on)
    if penalty is not None:
        check_penalty(table, penalty, task, tried_on)
    if measure is not None:
        check_measure(table, measure, policy, task)
    return table.finish()
