"""Conformance checks of a policy: it sees, its log-probabilities are its own, `base()` is the base policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.conformance.check_table import NotApplicable, Row, Table, expect
from robot_forgetting.conformance.toy_task import observations, perturb
from robot_forgetting.contracts import checked_action, checked_policy, checked_transition
from robot_forgetting.engine.preflight import TRIED_SEED
from robot_forgetting.policy import Action, Policy
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.rollout import columns
from robot_forgetting.task import Task

QUESTIONS = ["What is 2 + 3?", "Name a colour.", "Which is larger, seven or nine? Answer with one word."]
INSTRUCTIONS = ["pick up the red cube and hold it at the green ball", "push the blue cube onto the target"]


def check_golden_tensors(table: Table, folder: Path) -> None:
    """The error of every tensor of OpenVLA against a folder of reference tensors."""
    from robot_forgetting.policies.openvla.golden import check_golden

    table.section(f"OpenVLA against the reference tensors in {folder}")
    for row in check_golden(folder):
        detail = f"error {row.error:.2e}, tolerance {row.tolerance:.2e}"
        table.add(Row("ok" if row.ok else "FAIL", row.tensor, detail))


def check_policy(table: Table, policy: Policy, task: Task | None = None) -> None:
    policy.eval()
    table.section(f"policy {policy.name}")
    if not table.check("description", lambda: _description(policy)):
        return
    if task is not None:
        table.check("same convention as task", lambda: _agrees(policy, task))
    obs = inputs_for(policy, task)
    noise = torch.rand(_count(obs), policy.noise_width, generator=torch.Generator().manual_seed(0))
    actions: list[Action] = []
    if not table.check("act", lambda: _act(policy, obs, noise, actions)):
        return
    action = actions[0]
    has_tokens, has_density = policy.can("logits"), policy.can("log_prob")
    if has_tokens and not table.check("logits", lambda: _logits(policy, obs, action)):
        return
    table.check("sees", lambda: _sees(policy, obs))
    if has_tokens:
        table.check("log_prob from logits", lambda: _log_prob(policy, obs, action))
    if has_density:
        table.check("act's log_prob", lambda: _own_log_prob(policy, obs, noise, action))
    if has_tokens:
        table.check("greedy is the argmax", lambda: _greedy(policy, obs, noise))
    table.check("act is repeatable", lambda: _repeatable(policy, obs, noise, action))
    table.check("no batch dependence", lambda: _alone(policy, obs, noise, action))
    table.check("decode", lambda: _decode(policy, action, task))
    table.check("encode and decode", lambda: _round_trip(policy, action, task))
    if has_density:
        table.check("gradient", lambda: _gradient(policy, obs, action))
    table.check("base()", lambda: _base(policy, obs, action))


def _answers_texts(policy: Policy) -> bool:
    return policy.convention().action_mode == "text"


def inputs_for(policy: Policy, task: Task | None) -> dict:
    """Pictures with instructions, or questions; what the task shows, where one is given."""
    if task is not None and task.one_step:
        return task.observations(np.array(task.seeds("test")[:3]))
    if task is not None and not task.scored:
        return _starts(task)
    if _answers_texts(policy):
        return {"messages": [[{"role": "user", "content": question}] for question in QUESTIONS]}
    return observations(policy.convention().image_size or 64, INSTRUCTIONS)


def _starts(task: Task) -> dict:
    """What a task's environment shows after six resets."""
    first = TRIED_SEED % len(task.seeds("train"))
    with task.make_env(1) as env:
        rows = []
        for seed in task.seeds("train")[first : first + 6]:
            env.request(0, {0: seed}, {})
            rows.append(checked_transition(env, env.wait()[1][0]).observation)
    return columns(rows)


def _count(obs: dict) -> int:
    return len(next(iter(obs.values())))


def tolerance(policy: Policy) -> float:
    """Of log-probabilities, in nats: sums in another order, at the weights' precision."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in policy.parameters())
    return 0.15 if half else 2e-3


def _row(obs: dict, index: int) -> dict:
    return {key: column[index : index + 1] for key, column in obs.items()}


def _description(policy: Policy) -> str:
    checked_policy(policy)
    expect(isinstance(policy.name, str) and policy.name, f"name is {policy.name!r}; give the policy a name")
    spec = policy.convention()
    expect(spec.action_dimensions, "convention() leaves action_dimensions open; say how many numbers a command has")
    total = sum(p.numel() for p in policy.parameters())
    moving = sum(p.numel() for p in trainable(policy).values())
    expect(moving, "no weight is trainable (requires_grad); nothing could be fine-tuned")
    return f"{total:,} weights, {moving:,} trainable, on {policy.device}"


def _agrees(policy: Policy, task: Task) -> None:
    from robot_forgetting.engine.evaluate import check_conventions

    check_conventions(policy, [task])


def _act(policy: Policy, obs: dict, noise: Tensor, made: list[Action]) -> str:
    action = policy.act(obs, temperature=1.0, noise=noise)
    rows = _count(obs)
    checked_action(policy, action, rows)
    mask, log_prob = action.mask, action.log_prob
    expect(mask.any(dim=1).all(), "a decision has no token that counts (its mask is all False)")
    drawn = [part for part in (log_prob, action.values) if part is not None]
    expect(not any(part.requires_grad for part in drawn), "act() keeps gradients; decorate it with torch.no_grad()")
    log_prob = torch.zeros(mask.shape) if log_prob is None else log_prob
    tokens = action.tokens is not None
    expect(tokens == policy.can("logits"), "it gives tokens without `logits`, or has `logits` and gives no tokens")
    above = tokens and (log_prob > 1e-4).any()  # a density may be larger than 1
    expect(torch.isfinite(log_prob).all() and not above, "log_prob is not finite, or above 0")
    made.append(action)
    return f"{mask.shape[1]} {'tokens' if tokens else 'numbers'} per decision"


def _logits(policy: Policy, obs: dict, action: Action) -> str:
    with torch.no_grad():
        logits = policy.logits(obs, action)
    shape = list(action.tokens.shape)
    expect(
        logits.dim() == 3 and list(logits.shape[:2]) == shape,
        f"logits have shape {list(logits.shape)}; give {[*shape, 'V']}: one distribution per token",
    )
    expect(logits.dtype == torch.float32, f"logits are {logits.dtype}; give float32, which KL needs")
    expect(torch.isfinite(logits).all(), "logits are not finite; the weights are broken, or a softmax overflows")
    low, high, size = int(action.tokens.min()), int(action.tokens.max()), logits.shape[2]
    expect(0 <= low and high < size, f"tokens range over {low}..{high}, but the vocabulary has {size} entries")
    return f"vocabulary of {size}"


def _computed(policy: Policy, obs: dict, action: Action) -> Tensor:
    """What other inputs or weights must change: logits; of a policy without them its greedy decisions."""
    if policy.can("logits"):
        return policy.logits(obs, action)
    return policy.act(obs, temperature=0.0, noise=torch.full((_count(obs), policy.noise_width), 0.5)).values


@torch.no_grad()
def _sees(policy: Policy, obs: dict) -> str:
    """Two observations that differ in the picture alone, or two questions: the same decision must differ in chance."""
    if _answers_texts(policy):
        two, kind = {key: column[:2] for key, column in inputs_for(policy, None).items()}, "two questions"
    elif "image" in obs:
        two, kind = {key: column[[0, 0]] if isinstance(column, np.ndarray) else [column[0]] * 2
                     for key, column in obs.items()}, "a black and a white picture"  # fmt: skip
        two["image"][:] = np.array([0, 255], np.uint8)[:, None, None, None]
    else:
        raise NotApplicable(f"no pictures, only {', '.join(sorted(obs))}")
    both = torch.tensor([0, 0])
    first, second = _computed(policy, two, policy.act(two, temperature=0.0)[both])
    difference, what = _largest(first - second), "logits" if policy.can("logits") else "decision"
    expect(difference > 1e-4, f"{kind} give the same {what}; what is observed does not reach the actions")
    return f"{kind} differ by up to {difference:.3g} in the {what}"


@torch.no_grad()
def _log_prob(policy: Policy, obs: dict, action: Action) -> str:
    logits, log_prob = policy.logits(obs, action), policy.log_prob(obs, action)
    expected = logits.log_softmax(-1).gather(-1, action.tokens.to(logits.device).unsqueeze(-1)).squeeze(-1)
    mask = action.mask.to(logits.device)
    error = _largest(log_prob - expected * mask)
    expect(error <= tolerance(policy), f"log_prob() differs from log_softmax(logits()) by up to {error:.3g} nats")
    expect(_largest(log_prob * ~mask) == 0, "log_prob() is not zero where the mask is False")
    return f"largest difference {error:.1e} nats"


@torch.no_grad()
def _own_log_prob(policy: Policy, obs: dict, noise: Tensor, action: Action) -> str:
    limit = tolerance(policy)
    error = _largest((policy.log_prob(obs, action).cpu() - action.log_prob.cpu()) * action.mask.cpu())
    expect(
        error <= limit,
        f"act() and log_prob() differ by up to {error:.3g} nats for the same tokens (limit {limit:g}); RL ratios would "
        "not start at 1: use the same distribution in both (dropout off, same masks)",
    )
    if not policy.can("logits"):
        return f"largest difference {error:.1e} nats"
    cold = policy.act(obs, temperature=0.5, noise=noise)
    expected = (policy.logits(obs, cold) / 0.5).log_softmax(-1).cpu()
    expected = expected.gather(-1, cold.tokens.cpu().unsqueeze(-1)).squeeze(-1)
    cold_error = _largest((cold.log_prob.cpu() - expected) * cold.mask.cpu())
    expect(
        cold_error <= 2 * limit,
        f"at temperature 0.5, act()'s log_prob differs by up to {cold_error:.3g} nats from log_softmax(logits / 0.5)",
    )
    return f"largest difference {error:.1e} nats"


@torch.no_grad()
def _greedy(policy: Policy, obs: dict, noise: Tensor) -> None:
    action = policy.act(obs, temperature=0.0, noise=noise)
    logits = policy.logits(obs, action).cpu()
    gap = logits.amax(-1) - logits.gather(-1, action.tokens.cpu().unsqueeze(-1)).squeeze(-1)
    expect(
        _largest(gap * action.mask.cpu()) <= tolerance(policy),
        "act(temperature=0) does not choose the largest logit; without temperature it must be greedy",
    )


@torch.no_grad()
def _repeatable(policy: Policy, obs: dict, noise: Tensor, action: Action) -> None:
    again = policy.act(obs, temperature=1.0, noise=noise)
    what = "tokens" if policy.can("logits") else "numbers"
    expect(
        _same(again, action),
        f"act() chose other {what} with the same `noise`; turn it into {what} by the inverse CDF, and nothing else",
    )
    other = policy.act(obs, temperature=1.0, noise=1 - noise)
    expect(not _same(other, action), f"act() ignores `noise`; choose {what} by its inverse CDF")


@torch.no_grad()
def _alone(policy: Policy, obs: dict, noise: Tensor, action: Action) -> str:
    def measured(obs: dict, action: Action) -> Tensor:
        return (policy.log_prob(obs, action) if policy.can("log_prob") else _computed(policy, obs, action)).cpu()

    together, error = measured(obs, action), 0.0
    for index in range(_count(obs)):
        row = slice(index, index + 1)
        error = max(error, _largest(measured(_row(obs, index), action[row]) - together[row]))
        if tolerance(policy) < 0.01:  # in half precision rounding alone can choose another token
            chosen = policy.act(_row(obs, index), temperature=1.0, noise=noise[index : index + 1])
            expect(
                _same(chosen, action[row]),
                f"observation {index} alone gives other actions than in a batch; look at padding, positions and masks",
            )
    what = "log_prob changes" if policy.can("log_prob") else "the greedy decision changes"
    expect(
        error <= tolerance(policy),
        f"{what} by up to {error:.3g} with the batch's other rows; look at padding, positions and masks",
    )
    return f"largest difference {error:.1e}"


def _same(first: Action, second: Action) -> bool:
    """Whether decisions are the same where they count; numbers may differ by rounding."""
    if first.values is not None:
        return torch.allclose(first.values.cpu(), second.values.cpu(), rtol=1e-3, atol=1e-3)
    tokens = [[row[m].tolist() for row, m in zip(a.tokens.cpu(), a.mask.cpu(), strict=True)] for a in (first, second)]
    return tokens[0] == tokens[1]


def _statistics(policy: Policy, task: Task | None) -> str | None:
    return getattr(task, "statistics", None) or policy.convention().statistics


def _decode(policy: Policy, action: Action, task: Task | None) -> str:
    if _answers_texts(policy):
        texts = policy.decode(action)
        expect(
            isinstance(texts, list) and len(texts) == len(action) and all(isinstance(text, str) for text in texts),
            f"decode() gives {type(texts).__name__}; give a list of {len(action)} texts",
        )
        return f"the first answer begins with {texts[0][:40]!r}"
    commands, width = policy.decode(action, statistics=_statistics(policy, task)), policy.convention().action_dimensions
    expect(
        isinstance(commands, np.ndarray) and commands.dtype == np.float32 and commands.shape == (len(action), width),
        f"decode() gives {getattr(commands, 'dtype', type(commands).__name__)} {list(np.shape(commands))}; "
        f"give numpy float32 [{len(action)}, {width}]",
    )
    expect(np.isfinite(commands).all(), "decode() gives commands that are not finite; look at the statistics")
    return f"commands from {commands.min():.3g} to {commands.max():.3g}"


def _round_trip(policy: Policy, action: Action, task: Task | None) -> str:
    if not policy.can("encode"):
        raise NotApplicable("no encode(): methods that clone demonstrations (sft) will refuse this policy")
    if _answers_texts(policy):
        texts = ["4", "The answer is blue.\nBecause of the sky."]
        back = policy.decode(policy.encode(texts))
        expect(back == texts, f"encode() and decode() turn {texts[0]!r} into {back[0]!r}; make them inverses")
        return "texts come back"
    key = _statistics(policy, task)
    commands = policy.decode(action, statistics=key)
    back = policy.encode(commands, statistics=key)
    expect(back.mask.shape == action.mask.shape, f"encode() gives actions of shape {list(back.mask.shape)}")
    # In commands, not tokens: a dimension that never moved in the data has a range of zero, and its bins are all one.
    error = np.abs(policy.decode(back, statistics=key) - commands)
    if action.values is not None:
        width = 1e-3
    else:
        upper = replace(action, tokens=(action.tokens + 1).clamp_max(int(action.tokens.max())))
        lower = replace(action, tokens=(action.tokens - 1).clamp_min(0))
        width = np.abs(policy.decode(upper, statistics=key) - policy.decode(lower, statistics=key))
    expect(
        (error <= width + 1e-6).all(),
        f"a command changes by {error.max():.3g} by encode() and decode(), more than a bin; make them inverses",
    )
    return f"commands come back within {error.max():.2g}"


def _gradient(policy: Policy, obs: dict, action: Action) -> str:
    policy.zero_grad(set_to_none=True)
    policy.log_prob(obs, action).sum().backward()
    reached = {name: p.grad for name, p in trainable(policy).items() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    expect(reached, "log_prob() carries no gradient; do not detach or use no_grad in it")
    bad = [name for name, gradient in reached.items() if not torch.isfinite(gradient).all()]
    expect(not bad, f"the gradient of {bad[:1]} is not finite")
    unused = [name for name in trainable(policy) if name not in reached]
    expect(not unused, f"{len(unused)} trainable tensors get no gradient ({', '.join(unused[:2])}); freeze them")
    return f"reaches all {len(reached)} trainable tensors"


@torch.no_grad()
def _base(policy: Policy, obs: dict, action: Action) -> str:
    what = "logits" if policy.can("logits") else "decisions"
    before = {name: p.detach().clone() for name, p in trainable(policy).items()}
    original = _computed(policy, obs, action)
    with policy.base():
        inside = _computed(policy, obs, action)
    expect(_largest(inside - original) <= 1e-5, "base() of a policy that was not trained yet differs from the policy")
    try:
        perturb(policy)
        perturbed = {name: p.detach().clone() for name, p in trainable(policy).items()}
        moved = _computed(policy, obs, action)
        expect(_largest(moved - original) > 1e-4, f"changed weights do not change the {what}; are they in use?")
        with policy.base():
            inside = _computed(policy, obs, action)
            with policy.base():
                nested = _computed(policy, obs, action)
        expect(
            _largest(inside - original) <= 1e-5,
            f"after training, base() is not the base policy ({what} differ by {_largest(inside - original):.2g}); keep "
            "a frozen copy, or switch the adapters off",
        )
        expect(torch.equal(nested, inside), "base() inside base() is not the base policy")
        changed = [name for name, p in trainable(policy).items() if not torch.equal(p, perturbed[name])]
        expect(not changed, f"base() leaves {len(changed)} weights changed ({changed[:1]}); restore them on exit")
        expect(_largest(_computed(policy, obs, action) - moved) <= 1e-5, "after base(), the policy answers differently")
    finally:
        for name, parameter in trainable(policy).items():
            parameter.copy_(before[name])
    return f"the base's {what} before and after a change of weights"


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
