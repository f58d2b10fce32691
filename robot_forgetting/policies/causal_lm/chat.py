"""A model's chat template: prompts, and how an assistant's turn begins and ends in it.

A template is a program that comes with a model. It runs in transformers' sandbox, which keeps it from the machine but
not from running for ever, so it gets a number of steps; and whatever it raises becomes one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.machine.progress import say

MOST_STEPS = 2_000_000  # of one rendering: lines of the template, and calls of whatever they call; about a second
SYSTEM, QUESTION, ANSWER = "SYSTEMMARK", "QUESTIONMARK", "ANSWERMARK"


class TooLong(BaseException):
    """A template that has used up its steps; no Exception, which the template's runtime could take for its own."""


@contextmanager
def limited(most: int = MOST_STEPS) -> Iterator[None]:
    """Inside, this thread may make ``most`` steps in jinja's templates, then ``TooLong``. Counted, not timed."""
    left, before = most, sys.gettrace()

    def step(frame: FrameType, event: str, argument) -> Callable | None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooLong
        return step if frame.f_code.co_filename == "<template>" else None

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


@dataclass(frozen=True)
class Turn:
    """What the template writes around an answer: before it, after it, and then the token that ends the turn."""

    before: str
    after: str
    end: int


class ChatTemplate:
    """The tokenizer's template, tried out once; ``UserError`` where it fails or leaves a question or an answer out.

    stops: tokens at which the model's own settings end a completion
    """

    def __init__(self, tokenizer, name: str, stops: Collection[int]):
        self.tokenizer, self.name = tokenizer, name
        self._takes_system = True
        prompt = self._tried([("user", QUESTION)], open_turn=True)
        if QUESTION not in prompt:
            raise self._unusable("leaves the question out")
        self.opening = prompt
        self.turn = self._turn(prompt, stops)
        try:
            self._takes_system = SYSTEM in self._tried([("system", SYSTEM), ("user", QUESTION)], open_turn=True)
        except UserError:
            self._takes_system = False
        self._said = False

    def render(self, chat: Sequence[dict], *, open_turn: bool = True) -> str:
        """The chat as text, up to where an answer begins (``open_turn``).

        Where the template has no place for a system message, its text stands before the first question: a task's
        system message says what form its answers have.
        """
        chat = list(chat)
        if not self._takes_system and chat and chat[0]["role"] == "system":
            if not self._said:
                self._said = True
                say(
                    f"  {self.name}: its chat template takes no system message; the task's is put before the "
                    "first question"
                )
            chat = _folded(chat)
        try:
            with limited():
                return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_turn)
        except TooLong:
            raise self._unusable(f"does not end within {MOST_STEPS:,} steps") from None
        except Exception as error:  # a template is a program: anything can be wrong with it
            said = one_line(error)[:200]
            raise self._unusable(f"fails ({type(error).__name__}: {said})") from error

    def _unusable(self, what: str) -> UserError:
        return UserError(
            f"the chat template of policy '{self.name}' {what}; give another one: policy.chat_template=FILE.jinja"
        )

    def _tried(self, chat: Sequence[tuple[str, str]], *, open_turn: bool) -> str:
        return self.render([{"role": role, "content": text} for role, text in chat], open_turn=open_turn)

    def _turn(self, prompt: str, stops: Collection[int]) -> Turn:
        """Read off an answer that is a marker, up to the first added token after it (one no text is cut into).

        Templates that end an answer with plain text, or not at all, leave its end to the end-of-text token.
        """
        text = self._tried([("user", QUESTION), ("assistant", ANSWER)], open_turn=False)
        start, found, rest = text.partition(ANSWER)
        if not found:
            raise self._unusable("leaves an assistant's answer out")
        before = start.removeprefix(prompt) if start.startswith(prompt) else ""
        # Not all_special_ids: of a chat model that was saved as its base, the turn's end is none of them.
        added = self.tokenizer.added_tokens_decoder
        ends = {*stops, *(token for token, one in added.items() if one.content.strip())}
        read = self.tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (first, _) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if token in ends:
                return Turn(before, rest[:first], token)
        return Turn(before, "", self.tokenizer.eos_token_id)


def _folded(chat: list[dict]) -> list[dict]:
    """The system message's text in front of the first question."""
    system, first, *rest = [*chat, {"role": "user", "content": ""}] if len(chat) == 1 else chat
    if first["role"] != "user":
        return [{"role": "user", "content": system["content"]}, first, *rest]
    return [{**first, "content": f"{system['content']}\n\n{first['content']}".rstrip()}, *rest]
