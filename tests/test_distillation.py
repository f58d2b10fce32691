"""Distillation on own samples: the loss by hand and against TRL's, the moving teacher, what a teacher passes on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_learning import configured, learn, success
from test_text_methods import another
from tiny_lm import LettersTask, tiny_lm
from toy import ToyPolicy, ToyTask

from robot_forgetting.cli import command_line as cli
from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Optimiser
from robot_forgetting.methods.distillation import SDFT, OnPolicyDistillation
from robot_forgetting.policy import ConventionSpec, Policy, Reference
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.records.run_folder import RunFolder

RATE = Optimiser(learning_rate=1e-2)
TEMPLATE = "{question}\nSolution: {demonstration}"
LORA = {"lora": {"rank": 4, "alpha": 8}}


def sdft(**options) -> SDFT:
    return SDFT(**{"iterations": 3, "batch_size": 6, "optimiser": RATE, "template": TEMPLATE, **options})


def move(policy, scale: float = 0.05) -> None:
    with torch.no_grad():
        for p in trainable(policy).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * scale)


def distributions(policy, messages, action) -> torch.Tensor:
    with torch.no_grad():
        return policy.logits({"messages": messages}, action).log_softmax(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_sdft_loss_by_hand(direction):
    """Two prompts, one set of tokens, KL summed over the whole vocabulary, averaged over the tokens."""
    policy, task = tiny_lm(), LettersTask()
    method = sdft(direction=direction)
    method.begin(policy, task, [])
    [batch] = method.collect(policy, task, 0)
    seeds = task.training_seeds(0, 6, seed=0)
    asked = task.observations(seeds)["messages"]
    shown = [
        [{"role": "user", "content": f"{one[0]['content']}\nSolution: {letter}"}]
        for one, letter in zip(asked, task.letters(seeds), strict=True)
    ]
    assert batch.obs["teacher_messages"] == shown
    teacher, own = distributions(policy, shown, batch.action), distributions(policy, asked, batch.action)
    first, second = (teacher, own) if direction == "forward" else (own, teacher)
    values = (first.exp() * (first - second)).sum(-1)[batch.action.mask]
    assert method.loss(policy, batch).item() == pytest.approx(values.mean().item(), rel=1e-4) and values.mean() > 1e-4
    parts = sum(method.loss(policy, batch[i : i + 4]).item() * len(batch[i : i + 4]) for i in (0, 4)) / 6
    assert parts == pytest.approx(values.mean().item(), rel=1e-4)


@pytest.mark.parametrize("beta, direction", [(0.0, "forward"), (1.0, "reverse")])
def test_against_trl(beta, direction, monkeypatch):
    """Value and gradient of TRL's generalised Jensen-Shannon loss at its two ends."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="the comparison needs the package trl: pip install trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer

    policy, teacher, task = tiny_lm(), another(), LettersTask()
    method = OnPolicyDistillation(
        iterations=1, groups=5, group_size=2, optimiser=RATE, teacher=teacher, direction=direction
    )
    method.begin(policy, task, [])
    [batch] = method.collect(policy, task, 0)
    found = []
    for loss in ("ours", "theirs"):
        policy.zero_grad(set_to_none=True)
        if loss == "ours":
            value = method.loss(policy, batch)
        else:
            with torch.no_grad():
                judged = teacher.logits(batch.obs, batch.action)
            labels = torch.where(batch.action.mask, batch.action.tokens, -100)
            value = GKDTrainer.generalized_jsd_loss(
                policy.logits(batch.obs, batch.action), judged, labels=labels, beta=beta,
                num_items_in_batch=batch.action.mask.sum(),
            )  # fmt: skip
        value.backward()
        found.append((value.item(), {name: p.grad for name, p in policy.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] > 1e-3
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_the_teacher_follows_the_policy(options):
    """An average by hand: base, then 0.25 of the way to the policy, then again; through a checkpoint as well."""
    policy, task, method = tiny_lm(**options), LettersTask(), sdft(teacher_rate=0.25)
    method.begin(policy, task, [])
    start = {name: p.detach().clone() for name, p in trainable(policy).items()}
    method.collect(policy, task, 0)
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(tensor, start[name])
    move(policy)
    method.collect(policy, task, 1)
    saved = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    again = sdft(teacher_rate=0.25)
    again.begin(tiny_lm(**options), task, [])
    again.load_state_dict(saved)
    again.collect(policy, task, 2)
    for name, own in trainable(policy).items():
        torch.testing.assert_close(saved[name], 0.75 * start[name] + 0.25 * own)
        expected = 0.75**2 * start[name] + (1 - 0.75**2) * own
        torch.testing.assert_close(again.state_dict()[name], expected)


def test_a_copy_shares_what_is_frozen():
    policy = tiny_lm(**LORA)
    teacher = policy.copied()
    for name, p in policy.named_parameters():
        assert (dict(teacher.named_parameters())[name] is p) is not p.requires_grad
    full = tiny_lm()
    other = full.copied()
    assert all(a is b for a, b in zip(full._base_weights, other._base_weights, strict=True))
    move(full)
    assert not any(torch.equal(p, dict(other.named_parameters())[name]) for name, p in full.named_parameters())


def test_sdft_approaches_its_teacher(tmp_path):
    """With the base as the teacher the distance to what it says with the solution falls, on the same questions."""
    policy, task = tiny_lm(), LettersTask(items=6)
    method, rate = sdft(iterations=30, teacher_rate=0.0), Optimiser(learning_rate=3e-3)
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        train(policy, task, method, optimiser=rate, run=folder, seed=0, checkpoints=False)
        losses = [row["loss"] for row in folder.rows("train")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_taught_toy_succeeds_without_rewards(tmp_path):
    """GRPO's run is the teacher; the base policy samples, never hears of success, and succeeds as often."""
    rl = configured("method", "grpo", "seed=1", "budget.rl_iterations=16")
    taught, _ = learn(tmp_path, rl, name="rl", rate=0.1)
    command = ["seed=1", "budget.rl_iterations=20", f"method.teacher_run={tmp_path / 'rl'}"]
    policy, rows = learn(tmp_path, configured("method", "on_policy_distillation", *command), name="opd", rate=0.1)
    before, teacher, after = (success(one, ToyTask()) for one in (ToyPolicy(), taught, policy))
    assert before < 0.6 and teacher >= 0.9 and after >= teacher - 0.05
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]


def test_a_reference_with_more_words_than_the_policy():
    """Qwen2.5's sizes have one tokenizer and embeddings padded to 151,936 or 152,064 rows: padding does not count."""
    policy, teacher = tiny_lm(), tiny_lm()
    weight = teacher.model.get_output_embeddings().weight
    padded = torch.nn.Linear(weight.shape[1], len(weight) + 8, bias=False)
    with torch.no_grad():
        padded.weight[: len(weight)] = weight
    teacher.model.set_output_embeddings(padded)
    obs, action = LettersTask().observations(np.arange(3)), policy.encode(["A", "yes", "no one"])
    move(policy)
    same = policy.compared(obs, action, {"kl": lambda a, b: (a - b).abs().sum(-1)}, Reference(tiny_lm(), obs))["kl"]
    found = policy.compared(obs, action, {"kl": lambda a, b: (a - b).abs().sum(-1)}, Reference(teacher, obs))["kl"]
    torch.testing.assert_close(found, same)
    assert (found * action.mask).max() > 0


def test_compared_with_another_policy_is_what_two_passes_give():
    policy, teacher = tiny_lm(), another()
    obs = LettersTask().observations(np.arange(3))
    action = policy.encode(["A", "yes", "no one"])
    functions = {"l1": lambda a, b: (a.softmax(-1) - b.softmax(-1)).abs().sum(-1)}
    ours = policy.compared(obs, action, functions, Reference(teacher, obs))["l1"] * action.mask
    plain = Policy.compared(policy, obs, action, functions, Reference(teacher, obs))["l1"] * action.mask
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert ours.max() > 1e-3


# ---- what users get wrong


class Rotated(ToyPolicy):
    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=2, action_mode="delta", rotation="euler_xyz")


def begin(method, policy=None, task=None) -> None:
    policy, task = policy or tiny_lm(), task or LettersTask()
    method.check(policy, task)
    method.begin(policy, task, [])


def distilled(**options) -> OnPolicyDistillation:
    return OnPolicyDistillation(**{"iterations": 1, "groups": 2, "group_size": 1, "optimiser": RATE, **options})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: distilled(), "needs a teacher: method.teacher_run=RUN_FOLDER"),
        (lambda: distilled(teacher_run="x", direction="up"), "unknown KL direction 'up'"),
        (lambda: begin(distilled(teacher=ToyPolicy())), "differ in meaning: action_dimensions: 1 against 2"),
        (lambda: begin(distilled(teacher_run="nowhere")), "nowhere is not a run folder"),
        (lambda: begin(sdft(), ToyPolicy(), ToyTask()), "'reach' asks no questions in words"),
        (lambda: begin(sdft(), tiny_lm(dtype="bfloat16")), "weights in bfloat16 would stand still"),
        (lambda: sdft(template="{question}"), "method.template must contain"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        call()


def test_other_words():
    class Other:
        def get_vocab(self):
            return {"a": 0}

    teacher = tiny_lm()
    teacher.tokenizer = Other()
    with pytest.raises(UserError, match="different tokenizers"):
        begin(distilled(teacher=teacher))
    with pytest.raises(UserError, match="differ in meaning: rotation"):
        policy = ToyPolicy()
        policy.convention = lambda: ConventionSpec(action_dimensions=2, rotation="axis_angle")
        policy.check_tokens(Rotated())


def test_placeholders_in_a_question_stay():
    method = sdft()
    shown = method._shown([{"role": "user", "content": "What is {demonstration}?"}], "{question}")
    assert shown == [{"role": "user", "content": "What is {demonstration}?\nSolution: {question}"}]


def test_the_command_without_a_teacher(capsys):
    assert cli.main(["check", "method=on_policy_distillation"]) == 2
    assert "needs a teacher" in capsys.readouterr().err


def test_a_question_method_on_a_robot_task_stops_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method, message in (("sdft", "asks no questions in words"), ("simpo", "is no one-step task")):
        assert cli.main(["run", f"method={method}", "budget=tiny"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_batches_carry_both_prompts():
    policy, task, method = tiny_lm(), LettersTask(), sdft()
    method.begin(policy, task, [])
    [batch] = method.collect(policy, task, 0)
    assert isinstance(batch, Batch) and len(batch.obs["teacher_messages"]) == len(batch) == 6
    assert set(method.metrics()) == {"rollout_success", "completion_tokens"}
