"""Every method and penalty on a language model and a text task, as they are; the loss of texts of different lengths."""

from __future__ import annotations

import math
from dataclasses import replace

import hydra
import numpy as np
import pytest
import torch
from tiny_lm import Letters, LettersTask, tiny_folder, tiny_lm
from toy_runs import DISTANCES

from robot_forgetting import configs
from robot_forgetting.cli import command_line as cli
from robot_forgetting.engine.drift_rows import policy_states
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.engine.train import _backward, train
from robot_forgetting.measure import measured
from robot_forgetting.method import Batch, Optimiser, mean_over_tokens
from robot_forgetting.methods.distillation import SDFT, OnPolicyDistillation
from robot_forgetting.methods.grpo import GRPO, group_advantages
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.on_policy import RolloutPlan, sample_rollouts
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT
from robot_forgetting.methods.simpo import SimPO
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.records.run_folder import RunFolder

RATE = Optimiser(learning_rate=1e-2, micro_batch=5)
SAMPLED = {"iterations": 2, "groups": 4, "group_size": 16, "optimiser": RATE}
SUPERVISED = {"iterations": 1, "steps_per_iteration": 2, "batch_size": 6, "optimiser": RATE}
METHODS = {
    "sft": lambda: SFT(demonstrations=1, **SUPERVISED),
    "grpo": lambda: GRPO(**SAMPLED),
    "dr_grpo": lambda: GRPO(scale_by_std=False, length_normalised=False, normaliser="longest", **SAMPLED),
    "grpo in parts": lambda: GRPO(minibatch_size=40, epochs=2, **SAMPLED),
    "reinforce": lambda: Reinforce(**SAMPLED),
    "reinforce_1_0": lambda: Reinforce(advantage="one_zero", **SAMPLED),
    "simpo": lambda: SimPO(negatives=Letters(shift=1), **SUPERVISED),
    "self_sft": lambda: SelfSFT(samples=16, **SUPERVISED),
    "sdft": lambda: SDFT(iterations=2, batch_size=6, optimiser=RATE, template="{question} {demonstration}"),
    "on_policy_distillation": lambda: OnPolicyDistillation(teacher=another(), **SAMPLED),
    "iterative_sft": lambda: SelfSFT(samples=16, iterative=True, **SUPERVISED),
}


def another():
    """A teacher: other weights, the same tokens."""
    made = tiny_lm()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return made


class Easy(LettersTask):
    """A right answer holds any of four letters' worth of characters: a random model finds one in a few tries."""

    def rewards(self, seeds, answers) -> np.ndarray:
        return np.array([any(c in text for c in "aeiouABCD") for text in answers], np.float32)


LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.mark.parametrize("options, penalty", [({}, None), ({}, "forward"), (LORA, "reverse")])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_two_steps_on_text(tmp_path, name, options, penalty):
    policy, start = tiny_lm(**options), tiny_lm(**options)
    riders = [] if penalty is None else [KL(coefficient=0.5, direction=penalty)]
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        train(policy, Easy(), METHODS[name](), optimiser=RATE, run=folder, seed=0, penalties=riders)
        rows = folder.rows("train")
    assert len(rows) >= 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    if riders:
        assert rows[0]["penalty"] == pytest.approx(0, abs=1e-5) and rows[-1]["penalty"] > 1e-6
    moved = [name for name, p in trainable(policy).items() if not torch.equal(p, trainable(start)[name])]
    assert moved
    if "rollout_success" in rows[-1]:
        assert rows[-1].get("completion_tokens", 8) <= 8


def test_sft_learns_the_letters(tmp_path):
    policy, task = tiny_lm(max_new_tokens=2), LettersTask(items=8)
    method = SFT(demonstrations=1, iterations=1, steps_per_iteration=60, batch_size=8, optimiser=RATE)
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        train(policy, task, method, optimiser=RATE, run=folder, seed=0, checkpoints=False)
    seeds = range(8)  # of the training split: a few thousand weights memorise
    assert np.mean([episode.success for episode in evaluate(policy, task, seeds, temperature=0.0, num_envs=4)]) == 1


def test_grpo_learns_the_letters(tmp_path):
    """Success at temperature 1 from chance to most answers, with a handful of steps."""
    policy, task = tiny_lm(max_new_tokens=2), Easy(items=8)
    method = GRPO(iterations=12, groups=8, group_size=16, optimiser=RATE)
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        train(policy, task, method, optimiser=replace(RATE, micro_batch=32), run=folder, seed=0, checkpoints=False)
        success = [row["rollout_success"] for row in folder.rows("train")]
    assert np.mean(success[-2:]) > success[0] + 0.3


# ---- the mean over tokens of texts


def some_batch(policy, lengths=(1, 6, 3, 4)) -> Batch:
    action = policy.encode(["a" * length for length in lengths])
    obs = {"messages": [[{"role": "user", "content": str(i)}] for i in range(len(lengths))]}
    return Batch(obs, action)


def test_micro_batches_of_different_lengths_add_up_to_the_batchs_gradient():
    policy = tiny_lm()
    batch, found = some_batch(policy), []
    method = METHODS["sft"]()
    for size in (1, 3, 4):
        policy.zero_grad(set_to_none=True)
        loss, _ = _backward(policy, method, [KL(coefficient=0.1)], batch, 1.0, size)
        found.append((loss, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    counted = -policy.log_prob(batch.obs, batch.action).sum() / batch.action.mask.sum()
    for loss, gradient in found:
        assert loss == pytest.approx(counted.item(), rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-4)


def test_mean_over_tokens_by_hand():
    values, mask = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert mean_over_tokens(values, mask).item() == pytest.approx(7 / 3)
    assert mean_over_tokens(values, mask, 5.0).item() == pytest.approx(7 / 10)
    whole = Batch({"x": [0, 1]}, tiny_lm().encode(["", "aaa"]))
    part = whole[0:1]
    assert part.tokens_per_row == whole.mean_tokens == part.mean_tokens


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo"])
def test_grpo_loss_is_the_published_formula_over_all_rows(name):
    """Rows without advantage are not computed, but count: sums over the tokens, by hand, of every row."""
    settings = {
        "grpo": {},
        "dr_grpo": {"scale_by_std": False, "length_normalised": False, "normaliser": "longest"},
        "bnpo": {"length_normalised": False},
    }[name]
    policy, task = tiny_lm(), Easy()
    policy.stops |= set(range(3, 60))  # completions of different lengths
    method = GRPO(**SAMPLED, **settings)
    rollouts = sample_rollouts(policy, task, method.plan, 0)
    [batch] = method.collect(policy, task, 0)
    action = rollouts.answers.action
    assert 0 < len(batch) <= len(action) == 64 and len(set(action.mask.sum(1).tolist())) > 2
    advantage = group_advantages(rollouts.rewards, rollouts.state, settings.get("scale_by_std", True))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
        ratio = (policy.log_prob(rollouts.answers.obs, action) - action.log_prob).exp()
        gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None]) * action.mask
        lengths = action.mask.sum(1)
        expected = {
            "grpo": -(gain.sum(1) / lengths).mean(),
            "dr_grpo": -gain.sum() / (64 * policy.max_new_tokens),
            "bnpo": -gain.sum() / lengths.sum(),
        }[name]
        assert method.loss(policy, batch).item() == pytest.approx(expected.item(), rel=1e-4)
        parts = [method.loss(policy, batch[i : i + 7]).item() * len(batch[i : i + 7]) for i in range(0, len(batch), 7)]
        assert sum(parts) / len(batch) == pytest.approx(expected.item(), rel=1e-4)


def test_texts_without_advantage_are_left_out_and_nothing_is_learned_from_none():
    policy = tiny_lm()
    rollouts = sample_rollouts(policy, Easy(), RolloutPlan(4, 4), 0)
    advantage = torch.zeros(16)
    assert rollouts.batch(advantage) is None
    advantage[[2, 9]] = 1.0
    batch = rollouts.batch(advantage)
    share = rollouts.lengths[[2, 9]].sum() / rollouts.lengths.sum()
    assert batch.advantage.tolist() == pytest.approx([share.item()] * 2)
    assert [batch.obs["messages"][row : row + 1][0] for row in range(2)] == [
        rollouts.answers.obs["messages"][i : i + 1][0] for i in (2, 9)
    ]


def test_divergence_of_texts():
    """Per token and per completion; zero for the base itself; the chain rule's sum along the base's own tokens."""
    policy, task = tiny_lm(), LettersTask()
    states = policy_states(policy, task, range(1_000_000, 1_000_008), num_envs=4, limit=6)
    assert len(states) == 6
    assert all(row["value"] == pytest.approx(0, abs=1e-6) for row in measured(DISTANCES, policy, states))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    rows = {(row["measure"], row["unit"]): row for row in measured(DISTANCES, policy, states)}
    forward, decision = rows["forward_kl", "nats/token"], rows["forward_kl", "nats/decision"]
    assert forward["n"] == 6 and forward["value"] > 0.01 and forward["standard_error"] > 0
    assert forward["value"] < decision["value"] <= 8 * forward["value"] * 2
    policy.batch_rows = 2
    again = {(row["measure"], row["unit"]): row["value"] for row in measured(DISTANCES, policy, states)}
    assert again == pytest.approx({key: row["value"] for key, row in rows.items()}, rel=1e-4)


# ---- the command line


def composed(*overrides: str):
    with hydra.initialize_config_dir(configs.__path__[0], version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


@pytest.mark.parametrize("kind", ["robot", "text"])
def test_methods_have_settings_for_each_kind(kind):
    made = composed("method=grpo", "budget=full", f"kind={kind}").method
    expected = {
        "robot": (2e-4, 5, 32, 4, True, True, "tokens"),
        "text": (1e-5, 50, 8, 64, False, False, "longest"),
    }[kind]
    found = (made.optimiser.learning_rate, made.optimiser.warmup_steps, made.groups, made.group_size)
    assert (*found, made.scale_by_std, made.length_normalised, made.normaliser) == expected


@pytest.fixture
def here(tmp_path, monkeypatch, no_renderer):
    """A project folder with a tiny model and two text tasks of its own."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model")
    (tmp_path / "mine" / "task").mkdir(parents=True)
    for name in ("letters", "easy"):
        (tmp_path / "mine" / "task" / f"{name}.yaml").write_text(
            "# @package _global_\n# Letters\nkind: text\n"
            f"task: {{_target_: tiny_lm.LettersTask, name: {name}}}\nprior: [easy]\nheld_out: []\n"
        )
    (tmp_path / "mine" / "policy").mkdir()
    (tmp_path / "mine" / "policy" / "small.yaml").write_text(
        "# Small\n_target_: robot_forgetting.policies.causal_lm.CausalLM\n"
        "checkpoint: model\nmax_new_tokens: 6\nlora: null\nbatch_rows: 8\n"
    )
    return ["policy=small", "task=letters", "budget=tiny", "hydra.searchpath=[file://mine]", "processes=1"]


SIZES = {
    "sft": ["method.batch_size=4"],
    "grpo": ["method.groups=2", "method.group_size=4"],
    "sdft": ["method.batch_size=4"],
    "on_policy_distillation": ["method.groups=4", "+policy@method.teacher=small"],
}


@pytest.mark.parametrize("method", SIZES)
def test_run_resume_evaluate_and_check(here, tmp_path, capsys, method):
    sizes = SIZES[method]
    run = ["run", *here, f"method={method}", *sizes, "run_dir=runs/a", "policy.lora={rank: 2, alpha: 4, targets: null}"]
    assert cli.main(run) == 0, capsys.readouterr().err
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.finished and {row["task"] for row in folder.episodes()} == {"letters", "easy"}
    measures = {(row["measure"], row["unit"]) for row in folder.rows("divergence")}
    assert ("forward_kl", "nats/decision") in measures
    # Questions do not depend on who answers: nothing is measured twice.
    assert {row["states"] for row in folder.rows("divergence")} == {"base", "weights"}
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()
    rows = [dict(row, seconds=None, collect_seconds=None) for row in folder.rows("train")]
    evaluated = [
        "evaluate",
        *here,
        "checkpoint=runs/a",
        "run_dir=runs/b",
        "policy.lora={rank: 2, alpha: 4, targets: null}",
    ]
    assert cli.main(evaluated) == 0, capsys.readouterr().err
    assert len(RunFolder(tmp_path / "runs" / "b").episodes()) > 0
    # Interrupted after the first iteration, the same command ends with the same numbers.
    again = [part if part != "run_dir=runs/a" else "run_dir=runs/c" for part in run]
    from robot_forgetting.engine import train as training

    saved, calls = training.save_checkpoint, []

    def once(*arguments, **options):
        saved(*arguments, **options)
        calls.append(1)
        raise KeyboardInterrupt

    training.save_checkpoint = once
    try:
        assert cli.main(again) == 130 and calls
    finally:
        training.save_checkpoint = saved
    assert cli.main(again) == 0, capsys.readouterr().err
    resumed = [
        dict(row, seconds=None, collect_seconds=None) for row in RunFolder(tmp_path / "runs" / "c").rows("train")
    ]
    assert resumed == rows


def test_check_of_a_language_model(here, capsys):
    assert cli.main(["check", "policy=small", "hydra.searchpath=[file://mine]"]) == 0, capsys.readouterr().out


def test_a_language_model_on_a_robot_task(here, capsys):
    assert cli.main(["run", "policy=small", "hydra.searchpath=[file://mine]", "task=parity_mnist", "method=sft"]) == 2
    assert "disagree on action_mode: 'text' against 'label'" in capsys.readouterr().err
