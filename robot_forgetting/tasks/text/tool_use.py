"""Calling the functions of an API: ToolAlpaca (arXiv 2306.05301), as RL's Razor's tool-use task.

The model reads an API's documentation and a request, and writes all calls at once as lines "Thought:", "Action:" and
"Action Input:". Success: the right calls, each with its arguments, in any order. The paper compares "with regular
expressions" and says no more; the closest public implementation (SDPO) compares the multiset of names and one dict into
which the arguments of all calls are merged. Comparing call by call is stricter: arguments cannot change places.

Arguments are equal whatever the order of their keys, a number is equal to its digits in quotes, an argument left empty
to one left out, and the API's credentials are not compared (the data mask them in the prompt, no model can know them).

Test: ``eval_simulated.json``, 67 of its 100 requests. The others cannot be answered in one go: their arguments refer to
the results of earlier calls (30), or they call what the documentation does not have (3). SDPO has 68. Train:
``train_data.json``; where a local folder lacks it (the file is large), ``eval_real.json``, which suits a try only.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator

from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.ranges import Count
from robot_forgetting.tasks.sources import Row, find, read_rows
from robot_forgetting.tasks.text.text_task import Item, TextTask, distinct, ordered, say_dropped, without

FOLDER = "toolalpaca"
ORIGIN = "https://raw.githubusercontent.com/tangqiaoyu/ToolAlpaca/189069998d64a7baf1b4a1c3c4b2e75eb9d05532/data"
DEEPEST = 100  # of nested arguments; the data's have 5
MOST_STEPS = 5  # of a training instance, as in ToolAlpaca's own training set

SYSTEM = """You fulfil a user's request by calling functions of an API. For every call that is needed write three lines:
Thought: why this call is needed
Action: the function's name
Action Input: the arguments, as one JSON object
Write all calls one after the other and nothing else; do not write their results."""

LINE = re.compile(r"[^\n]+")
FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?")

Call = tuple[str, dict]


class ToolUse(TextTask):
    """Success: the calls of the given answer, see the module."""

    def __init__(self, name: str = "tool_use", limit: Count | None = None, teacher=None):
        super().__init__(name, limit, teacher)

    def load(self) -> dict[str, list[Item]]:
        test = distinct(self.name, self._read("eval_simulated.json"))
        if find(FOLDER, ["train_data.json"], ORIGIN, needed=False) is None:
            say(f"  {self.name}: no train_data.json; trains on the few requests of eval_real.json, for a try only")
            train = self._read("eval_real.json")
        else:
            train = self._read("train_data.json")
        train = without(self.name, distinct(self.name, train), test)
        return {"train": ordered(train), "test": ordered(test)}

    def correct(self, completion: str, item: Item) -> bool:
        calls = parse_calls(completion)
        if calls is None:
            return False
        expected, hidden = item.answer
        return _multiset(calls, hidden) == _multiset(expected, hidden)

    def answered(self, completion: str, item: Item) -> bool:
        return bool(parse_calls(completion))

    def _read(self, file: str) -> list[Item]:
        items, unanswerable = [], []
        for row in read_rows(find(FOLDER, [file], ORIGIN)):
            for request, steps in _requests(row):
                item = _item(row, request, steps)
                items.append(item) if item else unanswerable.append(f"{row.where}: {request[:60]!r}")
        say_dropped(self.name, "requests that cannot be answered from the documentation alone", unanswerable)
        return items


def parse_calls(text: str) -> list[Call] | None:
    """The calls that a completion makes, whatever follows their JSON; None where one's arguments cannot be read."""
    calls, name = [], None
    for line in LINE.finditer(text):
        if not (said := line[0].strip()):
            continue
        if name is not None and said.startswith("Action Input:"):
            start = line.start() + line[0].index("Action Input:") + len("Action Input:")
            arguments = _object(text, FENCE.match(text, start).end())
            if arguments is None:
                return None
            calls.append((name, arguments))
        named = said.startswith("Action:") and said != "Action:"
        name = said.removeprefix("Action:").strip().strip("`\"' ") if named else None
    return calls


def _object(text: str, start: int) -> dict | None:
    """The JSON object (or Python dict: models often quote with ') that begins at ``start``."""
    try:
        value = json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        end = text.find("\n", start)
        try:
            value = ast.literal_eval(text[start : None if end < 0 else end].strip().rstrip("`"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) and _depth(value) <= DEEPEST else None


def _depth(value) -> int:
    """Of nested lists and dicts, counted level by level."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, (dict, list, tuple))]
    return depth


def _multiset(calls: list[Call], hidden: frozenset[str]) -> Counter:
    """The calls in a form that is equal for equal calls."""
    return Counter(
        (name, json.dumps(_plain({key: value for key, value in arguments.items() if key not in hidden})))
        for name, arguments in calls
    )


def _plain(value):
    """Numbers and truth values as texts, white space folded, keys sorted, empty arguments gone."""
    if isinstance(value, dict):
        cleaned = {str(key).strip(): _plain(item) for key, item in value.items()}
        return {key: cleaned[key] for key in sorted(cleaned) if cleaned[key] not in ("", None)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None:
        return None
    text = " ".join(str(value).split())
    if re.fullmatch(r"-?\d+\.\d*", text):
        text = text.rstrip("0").rstrip(".")
    return text.lower() if text in ("True", "False") else text


def _requests(row: Row) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each request with its steps (function, arguments as JSON, thought or '')."""
    if isinstance(row.value, dict) and "Golden_Answers" in row.value:
        requests, answers = row.get("Instructions", kind=list), row.get("Golden_Answers", kind=list)
        if len(requests) != len(answers):
            raise UserError(
                f"{row.where}: {len(requests)} Instructions, {len(answers)} Golden_Answers; repair that row"
            )
        for index, request in enumerate(requests):
            count = len(row.get("Golden_Answers", index, kind=list))
            keys = [("Golden_Answers", index, step) for step in range(count)]
            yield request, [(row.get(*key, "Action"), row.get(*key, "Action_Input"), "") for key in keys]
        return
    for index, instance in enumerate(row.get("Instances", kind=list)):
        steps = instance.get("intermediate_steps") if isinstance(instance, dict) else None
        if not steps or len(steps) > MOST_STEPS:
            continue
        # "Hint: ..." was written for the simulation that made the data.
        request = row.get("Instances", index, "input").rsplit("\nHint: ", 1)[0]
        keys = [("Instances", index, "intermediate_steps", step, 0) for step in range(len(steps))]
        yield request, [(row.get(*key, 0), _as_json(row.get(*key, 1, kind=object)), row.get(*key, 2)) for key in keys]


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _item(row: Row, request: str, steps: list[tuple[str, str, str]]) -> Item | None:
    """None where the request cannot be answered from the documentation alone."""
    functions = row.value.get("Function_Description") or {}  # of some training APIs none could be made
    try:
        calls = [(name, json.loads(arguments)) for name, arguments, _ in steps]
    except ValueError:
        return None
    if not calls or any(name not in functions or not isinstance(given, dict) for name, given in calls):
        return None
    hidden = frozenset(row.value.get("Authentication") or ())
    shown = [(name, {key: value for key, value in given.items() if key not in hidden}) for name, given in calls]
    target = "\n".join(
        f"Thought: {_thought(said) or f'I call {name}.'}\nAction: {name}\nAction Input: {json.dumps(given)}"
        for (name, given), (_, _, said) in zip(shown, steps, strict=True)
    )
    listed = [f"{name}: {text}" for name, text in functions.items() if name != "components"]
    documentation = "\n".join([*listed, str(functions.get("components") or "")]).strip()
    name = row.get("Name")
    user = f"API: {name}\n\n{documentation}\n\nRequest: {request.strip()}"
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": user})
    # The same request to two APIs is two questions.
    return Item(f"{name}: {request.strip()}", messages, (shown, hidden), name, target, row.where)


def _thought(said: str) -> str:
    """The reasoning in an assistant's 'Thought: ... Action: ...'."""
    return " ".join(said.split("\nAction:", 1)[0].strip().removeprefix("Thought:").split())
