"""Targets of questions: given, of a teacher behind a real HTTP server that misbehaves, and items that have none."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from robot_forgetting.engine.experiment import check_data
from robot_forgetting.errors import UserError
from robot_forgetting.methods.labels import GivenTargets, Labeler, LabelledItems, Labels, WrongLabels
from robot_forgetting.tasks.sources import VARIABLE
from robot_forgetting.tasks.text.science import Science
from robot_forgetting.tasks.text.teacher import Teacher
from tests.text_data import write_science

KEY, SECRET = "TEST_TEACHER_KEY", "sk-very/secret"


@pytest.fixture
def task(tmp_path, monkeypatch) -> Science:
    write_science(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return Science(kinds=["choice"], limit=12)


class Endpoint:
    """An OpenAI-compatible server. ``script`` says what the n-th request gets; afterwards every answer is right."""

    def __init__(self, task: Science):
        self.script: list[str] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.elsewhere, self.stopped = "", threading.Event()
        self.answers = {item.messages[-1]["content"]: item.answer for item in task.splits["train"]}
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                number = len(endpoint.requests)
                endpoint.requests.append(body)
                endpoint.headers.append(dict(self.headers))
                endpoint.reply(self, body, endpoint.script[number] if number < len(endpoint.script) else "right")

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, handler, body: dict, what: str) -> None:
        assert handler.path == "/v1/chat/completions"
        right = self.answers[body["messages"][-1]["content"]]
        wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
        texts = {"right": f"<reasoning>é</reasoning><answer>{right}</answer>", "wrong": f"<answer>{wrong}</answer>"}
        content = json.dumps(
            {"choices": [{"message": {"content": texts.get(what)}, "finish_reason": "stop"}]}, ensure_ascii=False
        ).encode()
        if what.isdigit():
            content = b'{"error": {"message": "over\nloaded"}}'
        if what == "401 with the key":
            content = f"Incorrect API key: {handler.headers['Authorization']} {'x' * 280}".encode() * 2
        if what == "the key":
            choice = {"message": {"content": SECRET + right}, "finish_reason": SECRET}
            content = json.dumps({"choices": [choice]}).encode()
        if what == "half a character":
            content = b'{"choices": [{"message": {"content": "<answer>\\ud800</answer>"}}]}'
        if what == "garbage":
            content = b"<html>not json"
        if what == "dripping headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            return self.drip(handler, b"X: " + b"x" * 10_000)
        handler.send_response(int(what[:3]) if what[:3].isdigit() else 200)
        if what.startswith("30"):
            handler.send_header("Location", self.elsewhere)
        if what == "429":
            handler.send_header("Retry-After", "0")
        handler.send_header("Content-Length", str(len(content) + (100 if what == "cut" else 0)))
        handler.end_headers()
        self.drip(handler, content + b" " * 10_000) if what == "dripping" else handler.wfile.write(content)

    def drip(self, handler, content: bytes) -> None:
        for byte in content:
            try:
                handler.wfile.write(bytes([byte]))
            except OSError:
                return
            if self.stopped.wait(0.02):
                return

    def close(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(task):
    made = Endpoint(task)
    yield made
    made.close()


def teacher(endpoint: Endpoint, folder, **options) -> Teacher:
    return Teacher(endpoint.url, "m", KEY, str(folder / "replies"), **{"parallel": 1, "pause": 0.001, **options})


def ask(teacher: Teacher, task: Science) -> list[str | None]:
    return teacher.label(None, task, np.arange(task.size("train")), 0).labels


def replies(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "replies" / "replies.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("parallel", [1, 4])
def test_the_first_right_answer_is_the_target(task, endpoint, tmp_path, monkeypatch, parallel):
    monkeypatch.setenv(KEY, "secret")
    endpoint.script = ["wrong", "refusal", "right", "wrong"]
    targets = ask(teacher(endpoint, tmp_path, parallel=parallel, temperature=0.5, max_tokens=77), task)
    assert task.rewards(np.arange(12), targets).all() and "é" in targets[0]
    assert len(endpoint.requests) == len(replies(tmp_path)) == 15
    assert all((r["model"], r["temperature"], r["max_tokens"]) == ("m", 0.5, 77) for r in endpoint.requests)
    assert all(headers["Authorization"] == "Bearer secret" for headers in endpoint.headers)
    assert "secret" not in (tmp_path / "replies" / "replies.jsonl").read_text()
    again = ask(teacher(endpoint, tmp_path, temperature=0.5, max_tokens=77), task)
    assert again == targets and len(endpoint.requests) == 15  # nothing is asked twice


def test_items_that_the_teacher_cannot_answer_have_no_target(task, endpoint, tmp_path, capsys):
    endpoint.script = ["wrong"] * 3 + ["right", "wrong", "wrong", "wrong"]
    targets = ask(teacher(endpoint, tmp_path, samples=3), task)
    assert [target is None for target in targets] == [True, False, True] + [False] * 9
    assert "science: m answered 10/12 training items right" in capsys.readouterr().err
    assert [len([r for r in replies(tmp_path) if r["item"] == task.splits["train"][k].where]) for k in range(4)] == [
        3,
        1,
        3,
        1,
    ]
    ask(teacher(endpoint, tmp_path, samples=3), task)
    assert len(endpoint.requests) == 16  # nor are those asked again that failed as often as they may
    assert ask(teacher(endpoint, tmp_path, samples=4), task).count(None) == 0 and len(endpoint.requests) == 18


def test_failures_that_pass_are_tried_again(task, endpoint, tmp_path):
    endpoint.script = ["429", "500", "garbage", "cut", "right", "503"]
    targets = ask(teacher(endpoint, tmp_path), task)
    assert task.rewards(np.arange(12), targets).all()
    assert len(endpoint.requests) == 12 + 5 and len(replies(tmp_path)) == 12


@pytest.mark.parametrize(
    "script, says",
    [
        (["500"] * 99, r'HTTP 500: {"error": {"message": "over loaded"}}, tried 3 times'),
        (["429"] * 99, "HTTP 429: .*, tried 3 times"),
        (["garbage"] * 99, "a reply that is no chat completion: <html>not json, tried 3 times"),
        (["cut"] * 99, r"IncompleteRead.*, tried 3 times"),
        (["401"], f"HTTP 401: .*; put a valid key into the variable {KEY}"),
        (["404"], "HTTP 404: .*"),
    ],
)
@pytest.mark.parametrize("parallel", [1, 3])
def test_a_teacher_that_fails_half_way_loses_nothing(task, endpoint, tmp_path, script, says, parallel):
    endpoint.script = ["right"] * 5 + script
    message = rf"^the teacher at {endpoint.url} failed \({says}\); (\d+) of 12 items are done and kept in "
    with pytest.raises(UserError, match=message + ".*replies.jsonl: run the same command again to go on$") as error:
        ask(teacher(endpoint, tmp_path, tries=3, parallel=parallel), task)
    assert "\n" not in str(error.value)
    done = int(str(error.value).split("; ")[-1].split(" of ")[0])
    assert done == len(replies(tmp_path)) >= 5
    asked = len(endpoint.requests)
    endpoint.script = []
    assert task.rewards(np.arange(12), ask(teacher(endpoint, tmp_path, parallel=parallel), task)).all()
    assert len(endpoint.requests) - asked == 12 - done


@pytest.mark.parametrize("code", ["301", "302", "303", "307", "308"])
def test_a_redirect_is_refused_and_the_key_stays(task, endpoint, tmp_path, monkeypatch, code):
    monkeypatch.setenv(KEY, SECRET)
    other = Endpoint(task)
    endpoint.script, endpoint.elsewhere = [code], f"{other.url}/chat/completions?key={SECRET}"
    with pytest.raises(UserError, match=f"HTTP {code}: it sends requests on to http.*set base_url") as error:
        ask(teacher(endpoint, tmp_path), task)
    other.close()
    assert other.requests == []
    assert SECRET not in str(error.value)


def test_a_key_that_is_sent_back_is_never_written(task, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET + "\n")
    endpoint.script = ["the key", "half a character", "401 with the key"]
    with pytest.raises(UserError, match=r"HTTP 401: Incorrect API key: Bearer \[key\]") as error:
        ask(teacher(endpoint, tmp_path), task)
    assert "sk-very" not in str(error.value)
    assert b"sk-very" not in (tmp_path / "replies" / "replies.jsonl").read_bytes()
    assert [row["text"][:5] for row in replies(tmp_path)] == ["[key]", "<answ"]
    assert endpoint.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("value", ["two words", "caf\u00e9", "a\x01b"])
def test_what_is_no_key_is_refused_without_being_shown(task, endpoint, tmp_path, monkeypatch, value):
    monkeypatch.setenv(KEY, value)
    with pytest.raises(UserError, match=f"the variable {KEY} holds no key") as error:
        ask(teacher(endpoint, tmp_path), task)
    assert value not in str(error.value) and endpoint.requests == []


@pytest.mark.parametrize("how", ["dripping", "dripping headers"])
def test_an_answer_that_drips_is_given_up(task, endpoint, tmp_path, how):
    endpoint.script = [how]
    assert None not in ask(teacher(endpoint, tmp_path, seconds=0.5), task)  # the second try is answered
    endpoint.script = ["right"] * 13 + [how] * 5
    with pytest.raises(UserError, match=r"no whole answer within 0.5 seconds|too slow"):
        ask(teacher(endpoint, tmp_path / "again", seconds=0.5, tries=1), Science(kinds=["choice"], limit=20))


def test_nobody_at_home(task, endpoint, tmp_path):
    endpoint.close()
    with pytest.raises(UserError, match="failed .*refused, tried 2 times.*; 0 of 12 items are done"):
        ask(teacher(endpoint, tmp_path, tries=2), task)


def test_a_line_cut_by_a_kill_is_asked_again(task, endpoint, tmp_path):
    targets = ask(teacher(endpoint, tmp_path), task)
    file = tmp_path / "replies" / "replies.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert ask(teacher(endpoint, tmp_path), task) == targets and len(endpoint.requests) == 13
    assert len(replies(tmp_path)) == 12
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b"{]\n", *lines[3:]]))
    with pytest.raises(UserError, match="replies.jsonl, row 4 is no reply of a teacher"):
        ask(teacher(endpoint, tmp_path), task)


def test_other_prompts_and_settings_are_other_replies(task, endpoint, tmp_path):
    ask(teacher(endpoint, tmp_path), task)
    ask(teacher(endpoint, tmp_path, temperature=0.1), task)
    assert len(endpoint.requests) == 24 and len(replies(tmp_path)) == 24


def test_ctrl_c_keeps_what_arrived(task, endpoint, tmp_path):
    """In a process of its own: the signal arrives while the endpoint keeps two requests waiting."""
    endpoint.script = ["right"] * 4
    slow, reply = threading.Event(), endpoint.reply

    def hold(handler, body, what):
        if len(endpoint.requests) > 4:
            slow.set()
            time.sleep(30)
        reply(handler, body, what)

    endpoint.reply = hold
    endpoint.server.daemon_threads, endpoint.server.block_on_close = True, False
    code = (
        "import signal\n"
        "import numpy as np\n"
        # A parent in the background of a shell ignores the signal, and would hand that down.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from robot_forgetting.tasks.text.science import Science\n"
        "from robot_forgetting.tasks.text.teacher import Teacher\n"
        "task = Science(kinds=['choice'], limit=12)\n"
        f"Teacher({endpoint.url!r}, 'm', {KEY!r}, {str(tmp_path / 'replies')!r}, parallel=2)"
        ".label(None, task, np.arange(12), 0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    assert slow.wait(120)
    give_up = time.monotonic() + 20
    while len(replies(tmp_path)) < 4 and time.monotonic() < give_up:  # the fourth may still be on its way
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=25)[1]
    assert process.returncode != 0 and time.monotonic() - started < 25
    assert len(replies(tmp_path)) == 4
    endpoint.reply = reply
    before = len(endpoint.requests)
    assert None not in ask(teacher(endpoint, tmp_path), task)
    assert len(endpoint.requests) - before == 8


@pytest.mark.parametrize(
    "options, says",
    [
        ({"base_url": "https://me:word@host/v1"}, "holds a password"),
        ({"samples": 17}, "samples=17 is not a whole number from 1 to 16"),
        ({"samples": 0}, "samples=0 is not a whole number from 1 to 16"),
        ({"tries": 0}, "tries=0 is not a whole number"),
        ({"base_url": "example.org"}, "is no address"),
    ],
)
def test_settings_of_a_teacher(options, says):
    with pytest.raises(UserError, match=says):
        Teacher(**{"base_url": "http://h/v1", **options})


def test_a_task_uses_its_teacher_only_if_it_has_an_address(task, endpoint, tmp_path):
    assert isinstance(task.labels(), GivenTargets)
    assert isinstance(Science(teacher=Teacher()).labels(), GivenTargets)
    named = teacher(endpoint, tmp_path)
    assert Science(teacher=named).labels() is named


# ---- what the methods make of targets


class Words:
    """As much of a policy as ``LabelledItems`` needs: its tokens are the texts themselves."""

    def encode(self, texts):
        return list(texts)


class Half(Labeler):
    """Every second item has a target, its index."""

    def label(self, policy, task, seeds, stream) -> Labels:
        return Labels([None if seed % 2 else f"item {seed}" for seed in seeds.tolist()])


def test_items_without_a_target_are_left_out_and_the_order_stays(task):
    whole = LabelledItems(Words(), task, GivenTargets(), seed=3)
    order = np.concatenate([task.training_seeds(step, 4, seed=3) for step in range(3)])
    assert whole.action(0, 4) + whole.action(1, 4) + whole.action(2, 4) == task.targets(order)
    half = LabelledItems(Words(), task, Half(), seed=3)
    even = [f"item {seed}" for seed in order if seed % 2 == 0]
    assert half.action(0, 3) + half.action(1, 3) == even
    assert sorted(half.action(2, 3) + half.action(3, 3)) == sorted(even)  # the next epoch, in another order
    batch = half.batch(1, 3)
    asked = [task.splits["train"][int(text.split()[1])].messages[-1]["content"] for text in batch.action]
    assert [chat[-1]["content"] for chat in batch.obs["messages"]] == asked
    assert half.action(0, 99) == even  # never more than there are


def test_pairs_keep_what_both_have(task):
    chosen = LabelledItems(Words(), task, GivenTargets(), seed=3)
    rejected = LabelledItems(Words(), task, Half(), seed=3)
    chosen.keep(rejected.kept)
    rows = [int(text.split()[1]) for text in rejected.action(0, 6)]
    assert chosen.action(0, 6) == [task.splits["train"][row].target for row in rows]


def test_wrong_answers_are_wrong_and_spread(task):
    seeds = np.arange(12)
    drawn = [WrongLabels().label(None, task, seeds, stream).labels for stream in range(40)]
    assert not any(task.rewards(seeds, texts).any() for texts in drawn)
    assert {texts[0] for texts in drawn} == {
        f"<answer>{k}</answer>" for k in "ABCD" if k != task.splits["train"][0].answer
    }
    assert (
        WrongLabels().label(None, Science(kinds=["equation"], test_fraction=0.5), np.arange(2), 0).labels == [None] * 2
    )


def test_no_targets_at_all_is_one_clear_line(task, monkeypatch):
    monkeypatch.setattr(Science, "targets", lambda self, seeds: [None] * len(seeds))
    with pytest.raises(UserError, match="no training item of task 'science' has a target .*task.teacher.base_url"):
        LabelledItems(Words(), task, None, seed=0)


def test_no_targets_are_noticed_before_anything_is_measured(task, monkeypatch):
    """Only for methods that learn from them, and only where nobody else writes them."""
    given, teacher, rewards = (SimpleNamespace(labels=None), SimpleNamespace(labels=Half()), SimpleNamespace())
    check_data(given, task)
    monkeypatch.setattr(Science, "targets", lambda self, seeds: [None] * len(seeds))
    with pytest.raises(UserError, match="no training item of task 'science' has a target"):
        check_data(given, task)
    check_data(teacher, task)
    check_data(rewards, task)
    task.teacher = Teacher(base_url="http://127.0.0.1:9/v1", key_variable=KEY)
    check_data(given, task)
