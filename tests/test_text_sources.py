"""Data sets of questions: where they come from, what is dropped, what a damaged file's message names."""

from __future__ import annotations

import gzip
import http.server
import json
import threading

import numpy as np
import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.tasks import sources
from robot_forgetting.tasks.sources import VARIABLE, download, find, read_rows
from robot_forgetting.tasks.text.science import FILES, Science
from robot_forgetting.tasks.text.text_task import Item, distinct, divide, position, without
from tests.text_data import choice_row, write_science


@pytest.fixture
def science(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return write_science(tmp_path)


def item(question: str, where: str = "file, row 1") -> Item:
    return Item(question, ({"role": "user", "content": question},), "A", "part", "A", where)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{not json", "row 3 is not valid JSON"),
        ('{"question": "And?", "type": "filling"', "row 3 is not valid JSON"),
        ('["a list"]', "row 3: no 'type'"),
        (json.dumps({**choice_row("And?"), "type": "essay"}), "row 3: unknown type 'essay'"),
        (json.dumps({**choice_row("And?"), "question": 7}), "row 3: 'question' is not a text"),
        (json.dumps({**choice_row("  ")}), "row 3: the question is empty"),
        (json.dumps(choice_row("And?", "E")), "row 3: not four options A to D"),
        (json.dumps(choice_row("And?", options=("1", "2"))), "row 3: not four options A to D"),
        (json.dumps({**choice_row("And?", ""), "type": "filling"}), "row 3: '' is no chemical equation"),
    ],
)
def test_a_damaged_row_is_named(science, line, says):
    file = science / FILES[0]
    rows = file.read_text().splitlines()[:2]
    file.write_text("\n".join([*rows, line, ""]))
    with pytest.raises(UserError, match=f"{FILES[0]}, row 3") as error:
        Science().size("train")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'{"a": 1}', "holds no list of rows"),
        ("a.json", b"[1, 2", "is not valid JSON"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-9], "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read_rows(tmp_path / name)
    assert says in str(error.value)


def test_rows_know_their_line(tmp_path):
    text = '{"a": "one\u2028line"}\n\n{"a": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    rows = read_rows(tmp_path / "a.jsonl.gz")
    assert [row.get("a") for row in rows] == ["one\u2028line", "two"]
    assert [row.where.rpartition(", ")[2] for row in rows] == ["row 1", "row 3"]


def test_missing_files(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"holds no a.json; put it there .*hub:x/y.* or unset {VARIABLE}"):
        find("data", ["a.json"], "hub:x/y")
    assert find("data", ["a.json"], "hub:x/y", needed=False) is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.head.json").write_text("[1]")
    assert find("data", ["a.json", "a.head.json"], "hub:x/y").name == "a.head.json"


def test_downloads_are_kept_and_failures_say_what_else_to_do(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text('{"a": 1}\n')

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "web"))

        def log_message(self, *arguments):
            pass

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_address[1]}"
    file = find("data", ["a.jsonl"], origin)
    assert read_rows(file)[0].get("a", kind=int) == 1 and tmp_path / "cache" in file.parents
    with pytest.raises(UserError, match=rf"b.jsonl cannot be downloaded .*404.*; set {VARIABLE} to .* data/b.jsonl"):
        find("data", ["b.jsonl"], origin)
    server.shutdown()
    server.server_close()
    assert find("data", ["a.jsonl"], origin) == file  # needs no network any more
    with pytest.raises(UserError, match="cannot be downloaded"):
        download(origin, "c.jsonl", "")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_hub_without_network_is_one_line(monkeypatch):
    def fails(*arguments, **keywords):
        raise ConnectionError("no route\nto host")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(UserError, match=r"from hub:x/y \(no route to host\); set"):
        sources.find("data", ["a.json"], "hub:x/y")


def test_repeated_questions_are_dropped_and_counted(capsys):
    items = [item("One?"), item("Two?"), item("  One? \n", "file, row 3"), item("one?")]
    assert [i.question for i in distinct("t", items)] == ["One?", "Two?", "one?"]  # SMILES: the case matters
    assert capsys.readouterr().err.strip() == "t: dropped 1 repeated questions (the first: file, row 3)"


def test_training_items_that_are_test_items_are_dropped(capsys):
    kept = without("t", [item("One?"), item("Two?", "file, row 2")], [item("Two? ")])
    assert [i.question for i in kept] == ["One?"]
    assert "dropped 1 training items that are test items too (the first: file, row 2)" in capsys.readouterr().err


def test_an_items_split_does_not_depend_on_the_others():
    items = [item(f"Question {n}?") for n in range(2000)]
    whole, half = divide(items, 0.1), divide(items[::-2], 0.1)
    assert {i.question for i in half["test"]} <= {i.question for i in whole["test"]}
    assert not {i.question for i in whole["train"]} & {i.question for i in whole["test"]}
    assert 160 <= len(whole["test"]) <= 240  # 200 expected, standard deviation 13
    assert position("Question 7?") == position(" Question  7?")
    with pytest.raises(UserError, match="between 0 and 1"):
        divide(items, 1.0)


def test_limit_takes_the_same_items_whatever_the_order_of_the_file(science):
    first = [i.question for i in Science(limit=5).splits["train"]]
    file = science / FILES[0]
    file.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert [i.question for i in Science(limit=5).splits["train"]] == first and len(first) == 5


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(limit):
    with pytest.raises(UserError, match="at least 1"):
        Science(limit=limit)


def test_real_splits(shared, monkeypatch, capsys):
    from robot_forgetting.tasks.text.tool_use import ToolUse

    monkeypatch.setenv(VARIABLE, str(shared / "data"))
    science = Science(kinds=["choice"])
    assert science.size("train") + science.size("test") == 1496  # 1,500 without 4 repeated questions
    assert len({i.question for split in science.splits.values() for i in split}) == 1496
    assert Science().size("train") + Science().size("test") == 1796
    tools = ToolUse()
    assert (tools.size("train"), tools.size("test")) == (104, 67)
    assert sum(len(i.answer[0]) == 1 for i in tools.splits["test"]) == 51
    assert "no train_data.json; trains on the few requests of eval_real.json" in capsys.readouterr().err


@pytest.mark.parametrize(("longest", "kept"), [(None, 60), (20, 60), (19, 40), (14, 20), (13, 0)])
def test_long_questions_are_left_out(science, longest, kept):
    """Characters of a question with its options: here 10 + 4, 15 + 4 and 10 + 10, twenty of each."""
    for number, file in enumerate(FILES):
        begin, last = [("Weight of", "4"), ("Long weight of", "4"), ("Value of ", "4444444")][number % 3]
        letters = "abcdefghij" if number < 3 else "ABCDEFGHIJ"
        rows = [choice_row(begin + letter, options=("1", "2", "3", last)) for letter in letters]
        (science / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Science(kinds=["choice"], longest=longest, test_fraction=0.5)
    if not kept:
        with pytest.raises(UserError, match="has no train items"):
            task.size("train")
        return
    assert task.size("train") + task.size("test") == kept
    assert task.settings().get("longest") == longest


def test_the_fingerprint_sees_settings_and_test_items(science):
    spec = Science().spec
    assert spec == Science(limit=3).spec and spec != Science(answer_format="letter").spec
    file = science / FILES[-1]
    file.write_text(file.read_text().replace("2H2 + O2 = 2H2O", "2H2 + O2 = H4O2"))
    assert Science(test_fraction=0.5).spec["test_items"] != spec["test_items"]


def test_observations_are_chats(science):
    task = Science()
    (chat,) = task.observations(np.array([task.seeds("test").start]))["messages"]
    assert [message["role"] for message in chat] == ["system", "user"]
    assert chat[1]["content"].endswith("\n\nPlease reason step by step.")
    (chat,) = Science(answer_format="letter", kinds=["choice"]).observations(np.array([0]))["messages"]
    assert [message["role"] for message in chat] == ["user"] and "\nC: 3\nD: 4\n\nReply with" in chat[0]["content"]
