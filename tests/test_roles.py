"""Which task plays which role in a run."""

from __future__ import annotations

import pytest

from robot_forgetting.conformance.toy_task import ToyTask
from robot_forgetting.engine.roles import assign_roles, roles_in
from robot_forgetting.errors import UserError


def roles(new: str, prior: str, held_out: str) -> dict[str, str]:
    tasks = assign_roles(*([ToyTask(name) for name in names] for names in (new, prior, held_out)))
    return {role: "".join(task.name for task in given) for role, given in tasks.items()}


def test_the_new_task_is_no_longer_held_out():
    assert roles("a", "bc", "da") == {"new": "a", "prior": "bc", "held_out": "d"}


@pytest.mark.parametrize("prior, held_out, name", [("ab", "", "a"), ("bb", "", "b"), ("b", "b", "b")])
def test_two_roles_are_an_error(prior, held_out, name):
    with pytest.raises(UserError, match=f"'{name}' has two roles"):
        roles("a", prior, held_out)


def test_roles_change_from_stage_to_stage():
    whole = assign_roles([ToyTask(name) for name in "abc"], [ToyTask("p")], [ToyTask(name) for name in "hb"])
    found = [
        {role: "".join(task.name for task in tasks) for role, tasks in roles_in(whole, stage).items()}
        for stage in range(4)
    ]
    assert found[0] == found[1] == {"new": "a", "prior": "p", "held_out": "h", "unseen": "bc"}
    assert found[2] == {"new": "b", "prior": "ap", "held_out": "h", "unseen": "c"}
    assert found[3] == {"new": "c", "prior": "abp", "held_out": "h"}


@pytest.mark.parametrize("sequence, words", [("", "no task"), ("aba", "'a' stands twice"), ("ap", "'p' has two roles")])
def test_no_sequence(sequence, words):
    with pytest.raises(UserError, match=words):
        roles(sequence, "p", "")
