"""Rewards of questions read the completion alone, and what counts as an answer."""

from __future__ import annotations

import numpy as np
import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.sources import VARIABLE
from robot_forgetting.tasks.text.equations import parse_equation, same_equation
from robot_forgetting.tasks.text.math import Math, last_boxed, same_answer
from robot_forgetting.tasks.text.science import Science
from robot_forgetting.tasks.text.text_task import Item
from robot_forgetting.tasks.text.tool_use import ToolUse, parse_calls
from tests.text_data import write_science


def question(answer) -> Item:
    return Item("Which?", ({"role": "user", "content": "Which?"},), answer, "part", None, "file, row 1")


def real_tasks() -> list:
    return [
        Science(),
        Science(answer_format="letter"),
        Math(),
        Math(source="gsm8k"),
        Math(test="math500"),
        ToolUse(),
    ]


def test_no_prompt_is_rewarded_and_every_target_is(shared, monkeypatch):
    """A public implementation looks for the answer in prompt and completion, and so rewards everything: a prompt lists
    A to D, shows the format, and may hold the answer."""
    monkeypatch.setenv(VARIABLE, str(shared / "data"))
    for task in real_tasks():
        for split in ("train", "test"):
            seeds = task.seeds(split).start + np.arange(task.size(split))
            chats = task.observations(seeds)["messages"]
            echoes = ["\n".join(message["content"] for message in chat) for chat in chats]
            assert not task.rewards(seeds, echoes).any(), task.name
            assert not task.rewards(seeds, [chat[-1]["content"] for chat in chats]).any(), task.name
            assert not task.rewards(seeds, [""] * len(seeds)).any(), task.name
            targets = task.targets(seeds)
            if targets[0] is not None:
                assert task.rewards(seeds, targets).all(), task.name
                assert task.flags(int(seeds[0]), targets[0]) == {
                    "subtask": task.splits[split][0].subtask,
                    "answered": True,
                }


@pytest.mark.parametrize("answer_format", ["tags", "letter"])
def test_only_the_right_letter_of_the_four_is_rewarded(tmp_path, monkeypatch, answer_format):
    """Whatever the prompt says: the right letter stands in every one of them."""
    write_science(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    task = Science(answer_format=answer_format, kinds=["choice"])
    seeds = np.arange(task.size("train"))
    shape = "<answer>{}</answer>" if answer_format == "tags" else "{}"
    rewards = np.stack([task.rewards(seeds, [shape.format(letter)] * len(seeds)) for letter in "ABCD"], 1)
    assert rewards.dtype == np.float32 and (rewards.sum(1) == 1).all()
    assert ["ABCD"[k] for k in rewards.argmax(1)] == [i.answer for i in task.splits["train"]]


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<reasoning>It is B.</reasoning><answer>B</answer>", True),
        ("<answer> (B). </answer>", True),
        ("<answer>\nb\n</answer>", True),
        ("<answer>A</answer> no: <answer>B</answer>", True),
        ("<answer>B</answer> no: <answer>A</answer>", False),
        ("<answer>B</answer> no: <answer></answer>", False),
        ("<answer>A<answer>B</answer>", True),
        ("<answer>A</answer>", False),
        ("<answer>A or B</answer>", False),
        ("<answer>BB</answer>", False),
        ("<answer>2</answer>", False),
        ("<answer>B: 2</answer>", False),
        ("<answer>the letter of the right option</answer>", False),
        ("<answer>B", False),
        ("B</answer>", False),
        ("B", False),
        ("The answer is B.", False),
        ("I cannot help with that.", False),
        ("", False),
    ],
)
def test_tagged_letters(completion, right):
    assert Science().correct(completion, question("B")) is right


@pytest.mark.parametrize(
    "completion, right, answered",
    [
        ("B", True, True),
        (" B.\n", True, True),
        ("(B)", True, True),
        ("B: 173.2", True, True),
        ("B\nbecause", True, True),
        ("A", False, True),
        ("A, B, C and D", False, True),
        ("Before we start", False, False),
        ("B molecules are", False, False),
        ("b", False, False),
        ("The answer is B", False, False),
        ("2", False, False),
        ("", False, False),
    ],
)
def test_bare_letters(completion, right, answered):
    task = Science(answer_format="letter")
    assert task.correct(completion, question("B")) is right
    assert task.answered(completion, question("B")) is answered


@pytest.mark.parametrize(
    "written, right",
    [
        ("2H2 + O2 = 2H2O", True),
        ("2H2+O2=2H2O", True),
        ("O2 + 2 H2 -> 2 H2O", True),
        ("4H2 + 2O2 → 4H2O(l)", True),
        ("H2 + 1/2O2 = H2O", True),
        ("2H₂ + O₂ ⟶ 2H₂O.", True),
        (r"$2\text{H}_2 + \text{O}_2 \rightarrow 2\text{H}_2\text{O}$", True),
        ("H2 + O2 = H2O", False),
        ("2H2 + O2 = 2HO", False),
        ("2H2O = 2H2 + O2", False),
        ("4H2 + O2 = 4H2O", False),
        ("2H2 + O2 + N2 = 2H2O + N2", False),
        ("2H2 + O2 = 2H2O = 2H2O", False),
        ("2H2 + O2", False),
        ("0H2 + O2 = 2H2O", False),
        ("1/0H2 + O2 = 2H2O", False),
        ("The equation is 2H2 + O2 = 2H2O", False),
        ("", False),
    ],
)
def test_equations(written, right):
    assert same_equation(written, "2H2 + O2 = 2H2O") is right
    assert Science().correct(f"<answer>{written}</answer>", question("2H2 + O2 = 2H2O")) is right


def test_charges_stay_whole():
    assert parse_equation("Mg{+2} + 2OH{-} = Mg(OH)2") == ({"Mg{+2}": 1, "OH{-}": 2}, {"Mg(OH)2": 1})
    assert same_equation("Mg{+2}+2OH{-}=Mg(OH)2", "Mg{+2} + 2OH{-} = Mg(OH)2")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"answer_format": "json"}, "unknown answer_format 'json'; choose one of: letter, tags"),
        ({"kinds": ["essay"]}, "unknown kind of question 'essay'"),
        ({"kinds": []}, "at least one of kinds"),
    ],
)
def test_unknown_settings_of_science(arguments, says):
    with pytest.raises(UserError, match=says):
        Science(**arguments)


@pytest.mark.parametrize("arguments", [{"source": "aime"}, {"test": "all"}])
def test_unknown_settings_of_math(arguments):
    with pytest.raises(UserError, match="unknown (source|test) '(aime|all)'; choose one of"):
        Math(**arguments)


def test_math_without_its_verifier_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'robot-forgetting\[llm\]'"):
        Math()


@pytest.mark.parametrize(
    "text, found",
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} then \boxed{unclosed", "3"),
        (r"\fbox{5} \boxed {6}", "6"),
        (r"\boxed{}", ""),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    "given, answer, right",
    [
        ("4", "n = 4", True),
        ("n=4", "4", True),
        (r"\dfrac{1}{2}", r"\frac12", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        (r"431\text{ units}", "431", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        ("(x-1)(x+1)", "x^2-1", True),
        (r"1 \times 10^{4}", "10000", True),
        (r"\text{Blue}", "blue", True),
        ("$65$", "65", True),
        ("-4", "4", False),
        ("4", "5", False),
        ("sixty-five", "65", False),
        ("1,2,3", "3", False),
        (r"\{1,2,3\}", "3", False),
        ("7 or 8", "7", False),
        ("(1,2)", "[1,2)", False),
        ("der", "red", False),  # the same letters, as a product the same
        (r"12 \times 34", "408", False),  # not worked out
        ("1+1", "2", False),
        ("", "4", False),
        (r"\frac{", "4", False),
        (r"\text{I do not know}", "4", False),
    ],
)
def test_math_answers(given, answer, right):
    assert same_answer(given, answer) is right
    assert Math().correct(rf"The problem says 4 or {answer}. \boxed{{{given}}}", question(answer)) is (
        right and "{" != given[-1:]
    )


CALLS = (
    [("search", {"city": "Rome", "limit": 3, "open": True}), ("search", {"city": "Oslo", "limit": 3})],
    frozenset({"api_key"}),
)
ROME = 'Action: search\nAction Input: {"city": "Rome", "limit": 3, "open": true}'
OSLO = 'Action: search\nAction Input: {"limit": 3, "city": "Oslo"}'


@pytest.mark.parametrize(
    "completion, right",
    [
        (f"Thought: two\n{ROME}\nThought: more\n{OSLO}", True),
        (f"{OSLO}\n{ROME}", True),
        (f"{ROME} and that is it.\n{OSLO} }}", True),
        (f"{ROME.replace('3', chr(34) + '3' + chr(34))}\n{OSLO.replace('3', '3.0')}", True),
        (f"{ROME.replace('true', chr(34) + 'True' + chr(34))}\n{OSLO}", True),
        (f"{ROME}\n{OSLO}".replace('"', "'").replace("true", "True"), True),
        (f"{ROME}\n" + OSLO.replace("Input: ", "Input: ```json\n") + "\n```", True),
        (f'{ROME[:-1]}, "api_key": "x", "note": "", "page": null}}\n{OSLO}', True),
        (f"{ROME}\nAction: `search`\nAction Input: {{'limit': 3, 'city': 'Oslo'}}", True),
        (ROME, False),
        (f"{ROME}\n{OSLO}\n{OSLO}", False),
        (f"{ROME.replace('Rome', 'Oslo')}\n{OSLO.replace('Oslo', 'Rome')}", False),  # merged arguments would be equal
        (f"{ROME}\n{OSLO.replace('search', 'find')}", False),
        (f"{ROME}\n{OSLO.replace('Oslo', 'oslo')}", False),
        (f"{ROME}\nAction: search\nAction Input: Oslo", False),
        (f"{ROME}\nAction: search\nAction Input: [3]", False),
        (f'{ROME}\nAction: search\nAction Input: {{"city": "Oslo", "limit": 3', False),
        ("search(city=Rome)", False),
        ("I cannot call functions.", False),
        ("", False),
    ],
)
def test_calls(completion, right):
    assert ToolUse().correct(completion, question(CALLS)) is right


def test_unreadable_arguments_are_no_answer():
    assert parse_calls("Action: a\nAction Input: {]") is None and parse_calls("hello") == []
    assert not ToolUse().answered("hello", question(CALLS)) and ToolUse().answered(ROME, question(CALLS))
