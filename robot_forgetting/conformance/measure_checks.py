"""Conformance checks of a measure: what it says of the base itself, that it sees a change, that it repeats itself."""

from __future__ import annotations

import numpy as np
import torch

from robot_forgetting.conformance.check_table import NotApplicable, Table, expect
from robot_forgetting.conformance.policy_checks import inputs_for
from robot_forgetting.conformance.toy_task import ToyTask, perturb, tiny_policy
from robot_forgetting.contracts import checked_kind
from robot_forgetting.measure import TEXT, WEIGHTS, Measure, States, measured
from robot_forgetting.methods.sft import take_columns
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.task import Task

INPUTS = 18  # more than the neighbours of CKNNA


def check_measure(table: Table, measure: Measure, policy: Policy | None = None, task: Task | None = None) -> None:
    """On a tiny policy of tokens that reads pictures, or on the given one; at what the task shows, if one is given."""
    table.section(f"measure {getattr(measure, 'name', type(measure).__name__)}")
    if not table.check("description", lambda: _description(measure)):
        return
    policy = policy or tiny_policy(ToyTask())
    with policy.base():
        pass  # the frozen copy is taken before the weights move
    if table.check("at the base", lambda: _at_base(measure, policy, task)):
        table.check("after a change", lambda: _after_change(measure, policy, task))


def _description(measure: Measure) -> str:
    checked_kind("measure", measure, Measure)
    for name in ("name", "title"):
        value = getattr(measure, name, None)
        expect(isinstance(value, str) and value, f"{name} is {value!r}; give the measure one")
    units = getattr(measure, "units", ())
    expect(isinstance(units, tuple) and units and all(isinstance(u, str) for u in units),
           f"units is {units!r}; give a tuple of texts, ('1',) for numbers without")  # fmt: skip
    return f"{measure.title}, in {' and '.join(units)}"


def _rows(measure: Measure, policy: Policy, task: Task | None) -> list[dict]:
    """At all states at which it is measured, which are made up."""
    if reason := measure.undefined(policy):
        raise NotApplicable(f"{reason}; give a policy that it is defined for: policy=NAME")
    rows = []
    for name in measure.at(policy):
        if name == WEIGHTS:
            obs = {}
        elif name == TEXT:
            obs = {"text": [f"the number {index} and then {index * 7}" for index in range(INPUTS)]}
        else:
            few = inputs_for(policy, task)
            obs = take_columns(few, np.arange(INPUTS) % len(next(iter(few.values()))))
        count = INPUTS if obs else 0
        rows += measured([measure], policy, States(obs, np.arange(count) // 2, name))
    expect(rows, "gives no rows; return one for each of its units")
    return rows


def _at_base(measure: Measure, policy: Policy, task: Task | None) -> str:
    rows, wanted = _rows(measure, policy, task), float(measure.similarity)
    for row in rows:
        value = row["value"]
        expect(value is not None and abs(value - wanted) < 1e-3,
               f"is {value} for the base itself; a {'similarity' if wanted else 'distance'} is {wanted:g} there "
               "(say `similarity` = True or False)")  # fmt: skip
    return f"{wanted:g} in {len(rows)} rows"


def _after_change(measure: Measure, policy: Policy, task: Task | None) -> str:
    before = {name: parameter.detach().clone() for name, parameter in trainable(policy).items()}
    try:
        with torch.no_grad():
            perturb(policy)
        moved = {name: parameter.detach().clone() for name, parameter in trainable(policy).items()}
        first, second = _rows(measure, policy, task), _rows(measure, policy, task)
        expect(first == second, "gives other numbers the second time; draw what is random from `states.seed`")
        changed = [name for name, p in trainable(policy).items() if not torch.equal(p, moved[name])]
        expect(not changed, f"leaves {len(changed)} weights changed ({changed[:1]}); leave the policy as it was")
        values = [row["value"] for row in first]
        odd = [value for value in values if value is None or not np.isfinite(value)]
        expect(not odd, f"is {odd[:1]} after a change of all weights; give finite numbers")
        expect(any(abs(value - measure.similarity) > 1e-6 for value in values), "does not see that all weights changed")
        return f"from {min(values):.4g} to {max(values):.4g}, twice the same"
    finally:
        with torch.no_grad():
            for name, parameter in trainable(policy).items():
                parameter.copy_(before[name])
