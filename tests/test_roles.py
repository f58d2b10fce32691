"""Which task plays which role in a run."""

from __future__ import annotations

import pytest

from robot_forgetting.conformance.toy_task import ToyTask
from robot_forgetting.engine.experiment import assign_roles
from robot_forgetting.errors import UserError


def roles(new: str, prior: str, held_out: str) -> dict[str, str]:
    tasks = assign_roles(ToyTask(new), [ToyTask(name) for name in prior], [ToyTask(name) for name in held_out])
    return {role: "".join(task.name for task in given) for role, given in tasks.items()}


def test_the_new_task_is_no_longer_held_out():
    assert roles("a", "bc", "da") == {"new": "a", "prior": "bc", "held_out": "d"}


@pytest.mark.parametrize("prior, held_out, name", [("ab", "", "a"), ("bb", "", "b"), ("b", "b", "b")])
def test_two_roles_are_an_error(prior, held_out, name):
    with pytest.raises(UserError, match=f"'{name}' has two roles"):
        roles("a", prior, held_out)
