"""Chat templates of other people's models: how a turn ends, no place for a system message, faults, endless loops."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_lm import TEMPLATE, chats, noise, tiny_lm, tokenizer

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm import chat as causal_lm_chat
from robot_forgetting.policies.causal_lm.chat import ChatTemplate, Turn
from robot_forgetting.policies.causal_lm.hidden import Prompts

OPEN = "{% if add_generation_prompt %}"
# (what the template writes around an answer, template); <|im_end|> has number 2, <|endoftext|> 0
TURNS = {
    "chatml": (Turn("", "", 2), TEMPLATE),
    "space before the answer": (
        Turn(" ", " ", 2),
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}",
    ),
    "empty thoughts": (
        Turn("<think>\n\n</think>\n\n", "\n", 2),
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ '\n' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        + OPEN
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "no token of its own": (
        Turn("", "", 0),
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        + OPEN
        + "assistant: {% endif %}",
    ),
}


def words_ending_otherwise():
    """The tiny tokenizer with <|endoftext|> as end-of-text token, as many models' folders name it."""
    made = tokenizer()
    made.eos_token = "<|endoftext|>"
    return made


@pytest.mark.parametrize("kind", TURNS)
def test_targets_are_whole_turns_of_the_template(kind):
    expected, template = TURNS[kind]
    words = words_ending_otherwise()
    words.chat_template = template
    made = ChatTemplate(words, "tiny", {words.eos_token_id})
    assert made.turn == expected
    chat = [{"role": "user", "content": "What is the sum?"}]
    whole = made.render([*chat, {"role": "assistant", "content": "Answer: B"}], open_turn=False)
    (prompt,), (target,) = Prompts(made, 100).read([chat], 0), Prompts(made, 100).answers(["Answer: B"])
    written = words.decode([*prompt, *target]).removesuffix("<|endoftext|>")
    assert whole.startswith(written)
    assert whole[len(written) :] in ("", "\n")


@pytest.mark.parametrize("kind", TURNS)
def test_what_is_encoded_is_decoded_and_sampling_stops_there(kind, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TURNS[kind][1])
    policy = tiny_lm(chat_template=str(file), max_new_tokens=48)
    texts = ["B", "", " two\n", "is: A or C? <|im_start|>"]
    action = policy.encode(texts)
    assert policy.decode(action) == texts
    assert policy.turn.end in policy.stops
    assert [row[mask][-1].item() for row, mask in zip(action.tokens, action.mask, strict=True)] == [policy.turn.end] * 4
    ends = torch.isin(action.tokens, torch.tensor(sorted(policy.stops))) & action.mask
    assert ends.sum(1).tolist() == [1] * 4


def test_qwens_own_tokenizer_learns_qwens_own_end():
    """Qwen's base models name <|endoftext|>, their template ends turns with <|im_end|>."""
    from transformers import AutoTokenizer

    folder = Path(os.environ.get("ROBOT_FORGETTING_DATA", "../shared/data")) / "qwen_tokenizer"
    if not folder.is_dir():
        pytest.skip("Qwen's tokenizer is not here")
    words = AutoTokenizer.from_pretrained(folder)
    words.eos_token, words.chat_template = "<|endoftext|>", TEMPLATE
    made = ChatTemplate(words, "qwen", {words.eos_token_id})
    (target,) = Prompts(made, 100).answers(["B"])
    assert words.convert_ids_to_tokens(target) == ["B", "<|im_end|>"]


def test_an_answer_tag_that_is_a_special_token_stays_in_the_text():
    policy = tiny_lm()
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    text = "<answer>B</answer>"
    action = policy.encode([text])
    assert action.mask.sum() == 4
    assert policy.decode(action) == [text]


def test_thoughts_of_ones_own_stand_where_the_templates_empty_ones_would(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TURNS["empty thoughts"][1])
    policy = tiny_lm(chat_template=str(file))
    texts = ["B", "<think>\none and one\n</think>\n\nB"]
    action = policy.encode(texts)
    assert policy.decode(action) == texts
    read = [policy.tokenizer.decode(row[mask]) for row, mask in zip(action.tokens, action.mask, strict=True)]
    assert read == ["<think>\n\n</think>\n\nB\n<|im_end|>", f"{texts[1]}\n<|im_end|>"]


# ---- system messages

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
IGNORES = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES, IGNORES])
def test_a_system_message_without_a_place_goes_before_the_question_and_that_is_said(template, capsys):
    words = tokenizer()
    words.chat_template = template
    made = ChatTemplate(words, "tiny", {2})
    chat = [{"role": "system", "content": "Answer in tags."}, {"role": "user", "content": "one plus two"}]
    expected = "<|im_start|>user\nAnswer in tags.\n\none plus two<|im_end|>\n<|im_start|>assistant\n"
    assert [made.render(chat), made.render(chat)] == [expected, expected]
    assert made.render(chat[:1]).startswith("<|im_start|>user\nAnswer in tags.<|im_end|>")
    assert capsys.readouterr().err.count("takes no system message") == 1


def test_a_system_message_with_a_place_stays_there(capsys):
    words = tokenizer()
    chat = [{"role": "system", "content": "Answer in tags."}, {"role": "user", "content": "one plus two"}]
    expected = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(words, "tiny", {2}).render(chat) == expected
    assert not capsys.readouterr().err


# ---- faults


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no chats') }}", "TemplateError: no chats"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ [].append.__globals__ }}", "SecurityError"),
        ("Hello", "leaves the question out"),
        ("{{ messages[0]['content'] }}", "leaves an assistant's answer out"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}", "steps"),
        ("{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(99) }}", "steps"),
    ],
)
def test_a_template_that_fails_is_one_line(template, said, tmp_path, monkeypatch):
    monkeypatch.setattr(causal_lm_chat, "MOST_STEPS", 50_000)
    monkeypatch.setattr(causal_lm_chat.limited.__wrapped__, "__defaults__", (50_000,))
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(UserError, match=said) as error:
        tiny_lm(chat_template=str(file))
    assert "policy.chat_template=FILE.jinja" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_limit_is_far_from_what_a_long_chat_needs_and_leaves_no_trace():
    import sys

    words = tokenizer()
    made = ChatTemplate(words, "tiny", {2})
    before = sys.gettrace()
    made.render([{"role": ("user", "assistant")[index % 2], "content": "two"} for index in range(10_001)])
    assert sys.gettrace() is before


def test_a_long_completion_is_the_same_with_another_name_of_the_end(tmp_path):
    """Where the template's end is the end-of-text token, nothing has changed."""
    policy = tiny_lm()
    assert policy.turn == Turn("", "", policy.tokenizer.eos_token_id)
    assert "turn" not in policy.config
    action = policy.act(chats(), noise=noise(3))
    assert len(policy.decode(action)) == 3


def test_answers_that_do_not_end_are_counted(capsys):
    from tiny_lm import LettersTask

    from robot_forgetting.engine.evaluate import evaluate

    policy, task = tiny_lm(max_new_tokens=3), LettersTask()
    seeds = list(range(1_000_000, 1_000_012))
    whole = policy.encode(["yes", "no"])
    assert policy.cut_off(whole) == [False, False]
    assert policy.cut_off(whole[:, :1]) == [True, True]
    found = list(evaluate(policy, task, seeds, temperature=1.0, num_envs=4))
    cut = sum(bool(episode.flags.get("answer_cut")) for episode in found)
    ended = [policy.cut_off(episode.actions[0]) == [bool(episode.flags.get("answer_cut"))] for episode in found]
    assert all(ended) and cut > 6
    assert f"letters: {cut} of 12 answers were stopped by their longest length" in capsys.readouterr().err
