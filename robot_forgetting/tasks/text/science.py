"""Chemistry questions: SciKnowEval, chemistry, level 3 (arXiv 2406.09098), as RL's Razor's science task.

2,400 items in six files: five of multiple choice with four options (2,100), one of equations to balance (300). The
paper does not say which it used, how it put the questions, nor how it split them; the choices here:

* prompt, ``answer_format: tags``: after the closest public implementation (SDPO, of the same group): the system message
  asks for <reasoning> and then <answer> tags, the user message is the question, "A: ..." options and "Please reason
  step by step." The wording of the system message is ours. ``kinds: [choice]`` leaves the equations out, as there.
* ``answer_format: letter``: the completion is the bare answer, a letter or an equation; two tokens make reinforcement
  learning affordable on a CPU.
* split: ``test_fraction`` of the questions by a hash of their text and the number 42 (see ``text.divide``).
* targets without a teacher: the bare answer in the format asked for, no reasoning (the paper's are GPT-4o's).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.ranges import Count, Fraction
from robot_forgetting.tasks.sources import Row, find, read_rows
from robot_forgetting.tasks.text.equations import parse_equation, same_equation
from robot_forgetting.tasks.text.text_task import Item, TextTask, distinct, divide

FOLDER = "sciknoweval_chemistry_L3"
ORIGIN = "https://raw.githubusercontent.com/HICAI-ZJU/SciKnowEval/71991b6d4cfe71c29b0f829a1582d2a176b9e483/raw_data/Chemistry/L3"
FILES = (
    "molar_weight_calculation.jsonl",
    "molecular_property_calculation.jsonl",
    "molecule_structure_prediction.jsonl",
    "reaction_prediction.jsonl",
    "retrosynthesis.jsonl",
    "balancing_chemical_equation.jsonl",
)
KINDS = {"mcq-4-choices": "choice", "filling": "equation"}
FORMATS = ("tags", "letter")
LETTERS = tuple("ABCD")

SYSTEM = (
    "You answer questions of chemistry. Work the answer out between <reasoning> and </reasoning>. Then give {what}, "
    "and nothing else, between <answer> and </answer>."
)
ASKED = {"choice": "the letter of the right option", "equation": "the balanced equation"}
BARE = {
    "choice": "Reply with the letter of the right option and nothing else.",
    "equation": "Reply with the balanced equation and nothing else.",
}
TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
LETTER = re.compile(r"\(?([A-Da-d])\)?[.:]?")
# The bare letter, or one that begins a line "B. 12.3": what follows a lone capital must not make a sentence of it.
FIRST_LETTER = re.compile(r"\(?([A-D])(?:[).:,]*\s*$|[).:,]\s|\s*\n)")


class Science(TextTask):
    """Success: the right letter; for equations the same terms with the same balance.

    kinds: which of 'choice' and 'equation'; answer_format: 'tags' or 'letter', see the module
    longest: characters of a question with its options; longer ones are left out (molecules' names can fill a page)
    """

    def __init__(
        self,
        name: str = "science",
        kinds: Sequence[str] = ("choice", "equation"),
        answer_format: str = "tags",
        test_fraction: Fraction = 0.1,
        longest: Count | None = None,
        limit: Count | None = None,
        teacher=None,
    ):
        super().__init__(name, limit, teacher)
        check_choice("answer_format", answer_format, FORMATS)
        for kind in kinds:
            check_choice("kind of question", kind, ASKED)
        if not kinds:
            raise UserError(f"task '{name}' needs at least one of kinds: {', '.join(ASKED)}")
        self.kinds, self.answer_format, self.test_fraction = tuple(kinds), answer_format, test_fraction
        self.longest = longest

    def settings(self) -> dict:
        settings = {"kinds": list(self.kinds), "answer_format": self.answer_format, "test_fraction": self.test_fraction}
        return settings | ({} if self.longest is None else {"longest": self.longest})

    def load(self) -> dict[str, list[Item]]:
        rows = [row for file in FILES for row in read_rows(find(FOLDER, [file], ORIGIN))]
        items = [self._item(row) for row in rows if self._kind(row) in self.kinds and self._fits(row)]
        return divide(distinct(self.name, items), self.test_fraction)

    def correct(self, completion: str, item: Item) -> bool:
        given = self._given(completion, item)
        if given is None:
            return False
        return given == item.answer if item.answer in LETTERS else same_equation(given, item.answer)

    def answered(self, completion: str, item: Item) -> bool:
        return self._given(completion, item) is not None

    def wrong_answers(self, seeds: np.ndarray, drawn: np.ndarray) -> list[str | None]:
        """One of the three wrong letters, by a number in [0, 1); None for equations."""
        found = []
        for item, number in zip(self.chosen(seeds), drawn, strict=True):
            wrong = [letter for letter in LETTERS if letter != item.answer]
            found.append(self._bare(wrong[int(number * 3)]) if len(wrong) == 3 else None)
        return found

    def _given(self, completion: str, item: Item) -> str | None:
        """The answer that a completion gives, of whichever kind the item asks for; the last one counts."""
        is_choice = item.answer in LETTERS
        if self.answer_format == "tags":
            found = TAG.findall(completion)
            text = found[-1].strip() if found else ""
            match = LETTER.fullmatch(text) if is_choice else None
        else:
            text = completion.strip()
            match = FIRST_LETTER.match(text) if is_choice else None
        if is_choice:
            return match[1].upper() if match else None
        return text if parse_equation(text) else None

    def _bare(self, answer: str) -> str:
        return f"<answer>{answer}</answer>" if self.answer_format == "tags" else answer

    def _fits(self, row: Row) -> bool:
        return self.longest is None or len(row.get("question")) + sum(map(len, _options(row))) <= self.longest

    def _kind(self, row: Row) -> str:
        kind = row.get("type")
        if kind not in KINDS:
            raise UserError(f"{row.where}: unknown type '{kind}'; known are {', '.join(KINDS)}")
        return KINDS[kind]

    def _item(self, row: Row) -> Item:
        kind, question = self._kind(row), row.get("question").strip()
        if not question:
            raise UserError(f"{row.where}: the question is empty; repair or remove that row")
        asked, answer = _choice(row, question) if kind == "choice" else _equation(row, question)
        if self.answer_format == "tags":
            system = {"role": "system", "content": SYSTEM.format(what=ASKED[kind])}
            messages = (system, {"role": "user", "content": f"{asked}\n\nPlease reason step by step."})
        else:
            messages = ({"role": "user", "content": f"{asked}\n\n{BARE[kind]}"},)
        subtask = row.get("details", "subtask")
        return Item(question, messages, answer, subtask, self._bare(answer), row.where)


def _options(row: Row) -> list[str]:
    return [str(option) for option in row.get("choices", "text", kind=list)]


def _choice(row: Row, question: str) -> tuple[str, str]:
    letters, options = row.get("choices", "label", kind=list), row.get("choices", "text", kind=list)
    answer = row.get("answerKey")
    if letters != list(LETTERS) or len(options) != 4 or answer not in letters:
        raise UserError(f"{row.where}: not four options A to D with one of them right; repair or remove that row")
    lines = [f"{letter}: {option}" for letter, option in zip(letters, options, strict=True)]
    return "\n".join([question, *lines]), answer


def _equation(row: Row, question: str) -> tuple[str, str]:
    answer = row.get("answer").strip()
    if parse_equation(answer) is None:
        raise UserError(f"{row.where}: '{answer}' is no chemical equation; repair or remove that row")
    return question, answer
