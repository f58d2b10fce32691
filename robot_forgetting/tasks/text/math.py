r"""Mathematics with a checkable answer: Open-Reasoner-Zero (arXiv 2503.24290), as RL's Razor's math task; also GSM8K.

The paper names neither Open-Reasoner-Zero's subset, nor the prompt, nor the split. Here: ``source: orz_57k`` (the
collection its authors trained on; or orz_72k, the extension to it), the problem followed by a request to put the final
answer into \boxed{}, and ``test_fraction`` of the problems held out by a hash of their text (see ``text.divide``). With
``test: math500`` the test items are the 500 problems of MATH that the same project evaluates on; training problems that
are among them are dropped.

The last \boxed{} (without one: \fbox{}) of a completion counts, whatever is said before. math-verify compares it with
the given answer: the same number, set, interval or formula however it is written. What it would let pass and we do
not: a word made of the same letters, and an expression left to be worked out where the answer is a number (\boxed{12
\times 34}).

Open-Reasoner-Zero gives no solutions: supervised methods need a teacher (the paper's is DeepSeek-R1). GSM8K does.
"""

from __future__ import annotations

import re

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.ranges import Count, Fraction
from robot_forgetting.tasks.sources import Row, find, read_rows
from robot_forgetting.tasks.text.text_task import Item, TextTask, distinct, divide, ordered, say_dropped, without

FOLDER = "open_reasoner_zero"
STEMS = {"orz_57k": "orz_math_57k_collected", "orz_72k": "orz_math_72k_collection_extended"}
ORIGINS = {
    "orz_57k": "hub:Open-Reasoner-Zero/orz_math_57k_collection",
    "orz_72k": "hub:Open-Reasoner-Zero/orz_math_72k_collection_extended",
    "gsm8k": "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data",
    "math500": "https://raw.githubusercontent.com/Open-Reasoner-Zero/Open-Reasoner-Zero/main/data",
}
SOURCES = ("orz_57k", "orz_72k", "gsm8k")
TESTS = ("held_out", "math500")
ASK = "Please reason step by step, and put your final answer within \\boxed{}."

# An operation between two numbers that is not the power of ten of scientific notation.
OPERATION = re.compile(r"\d\s*(?:\+|-|\*|\\times|\\cdot)\s*(?!10\s*\^)\d")
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
BRACE = re.compile(r"\\f?(boxed)\s*\{|\\(fbox)\s*\{|[{}]")
LONGEST, DEEPEST = 1000, 40  # of an answer that is compared: characters, and brackets of a kind
WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*")


class Math(TextTask):
    r"""Success: the last \boxed{} is the given answer. source, test: see the module."""

    def __init__(
        self,
        name: str = "math",
        source: str = "orz_57k",
        test: str = "held_out",
        test_fraction: Fraction = 0.1,
        limit: Count | None = None,
        teacher=None,
    ):
        super().__init__(name, limit, teacher)
        check_choice("source", source, SOURCES)
        check_choice("test", test, TESTS)
        _verifier()  # now, not after hours of sampling
        self.source, self.test, self.test_fraction = source, test, test_fraction

    def settings(self) -> dict:
        return {"source": self.source, "test": self.test, "test_fraction": self.test_fraction}

    def load(self) -> dict[str, list[Item]]:
        if self.source == "gsm8k":
            train, test = (
                [_gsm8k(row) for row in read_rows(find("gsm8k", [f"{split}.jsonl"], ORIGINS["gsm8k"]))]
                for split in ("train", "test")
            )
        else:
            stem = STEMS[self.source]
            names = [f"{stem}.json", f"{stem}.jsonl", f"{stem}.head.jsonl"]
            rows = read_rows(find(FOLDER, names, ORIGINS[self.source]))
            train, test = _filled(self.name, [_reasoner_zero(row) for row in rows]), None
        if self.test == "math500":
            test = [_math500(row) for row in read_rows(find(FOLDER, ["eval_data/math500.json"], ORIGINS["math500"]))]
        train = distinct(self.name, train)
        if test is None:
            return divide(train, self.test_fraction)
        test = distinct(self.name, test)
        return {"train": ordered(without(self.name, train, test)), "test": ordered(test)}

    def correct(self, completion: str, item: Item) -> bool:
        given = last_boxed(completion)
        return given is not None and same_answer(given, item.answer)

    def answered(self, completion: str, item: Item) -> bool:
        return bool(last_boxed(completion))


def last_boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds, braces matched; where there is none the last \fbox{...}; or None.

    So does Hendrycks' code, and lm-eval's after it.
    """
    opened: list[tuple[str, int]] = []  # of each open brace what stands before it, and where its content begins
    last: dict[str, tuple[int, int]] = {}  # content of the last box of each kind
    for match in BRACE.finditer(text):
        if match[0] != "}":
            opened.append((match[1] or match[2] or "", match.end()))
        elif opened:
            kind, start = opened.pop()
            last[kind] = max(last.get(kind, (-1, -1)), (start, match.start()))
    found = last.get("boxed") or last.get("fbox")
    return None if found is None else text[slice(*found)].strip()


def same_answer(given: str, answer: str) -> bool:
    """Whether ``given`` is ``answer``, both LaTeX or text without dollar signs around it; see the module."""
    given, answer = given.strip().strip("$").strip(), answer.strip().strip("$").strip()
    if not given or not answer:
        return False
    if len(given) > max(LONGEST, 2 * len(answer)) or max(map(given.count, "([{")) > max(DEEPEST, 2 * len(answer)):
        return False
    if _plain_text(given) == _plain_text(answer):
        return True
    if WORDS.fullmatch(_plain_text(answer)):
        return False
    if NUMBER.fullmatch(answer) and OPERATION.search(given):
        return False
    parse, verify = _verifier()
    return bool(verify(parse(answer), parse(given)))


def _plain_text(text: str) -> str:
    r"""Without \text{} around it, outer white space and case."""
    return " ".join(re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text).split()).casefold()


def _verifier():
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        raise UserError(
            "answers are compared by math-verify, which is missing; install it: pip install 'robot-forgetting[llm]'"
        ) from None
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return (lambda text: parse(f"\\boxed{{{text}}}", extraction_config=configs)), verify


def _item(question: str, answer: str, subtask: str, target: str | None, where: str) -> Item:
    question = question.strip()
    return Item(question, ({"role": "user", "content": f"{question}\n\n{ASK}"},), answer, subtask, target, where)


def _filled(name: str, items: list[Item]) -> list[Item]:
    """Those with a problem and an answer; says how many lack one."""
    empty = [item.where for item in items if not item.question or not item.answer.strip()]
    say_dropped(name, "items without a problem or an answer", empty)
    return [item for item in items if item.question and item.answer.strip()]


def _reasoner_zero(row: Row) -> Item:
    """[{"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value"}}]"""
    question, answer = row.get(0, "value"), row.get(1, "ground_truth", "value")
    return _item(question, answer, "open_reasoner_zero", None, row.where)


def _math500(row: Row) -> Item:
    return _item(row.get("prompt", 0, "value"), row.get("final_answer"), "math500", None, row.where)


def _gsm8k(row: Row) -> Item:
    """The solution ends with '#### 72' and carries <<48/2=24>> marks of a calculator."""
    solution, mark, answer = row.get("answer").rpartition("####")
    if not mark or not answer.strip():
        raise UserError(f"{row.where}: the answer has no '#### number'; repair or remove that row")
    shown = re.sub(r"<<[^<>]*>>", "", solution).strip()
    target = f"{shown}\n\\boxed{{{answer.strip()}}}"
    return _item(row.get("question"), answer.strip(), "gsm8k", target, row.where)
