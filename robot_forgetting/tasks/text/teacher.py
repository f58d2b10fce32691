"""Targets written by a stronger model: sampled from an OpenAI-compatible endpoint, verified by the task's own reward.

RL's Razor (arXiv 2509.04259, appendix B.1) has DeepSeek-R1 and GPT-4o answer every training prompt, up to 16 times, and
keeps an answer whose result is right. Every reply is written to an append-only file the moment it arrives, right or
wrong: whatever stops the work, the same command goes on from there and never pays for a reply twice.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated

from robot_forgetting.contracts import checked_settings
from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import disk, plain
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.methods.labels import Labeler, Labels
from robot_forgetting.ranges import Range, Tokens
from robot_forgetting.records.locks import release_lock, take_lock

MOST_SAMPLES = 16
LONGEST_WAIT = 60.0  # seconds between two tries
LARGEST = 1 << 24  # bytes of an answer
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class Teacher(Labeler):
    """Labels of text tasks; the target of an item is the first right answer of ``model`` in at most ``samples``.

    base_url: of the endpoint, 'https://HOST/v1'; None: no teacher, the task uses its own targets
    key_variable: the environment variable that holds the key; not set: none is sent (local servers need none)
    cache: the folder of the replies; None: teacher/TASK. It may hold those of several models and prompts.
    temperature, max_tokens: of the request; seconds: to the last byte of its answer, before a request is given up
    tries: of one request that fails in a way that may pass, with doubling pauses from ``pause`` seconds on
    parallel: requests at a time
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str = "gpt-4o",
        key_variable: str = "OPENAI_API_KEY",
        cache: str | None = None,
        samples: Annotated[int, Range(1, MOST_SAMPLES)] = MOST_SAMPLES,
        temperature: Annotated[float, Range(0, 2)] = 0.7,
        max_tokens: Tokens = 4096,
        parallel: Annotated[int, Range(1, 1000)] = 4,
        tries: Annotated[int, Range(1, 1000)] = 6,
        pause: Annotated[float, Range(0, 3600)] = 1.0,
        seconds: Annotated[float, Range(0, 86_400, above=True)] = 300.0,
    ):
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise UserError(f"teacher.base_url={base_url} is no address; give one like https://HOST/v1")
        if "@" in urllib.parse.urlsplit(base_url or "").netloc:
            raise UserError(f"teacher.base_url holds a password; put a key into the variable {key_variable} instead")
        self.base_url, self.model, self.key_variable = base_url, model, key_variable
        self.cache, self.samples = cache, samples
        self.settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.parallel, self.tries, self.pause, self.seconds = parallel, tries, pause, seconds
        checked_settings(self)

    def label(self, policy, task, seeds, stream) -> Labels:
        """A text, or None where no sample is right; ``UserError`` where the endpoint fails for good."""
        if not hasattr(task, "chosen"):
            raise UserError(f"a teacher answers questions; '{task.name}' is no text task")
        if self.base_url is None:
            raise UserError("the teacher has no address; set its base_url")
        work = _Work(self, task, task.chosen(seeds))
        targets = work.finish()
        found = sum(target is not None for target in targets)
        say(f"  {task.name}: {self.model} answered {found}/{len(targets)} training items right ({work.path})")
        return Labels(targets)

    def ask(self, messages: list[dict], stopped: threading.Event) -> dict:
        """One reply, {"text", "finish_reason"}; retries what may pass, otherwise ``UserError`` with the reason."""
        for number in range(self.tries):
            try:
                return self._request(messages)
            except _Passing as error:
                reason, pause = str(error), error.seconds
            if number + 1 < self.tries:
                pause = self.pause * 2**number * random.uniform(0.5, 1.5) if pause is None else pause
                if stopped.wait(min(pause, LONGEST_WAIT)):
                    break
        raise UserError(f"{reason}, tried {number + 1} times")

    def _request(self, messages: list[dict]) -> dict:
        """One request within ``seconds``, counted from its beginning to the last byte of its answer."""
        found: SimpleQueue = SimpleQueue()

        def exchange() -> None:
            try:
                found.put(self._exchange(messages, time.monotonic() + self.seconds))
            except BaseException as error:  # the waiting thread raises it
                found.put(error)

        threading.Thread(target=exchange, name="request", daemon=True).start()
        try:
            reply = found.get(timeout=self.seconds)
        except Empty:  # the other thread ends when its next byte comes, or the connection's own time is over
            raise _Passing(f"no whole answer within {self.seconds:g} seconds") from None
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _exchange(self, messages: list[dict], deadline: float) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({**self.settings, "messages": messages}).encode()
        request = urllib.request.Request(f"{self.base_url.rstrip('/')}/chat/completions", body, headers)
        try:
            with OPENER.open(request, timeout=self.seconds) as answer:
                content = _read(answer, deadline)
        except urllib.error.HTTPError as error:
            raise self._refused(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, a cut one, a time-out
            raise _Passing(self._shown(getattr(error, "reason", error)) or type(error).__name__) from None
        try:
            choice = json.loads(content)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Passing(f"a reply that is no chat completion: {self._shown(content)[:80]}") from None
        # A refusal comes without content: an empty answer, which is wrong.
        text, reason = (self._without_key(value) if isinstance(value, str) else value for value in (text, reason))
        return {"text": text if isinstance(text, str) else "", "finish_reason": reason}

    def _refused(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        with error:
            try:
                said = self._shown(_read(error, deadline))[:300]
            except (OSError, http.client.HTTPException):
                said = ""
        text = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in RETRIED:
            after = error.headers.get("Retry-After", "")
            return _Passing(text, float(after) if after.isdigit() else None)
        if error.code in (401, 403):
            return UserError(f"{text}; put a valid key into the variable {self.key_variable}")
        if 300 <= error.code < 400:
            there = self._shown(error.headers.get("Location", "nowhere"))[:200]
            return UserError(
                f"HTTP {error.code}: it sends requests on to {there}, which a key does not follow; set base_url to the "
                "address that answers"
            )
        return UserError(text)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"the variable {self.key_variable} holds no key: it has blanks or special characters in it")
        return key

    def _without_key(self, text: str) -> str:
        """What an endpoint says goes into records and messages: never with the key, even if it is sent back."""
        if key := os.environ.get(self.key_variable, "").strip():
            for form in {key, json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")}:
                text = text.replace(form, "[key]")
        return text

    def _shown(self, text: object) -> str:
        """In one line."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        return " ".join(self._without_key(text).split())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Every redirect is an ``HTTPError``: the key would go along to wherever it points."""

    def redirect_request(self, *arguments) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)


def _read(answer, deadline: float) -> bytes:
    """All of an answer's body, at most ``LARGEST``, piece by piece as it comes."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline or size > LARGEST:
            raise OSError("an answer that is too slow" if size <= LARGEST else "an answer that is too long")
    if getattr(answer, "length", None):
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)


class _Passing(Exception):
    """A failure that may pass. seconds: how long the endpoint asks to wait, or None."""

    def __init__(self, text: str, seconds: float | None = None):
        super().__init__(text)
        self.seconds = seconds


class _Work:
    """The replies to one task's items: those in the file, and those still to be asked for.

    Only the main thread reads, verifies and writes (math-verify needs it); the others wait for the endpoint.
    """

    def __init__(self, teacher: Teacher, task, items: list):
        self.teacher, self.task, self.items = teacher, task, items
        self.path = Path(teacher.cache or f"teacher/{task.name}") / "replies.jsonl"
        # What was asked of whom: a reply to another prompt, or at another temperature, is another reply.
        self.keys = [self._key(item) for item in items]
        self.texts: dict[str, list[str]] = {}
        self.targets: list[str | None] = []

    def finish(self) -> list[str | None]:
        """Asks until every item has a right answer or as many as there may be."""
        self._read()
        if all(map(self._done, range(len(self.items)))):
            return self.targets
        with disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.path.parent)
        try:
            self._read(repair=True)  # again: another process may have written until it gave the folder free
            missing = [index for index in range(len(self.items)) if not self._done(index)]
            with disk(self.path):
                file = open(self.path, "ab")
            with file, bar(f"ask {self.teacher.model}", len(self.items), len(self.items) - len(missing)) as progress:
                self._ask(missing, file, progress)
        finally:
            release_lock(self.path.parent, lock)
        return self.targets

    def _ask(self, open_items: list[int], file, progress) -> None:
        jobs, replies, stopped = SimpleQueue(), SimpleQueue(), threading.Event()

        def serve() -> None:
            while (index := jobs.get()) is not None:
                try:
                    replies.put((index, self.teacher.ask(list(self.items[index].messages), stopped)))
                except Exception as error:  # the main thread says it
                    replies.put((index, error))

        pending, waiting, failure = iter(open_items), 0, None
        for index in islice(pending, self.teacher.parallel):
            # Daemons: after Ctrl-C nobody waits for requests that are under way.
            threading.Thread(target=serve, name="teacher", daemon=True).start()
            jobs.put(index)
            waiting += 1
        try:
            while waiting:
                try:
                    # Not without a limit: a Ctrl-C that comes just before the wait is seen only when the wait ends.
                    index, reply = replies.get(timeout=1)
                except Empty:
                    continue
                waiting -= 1
                if isinstance(reply, Exception):
                    failure = failure or reply
                    stopped.set()  # what is under way is paid for: it is waited for and kept, nothing new begins
                    continue
                self._write(file, index, reply)
                following = next(pending, None) if self._done(index) else index
                progress.advance(int(self._done(index)))
                if failure is None and following is not None:
                    jobs.put(following)
                    waiting += 1
        finally:
            stopped.set()
            for _ in range(self.teacher.parallel):
                jobs.put(None)
        if isinstance(failure, UserError):
            done = sum(map(self._done, range(len(self.items))))
            raise UserError(
                f"the teacher at {self.teacher.base_url} failed ({failure}); {done} of {len(self.items)} items are "
                f"done and kept in {self.path}: run the same command again to go on"
            )
        if failure is not None:
            raise failure

    def _done(self, index: int) -> bool:
        return self.targets[index] is not None or len(self.texts.get(self.keys[index], ())) >= self.teacher.samples

    def _write(self, file, index: int, reply: dict) -> None:
        row = {"key": self.keys[index], "task": self.task.name, "item": self.items[index].where, **reply}
        with disk(self.path):
            file.write(json.dumps({**row, "unix_time": round(time.time(), 3)}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(index, reply["text"])

    def _take(self, index: int, text: str) -> None:
        """Counts a reply and keeps it as the target where it is the first right one."""
        text = plain(text)  # no tokenizer reads half of a surrogate pair
        seen = self.texts.setdefault(self.keys[index], [])
        seen.append(text)
        if (
            self.targets[index] is None
            and len(seen) <= self.teacher.samples
            and self.task.correct(text, self.items[index])
        ):
            self.targets[index] = text

    def _read(self, *, repair: bool = False) -> None:
        """The file's replies; a last line that a kill cut off is passed over, and removed by ``repair``."""
        self.texts, self.targets = {}, [None] * len(self.items)
        if not self.path.is_file():
            return
        with disk(self.path), open(self.path, "r+b" if repair else "rb") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if repair and whole < len(content):
                file.truncate(whole)
        positions = {key: index for index, key in enumerate(self.keys)}
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                key, text = row["key"], row["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}, row {number} is no reply of a teacher; remove that line") from None
            if key in positions:
                self._take(positions[key], text)

    def _key(self, item) -> str:
        asked = json.dumps([self.teacher.settings, list(item.messages)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:24]
