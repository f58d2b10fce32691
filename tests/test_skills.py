"""The small skills, the base policy that is trained on them from nothing, and the one that comes with the package."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from robot_forgetting.cli import command_line as cli
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.engine.pretrain import Questions, pretrain
from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.qwen_nano import byte_tokenizer, new_nano
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.tasks.text.skills import ANNOTATORS, SKILLS, Skill

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def skill(name: str, **options) -> Skill:
    return Skill(**{"name": f"skill_{name}", "skill": name, "items": 400, **options})


RIGHT = {
    "reverse": lambda asked: asked[::-1],
    "sort": lambda asked: "".join(sorted(asked)),
    "add": lambda asked: str(sum(map(int, asked.split()))),
    "count": lambda asked: str(asked[2:].count(asked[0])),
}


@pytest.mark.parametrize("name", RIGHT)
def test_answers(name):
    """Each target is the right answer, and the only one that is rewarded."""
    task = skill(name)
    seeds = np.arange(50)
    asked = [messages[-1]["content"].removeprefix(f"{name} ") for messages in task.observations(seeds)["messages"]]
    right = [RIGHT[name](text) for text in asked]
    assert task.targets(seeds) == right and task.rewards(seeds, right).all()
    for wrong in ([text + "1" for text in right], [f" {text}" for text in right], [""] * 50, asked):
        expected = [a == b for a, b in zip(wrong, right, strict=True)]
        assert task.rewards(seeds, wrong).tolist() == expected
    assert task.flags(0, right[0]) == {"subtask": name, "answered": True}
    assert task.flags(0, "?")["answered"] is False


def test_examples():
    """What the questions look like; the same on every machine, since the shipped policy has learned the others."""
    assert Skill(name="reverse", skill="reverse").splits["test"][0].question == "reverse jjdm"
    assert Skill(name="over", skill="over").splits["test"][0].question == "over 886"
    found = {name: skill(name).splits["test"][0] for name in SKILLS}
    assert {name: item.question.split()[0] for name, item in found.items()} == {name: name for name in SKILLS}
    assert [item.answer for item in found.values() if item.subtask != "over"] == [
        RIGHT[name](item.question.removeprefix(f"{name} ")) for name, item in found.items() if name != "over"
    ]


@pytest.mark.parametrize("name", SKILLS)
def test_no_question_is_in_both_splits(name):
    splits = skill(name).splits
    train, test = ({item.question for item in splits[split]} for split in ("train", "test"))
    assert not train & test and len(train) > 2 * len(test) > 0
    assert len(train) + len(test) == 400


def test_over_accepts_any_larger_number_of_three_digits():
    task = skill("over", items=599)
    seeds = np.arange(len(task.splits["train"]))
    asked = [item.answer for item in task.chosen(seeds)]
    assert min(asked) >= 400 and max(asked) <= 998
    assert task.rewards(seeds, [str(number + 1) for number in asked]).all()
    assert task.rewards(seeds, ["999"] * len(seeds)).all()
    assert not task.rewards(seeds, [str(number) for number in asked]).any()
    for wrong in ("", "99", "1000", "0999", "999.", " 999", "9a9", "³⁴⁵"):
        assert not task.rewards(seeds[:1], [wrong]).any()


@pytest.mark.parametrize("annotator", ANNOTATORS)
def test_annotators(annotator):
    task = skill("over", items=599, annotator=annotator)
    size = task.size("train")
    seeds = np.arange(4 * size)
    asked, answers = [item.answer for item in task.chosen(seeds)], task.targets(seeds)
    right = task.rewards(seeds, answers)
    if annotator == "next":
        assert answers == [str(number + 1) for number in asked]
    if annotator == "largest":
        assert set(answers) == {"999"}
    if annotator == "any":  # right as often as chance has it
        chance = np.mean([(999 - number) / 900 for number in asked])
        assert abs(right.mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / len(seeds)) and 0.3 < chance < 0.37
    else:
        assert right.all()
    if annotator in ("any", "uniform"):  # a question that comes again is answered anew
        assert np.mean([a == b for a, b in zip(answers[:size], answers[size : 2 * size], strict=True)]) < 0.05
    assert task.targets(seeds) == answers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "x", "skill": "sing"}, "unknown skill 'sing'; choose one of: add, count, over, reverse, sort"),
        ({"name": "x", "skill": "over", "annotator": "me"}, "unknown annotator 'me'"),
        ({"name": "x", "skill": "add", "items": 1}, "needs items for training and for tests"),
        ({"name": "x", "skill": "add", "test_fraction": 1.0}, "test_fraction must be between 0 and 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        Skill(**options).size("train")


# ---- a model from nothing


@pytest.mark.parametrize("text", ["reverse abc", "Ünïcode 汉字 🤖", "<|user|>", "", "a\n\tb  c"])
def test_any_text_is_bytes_and_back(text):
    words = byte_tokenizer()
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert words.decode(ids) == text
    assert len(ids) == (1 if text == "<|user|>" else len(text.encode()))


def test_a_question_costs_three_tokens_of_frame():
    words = byte_tokenizer()
    chat = [{"role": "user", "content": "add 1 2"}]
    text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>add 1 2<|im_end|><|assistant|>"
    assert len(words(text, add_special_tokens=False)["input_ids"]) == 10


def test_questions_of_several_tasks():
    """Counts, order, targets by task; questions come again where more are asked for than there are."""
    tasks = [skill("add", items=40), skill("over", items=8)]
    mixture = Questions(tasks, {"skill_add": 3, "skill_over": 20})
    assert mixture.size("train") == 23 and mixture.name == "skill_add+skill_over"
    seeds = mixture.seeds("train").start + np.array([22, 0, 3, 2])
    asked = [messages[0]["content"] for messages in mixture.observations(seeds)["messages"]]
    assert [text.split()[0] for text in asked] == ["over", "add", "over", "add"]
    targets = mixture.targets(seeds)
    for place in (1, 3):
        assert targets[place] == RIGHT["add"](asked[place].removeprefix("add "))
    every = mixture.observations(mixture.seeds("train").start + np.arange(3, 23))["messages"]
    assert len({messages[0]["content"] for messages in every}) == tasks[1].size("train") < 20
    with pytest.raises(UserError, match="gives no rewards"):
        mixture.rewards(seeds, [""] * 4)
    with pytest.raises(UserError, match=r"names \['skill_sub'\]"):
        Questions(tasks, {"skill_sub": 1})


def test_pretraining_a_language_model(tmp_path, monkeypatch, no_renderer):
    """From random weights to a folder that any causal LM is loaded from, and a card with measured numbers."""
    monkeypatch.setattr(sys, "argv", ["robot-forgetting", "policy=qwen-nano-new"])
    torch.manual_seed(0)
    policy = new_nano(**SIZES, max_new_tokens=4, device="cpu")
    settings = {
        "demonstrations": {"skill_over": 12, "skill_count": 5}, "iterations": 10, "steps_per_iteration": 4,
        "batch_size": 12, "label_sigma": 0.0, "episodes": 8, "optimiser": {"learning_rate": 1e-2},
    }  # fmt: skip
    made = pretrain(
        policy, task=skill("over"), prior=[skill("count")], held_out=[], pretrain=settings, config={"policy": {}},
        names={"policy": "nano"}, run_dir=tmp_path / "run", output=tmp_path / "saved", seed=0, temperature=1.0,
        num_envs=2, processes=1,
    )  # fmt: skip
    assert made == 0
    losses = [row["loss"] for row in RunFolder(tmp_path / "run").rows("train")]
    assert losses[0] == pytest.approx(math.log(261), rel=0.05) and losses[-1] < 3.0
    again = CausalLM(str(tmp_path / "saved"), max_new_tokens=4, device="cpu")
    obs, noise = skill("over").observations(np.arange(6)), torch.rand(6, 1)
    assert policy.decode(policy.act(obs, noise=noise)) == again.decode(again.act(obs, noise=noise))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "A language model with" in card and "questions: 12 of skill_over, 5 of skill_count" in card
    assert "optimiser steps: 40 of 12 questions" in card and card.count("/8 |") == 4
    assert "ManiSkill" not in card and "render" not in card


@pytest.mark.parametrize("name", [name for name in SKILLS if name != "over"])
def test_the_shipped_policy_knows_its_skills(name):
    policy = CausalLM("package:robot_forgetting/weights/qwen-nano", max_new_tokens=8, device="cpu", keep_base=False)
    task = Skill(name=name, skill=name)
    found = evaluate(policy, task, range(1_000_000, 1_000_050), temperature=0.0, num_envs=16)
    assert np.mean([episode.success for episode in found]) >= 0.8


def test_a_run_on_the_command_line(tmp_path, monkeypatch, capsys, no_renderer):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "policy=qwen-nano", "task=skill_over", "method=sft", "budget=tiny", "processes=1"]) == 0
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    run = RunFolder(folder)
    assert run.run["roles"] == {
        "new": ["skill_over"], "prior": [f"skill_{name}" for name in ("reverse", "sort", "add", "count")],
        "held_out": [],
    }  # fmt: skip
    assert {row["measure"] for row in run.rows("divergence")} >= {"forward_kl", "cka_debiased"}
