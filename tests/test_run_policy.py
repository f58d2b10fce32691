"""checkpoint=RUN: the run's policy with the settings it was trained with, or one line; and a second stage from it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy import ToyPolicy, ToyTask
from toy_runs import BUDGET, run, same, summary

from robot_forgetting.cli import command_line as cli
from robot_forgetting.engine import experiment
from robot_forgetting.engine.one_task import evaluate_command
from robot_forgetting.engine.run_policy import check_settings
from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import read_json, write_json
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import latest_checkpoint, load_weights
from robot_forgetting.records.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_renderer")

COMMON = ["task=skill_over", "prior=[skill_sort]", "budget=tiny", "processes=1"]
LORA = "policy.lora={rank: 2, alpha: 16}"
# Fast enough to change what the policy answers within two steps.
FAST = ["method.optimiser.learning_rate=3e-2", "budget.text_warmup_steps=0"]
TRAINED = ["run", *COMMON, "policy=qwen-nano", LORA, *FAST]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A finished LoRA run of qwen-nano, made by the command line."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robot_forgetting.machine.doctor.render_backend", dict)
        patch.setattr(sys, "path", list(sys.path))
        assert cli.main([*TRAINED, f"run_dir={folder}"]) == 0
    return folder


def outcomes(folder: Path, **where) -> dict:
    rows = RunFolder(folder).episodes()
    kept = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return {(row["task"], row["decode"], row["seed"]): (row["success"], row["flags"]) for row in kept}


def evaluated(tuned: Path, place: Path, *more: str, code: int = 0) -> RunFolder | None:
    command = ["evaluate", "task=skill_sort", "budget=tiny", "processes=1", f"checkpoint={tuned}", f"run_dir={place}"]
    assert cli.main([*command, *more]) == code
    return None if code else RunFolder(place)


@pytest.mark.parametrize(
    "more",
    [[], ["policy=qwen-nano"], ["policy=qwen-nano", "policy.lora={rank: 2, alpha: 16}"], ["policy.batch_rows=3"],
     ["++policy.lora.alpha=16"]],
)  # fmt: skip
def test_settings_come_from_the_record(tmp_path, tuned, capsys, more):
    folder = evaluated(tuned, tmp_path / "out", *more)
    lora = folder.config()["policy"]["lora"]
    assert (lora["rank"], lora["alpha"]) == (2, 16) and folder.run["policy"] == "qwen-nano"
    after = outcomes(tuned, task="skill_sort", stage=1, iteration=2)
    assert outcomes(folder.path, decode="sampled") == {k: v for k, v in after.items() if k[1] == "sampled"}
    assert after != outcomes(tuned, task="skill_sort", stage=0)  # else this would show nothing
    state = {"stage": 1, "stages": 1, "iteration": 2, "iterations": 2, "status": "finished"}
    assert folder.run["checkpoint_state"] == state | {"trained_on": ["skill_over"]}
    assert "policy: qwen-nano with lora {'rank': 2, 'alpha': 16" in capsys.readouterr().err


def test_another_setting_on_purpose(tmp_path, tuned):
    folder = evaluated(tuned, tmp_path / "out", "++policy.lora.alpha=64")
    assert folder.config()["policy"]["lora"]["alpha"] == 64


@pytest.mark.parametrize("verb", ["evaluate", "record", "run"])
@pytest.mark.parametrize(
    "more, words",
    [
        (["policy=qwen-nano", "policy.lora={rank: 2, alpha: 64}"], "policy.lora.alpha=16, this command says 64; leave"),
        (["policy=qwen-nano", "policy.lora={rank: 8, alpha: 16}"], "or write ++policy.lora.rank=8 to"),
        (["policy.lora=null"], "this command says null"),
        (["policy=mlp"], "was made with policy=qwen-nano, from which policy=mlp differs"),
        (["policy.dtype=bfloat16"], "policy.dtype=float32, this command says bfloat16"),
    ],
)
def test_a_contradiction_is_one_line(tmp_path, tuned, capsys, verb, more, words):
    assert cli.main([verb, *COMMON, f"checkpoint={tuned}", f"run_dir={tmp_path / 'out'}", *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["pretrain", "check", "reproduce", "report", "list"])
def test_no_verb_ignores_it(tmp_path, tuned, capsys, verb):
    assert cli.main([verb, f"checkpoint={tuned}"]) == 2
    assert f"{verb} does not use checkpoint=; run, evaluate, record do" in capsys.readouterr().err


def changed(tuned: Path, place: Path, **policy) -> Path:
    """The run with another record of its policy, as a stranger may have written it."""
    shutil.copytree(tuned, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["policy"] |= policy
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    return place


@pytest.mark.parametrize(
    "policy", [{"_target_": "os.mkdir"}, {"lora": {"_target_": "os.mkdir", "path": "x"}}, {"context": "${oc.env:HOME}"}]
)
def test_no_code_of_a_record_is_run(tmp_path, tuned, capsys, policy):
    evaluated(changed(tuned, tmp_path / "strange", **policy), tmp_path / "out", code=2)
    assert "a record's code is not run" in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [("../task/gsm8k", "names no policy"), ("mine", "hydra.searchpath=")])
def test_a_policy_that_is_not_here(tmp_path, tuned, capsys, name, words):
    place = changed(tuned, tmp_path / "strange")
    write_json(place / "run.json", read_json(place / "run.json") | {"policy": name})
    evaluated(place, tmp_path / "out", code=2)
    assert words in capsys.readouterr().err


def test_a_teacher_of_other_settings(tmp_path, tuned, capsys):
    command = ["run", *COMMON, "policy=qwen-nano", "policy.lora={rank: 2, alpha: 64}", "method=on_policy_distillation"]
    assert cli.main([*command, f"method.teacher_run={tuned}", f"run_dir={tmp_path / 'out'}"]) == 2
    assert "was made with policy.lora.alpha=16, this command says 64; give both" in capsys.readouterr().err
    check_settings(RunFolder(tuned), RunFolder(tuned).config(), "method.teacher_run")


# ---- how far the run was


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A toy run that was interrupted after three of four iterations."""

    def interrupting(self, stage, iteration):
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Experiment, "interim_evaluation", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    return tmp_path / "stopped"


def test_an_unfinished_run_is_said_to_be_one(tmp_path, stopped, capfd):
    arguments = {
        "policy": ToyPolicy(seed=1), "task": ToyTask(), "run_dir": tmp_path / "out", "checkpoint": str(stopped),
        "config": {}, "names": {}, "seed": 0, "episodes": 5, "seed_start": 20, "temperature": 1.0, "num_envs": 3,
        "budget": BUDGET,
    }  # fmt: skip
    assert evaluate_command(**arguments) == 0
    state = RunFolder(tmp_path / "out").run["checkpoint_state"]
    assert (state["iteration"], state["iterations"], state["status"]) == (3, 4, "interrupted")
    assert "stopped is at iteration 3 of 4 (interrupted)" in capfd.readouterr().err


def test_nothing_goes_on_from_an_unfinished_run(tmp_path, stopped):
    words = "checkpoint=.* is at iteration 3 of 4 .interrupted.; finish it first"
    with pytest.raises(UserError, match=words):
        run(tmp_path / "next", checkpoint=str(stopped))
    with pytest.raises(UserError, match=words.replace("checkpoint", "method.teacher_run")):
        run(tmp_path / "next", config={"method": {"teacher_run": str(stopped)}})
    assert not (tmp_path / "next").exists()


# ---- a second stage


def test_a_second_stage(tmp_path):
    first = run(tmp_path / "first", "sft")
    options = {"checkpoint": str(first.path), "task": ToyTask("mirror"), "prior": [ToyTask("reach")]}
    second = run(tmp_path / "second", **options)
    header = second.run
    assert header["checkpoint"] == str(first.path) and header["checkpoint_state"]["trained_on"] == ["reach"]
    assert header["fingerprint"] != first.run["fingerprint"]
    assert outcomes(second.path, stage=0) == outcomes(first.path, stage=1, iteration=4)
    assert {(row["stage"], *row["trained_on"]) for row in second.episodes()} == {(0, "reach"), (1, "reach", "mirror")}
    # Its divergence is that from the policy it began with.
    kl = [row for row in summary(second)["divergence"] if row["measure"] == "forward_kl"]
    policy = ToyPolicy(seed=1)
    load_weights(policy, latest_checkpoint(second))
    assert all(row["value"] > 0 for row in kl if row["states"] == "base" and row["task"] == "mirror")
    third = run(tmp_path / "third", checkpoint=str(second.path), task=ToyTask("reach"), prior=[ToyTask("mirror")])
    assert third.run["checkpoint_state"]["trained_on"] == ["reach", "mirror"]


def test_a_second_stage_is_continued(tmp_path):
    first = run(tmp_path / "first", "sft")
    whole = run(tmp_path / "whole", checkpoint=str(first.path))

    def interrupting(self, stage, iteration):
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Experiment, "interim_evaluation", interrupting)
        run(tmp_path / "elsewhere" / "parts", checkpoint=str(first.path))
    same(run(tmp_path / "elsewhere" / "parts", checkpoint=str(first.path)), whole)


def test_adapters_that_were_trained_before_are_the_base_of_a_second_stage(tmp_path, tuned, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["run", *COMMON, f"checkpoint={tuned}", "method.optimiser.learning_rate=1e-2"]
    assert cli.main([*command, f"run_dir={tmp_path / 'next'}"]) == 0
    second = RunFolder(tmp_path / "next")
    assert second.config()["policy"]["lora"]["alpha"] == 16
    assert outcomes(second.path, stage=0) == outcomes(tuned, stage=1, iteration=2)
    # Killed in the last moment, and continued: the base is found again.
    (second.path / "summary.json").rename(tmp_path / "summary.json")
    assert cli.main([*command, f"run_dir={tmp_path / 'next'}"]) == 0
    assert read_json(second.path / "summary.json") == read_json(tmp_path / "summary.json")


def test_keep_as_base(tmp_path):
    policy = MLPPolicy(sizes=(4, 3, 2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    policy.keep_as_base()
    assert all(torch.equal(policy.network()[key], value) for key, value in policy.base_network().items())

    class Without(ToyPolicy):
        keep_as_base = Policy.keep_as_base

    first = run(tmp_path / "first", "sft")
    with pytest.raises(UserError, match="policy 'toy' cannot go on from a finished run: it lacks `keep_as_base`"):
        run(tmp_path / "second", checkpoint=str(first.path), policy=Without(seed=1))
