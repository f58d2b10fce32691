"""Whatever a model writes is read in a number of steps that grows with its length: 100 kB of the worst that we know."""

from __future__ import annotations

import sys

import pytest

from robot_forgetting.tasks.text.equations import parse_equation, same_equation
from robot_forgetting.tasks.text.math import last_boxed, same_answer
from robot_forgetting.tasks.text.science import FIRST_LETTER, LETTER, TAG
from robot_forgetting.tasks.text.tool_use import _multiset, parse_calls

SIZE = 100_000
CALL = "Action: f\nAction Input: "


def long(unit: str, end: str = "") -> str:
    return unit * (SIZE // len(unit)) + end


ANSWERS = {
    "blanks": long(" ", "x"),
    "empty lines": long("\n", "x"),
    "blanks in a line": long(" " * 99 + "\n"),
    "boxes that stay open": long("\\boxed{"),
    "boxes within boxes": long("\\boxed{") + long("}"),
    "braces": long("{") + long("}"),
    "digits": long("7"),
    "digits and blanks": long("7 "),
    "coefficients": long("7", "H2 = O2"),
    "pluses": long("+a", " = b"),
    "pluses apart": long("a + ", "a = b"),
    "arrows": long("-"),
    "arrows that end": long("->"),
    "states": long("(a"),
    "texts": long("\\text{"),
    "answers that stay open": long("<answer>"),
    "answers": long("<answer>A</answer>"),
    "an answer of blanks": "<answer>" + long(" ") + "</answer>",
    "letters": "A" + long(")."),
    "letters and blanks": "A" + long(" ", "x"),
    "actions": long("Action: f\n"),
    "an action of blanks": "Action: f" + long(" ", "x"),
    "actions far from their inputs": ("Action: f" + "\n" * 400 + "x\n") * (SIZE // 411),
    "calls": long(CALL + "{}\n"),
    "calls without an end": long(CALL + '{"a": '),
    "lists in lists": CALL + '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "lists in few lists": CALL + '{"a": ' + "[" * 600 + "]" * 600 + "}",
    "dicts in dicts": CALL + '{"a":' * 300 + "1" + "}" * 300,
    "minus": CALL + long("-", "1"),
    "parentheses": CALL + long("("),
    "a long number": CALL + '{"a": ' + long("7", "}"),
}


def steps_of(function, *arguments) -> int:
    """Function calls that the Python code makes; patterns and other C code are not among them."""
    count = 0

    def step(frame, event, argument):
        nonlocal count
        count += 1

    before = sys.getprofile()
    sys.setprofile(step)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return count


READERS = {
    "boxed": last_boxed,
    "equation": parse_equation,
    "calls": lambda text: (calls := parse_calls(text)) is None or _multiset(calls, frozenset()),
    "tag": TAG.findall,
    "letter": LETTER.fullmatch,
    "first letter": FIRST_LETTER.match,
    "math": lambda text: same_answer(last_boxed(text) or text, "72"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_long_answers_end(reader, kind):
    assert steps_of(READERS[reader], ANSWERS[kind]) < 40 * SIZE


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\fbox{3}", "3"),
        (r"\boxed{1} then \fbox{2}", "1"),
        (r"\fbox{2} then \boxed{1}", "1"),
        (r"\fboxed{4}", "4"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"} } \boxed{1}", "1"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed { 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\mbox{3}", None),
        ("3", None),
    ],
)
def test_last_boxed_by_hand(text, content):
    assert last_boxed(text) == content


def test_a_coefficient_of_thousands_of_digits_is_no_equation():
    assert parse_equation("7" * 1900 + "H2 = O2") is not None
    assert parse_equation("7" * 5000 + "H2 = O2") is None
    assert same_equation("2 H2\n +  O2 =\t2H2O", "2H2 + O2 = 2H2O")


def test_arguments_that_are_nested_too_deep_are_no_call():
    assert parse_calls(CALL + '{"a": ' + "[" * 90 + "]" * 90 + "}") is not None
    assert parse_calls(CALL + '{"a": ' + "[" * 600 + "]" * 600 + "}") is None
