"""Run folders: nothing is lost or mixed up, whatever kills the process or fills the disk."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import follow_umask
from robot_forgetting.records.config_file import differing_keys
from robot_forgetting.records.run_folder import RunFolder, find_runs, plain, write_json

CONFIG = {"seed": 0, "method": {"name": "sft", "learning_rate": 1e-5}, "task": "stack_cube"}


def test_create_append_finish_and_read_back(tmp_path):
    with RunFolder.create(tmp_path / "a", config=CONFIG, run={"verb": "run", "seed": 0}) as folder:
        assert folder.status == "running"
        assert not folder.finished
        folder.append("notes", {"task": "x", "success": True}, {"task": "x", "success": np.bool_(False)})
        folder.append("train", {"iteration": 1, "loss": math.nan, "step": np.int64(3)})
        folder.update(timings={"train": 1.5})
        folder.add_seconds("train", 2.0)
        folder.add_seconds("evaluate", 1.0)
        folder.finish({"success": []}, peak_memory_bytes=7)
    run = RunFolder(tmp_path / "a")
    assert run.finished
    assert run.status == "finished"
    assert run.id == "a"
    assert run.rows("notes") == [{"task": "x", "success": True}, {"task": "x", "success": False}]
    assert run.rows("train") == [{"iteration": 1, "loss": None, "step": 3, "stage": 1}]
    assert run.rows("divergence") == []
    assert run.summary() == {"schema_version": 1, "success": []}
    assert run.run["timings"] == {"train": 3.5, "evaluate": 1.0}
    assert run.run["peak_memory_bytes"] == 7
    assert run.config() == CONFIG
    assert [path.name for path in (tmp_path / "a").glob(".*")] == [".lock"]  # no temporary file is left


def test_reader_cannot_write(tmp_path):
    RunFolder.create(tmp_path / "a", config=CONFIG).close()
    with pytest.raises(RuntimeError, match="open for reading"):
        RunFolder(tmp_path / "a").append("notes", {})


@pytest.mark.parametrize("tail", [b'{"episode": 2, "succ', b'{"episode": 2}', b"\0\0\0\0", b"\0\0\n", b'{"episode"\n'])
def test_truncated_last_line_is_dropped(tmp_path, tail):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("notes", {"episode": 0}, {"episode": 1})
    with open(tmp_path / "a" / "notes.jsonl", "ab") as file:
        file.write(tail)
    assert [row["episode"] for row in RunFolder(tmp_path / "a").rows("notes")] == [0, 1]
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("notes", {"episode": 2})
    assert [row["episode"] for row in RunFolder(tmp_path / "a").rows("notes")] == [0, 1, 2]


def test_broken_line_in_the_middle_is_named(tmp_path):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("notes", {"episode": 0})
    (tmp_path / "a" / "notes.jsonl").write_bytes(b'{"episode": 0}\nrubbish\n{"episode": 2}\n')
    with pytest.raises(UserError, match="notes.jsonl line 2"):
        RunFolder(tmp_path / "a").rows("notes")


def test_kill_9_then_resume(tmp_path):
    script = f"""
import time
from robot_forgetting.records.run_folder import RunFolder
folder = RunFolder.create({str(tmp_path / "a")!r}, config={CONFIG!r})
i = 0
while True:
    folder.append("notes", dict(episode=i, padding="x" * 5000)); i += 1
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    for _ in range(5):
        process.stdout.readline()
    with pytest.raises(UserError, match=f"written by another process .pid {process.pid} "):
        RunFolder.create(tmp_path / "a", config=CONFIG)
    assert RunFolder(tmp_path / "a").status == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert RunFolder(tmp_path / "a").status == "interrupted"  # run.json still says "running", but nobody writes
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        rows = folder.rows("notes")
        assert [row["episode"] for row in rows] == list(range(len(rows)))
        assert len(rows) >= 5
        assert folder.status == "running"
        assert folder.run["restarts"] == 1


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_start_that_recorded_nothing_does_not_bind(tmp_path, status):
    """The command is corrected and repeated: as if the first had not been."""
    path, corrected = tmp_path / "a", CONFIG | {"seed": 1}
    error = {"failed": UserError, "interrupted": KeyboardInterrupt}[status]
    with pytest.raises(error), RunFolder.create(path, config=CONFIG, run={"seed": 0}) as folder:
        folder.add_seconds("evaluate", 3.0)
        raise error("no such checkpoint")
    assert RunFolder(path).status == status
    with RunFolder.create(path, config=corrected, run={"seed": 1}) as folder:
        assert folder.config() == corrected
        state = folder.run
    assert (state["status"], state["error"], state["seed"], state["restarts"]) == ("running", None, 1, 0)
    assert state["timings"] == {}


@pytest.mark.parametrize(
    "file", ["episodes.jsonl", "train.jsonl", "checkpoints/iteration_000001/state.json", "videos/a.mp4", "summary.json"]
)
def test_whatever_was_recorded_binds(tmp_path, file):
    path = tmp_path / "a"
    RunFolder.create(path, config=CONFIG).close()
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    (path / file).write_text("{}\n")
    with pytest.raises(UserError, match="made with another configuration .seed: 0, now 1"):
        RunFolder.create(path, config=CONFIG | {"seed": 1})
    assert RunFolder(path).config() == CONFIG


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_follow_umask(tmp_path, umask, mode):
    file = tmp_path / "policy.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    before = os.umask(umask)
    try:
        follow_umask(file)
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_lock_within_one_process_and_after_close(tmp_path):
    folder = RunFolder.create(tmp_path / "a", config=CONFIG)
    assert RunFolder(tmp_path / "a").status == "running"  # looking does not give the lock free
    with pytest.raises(UserError, match=f"another process .pid {os.getpid()}"):
        RunFolder.create(tmp_path / "a", config=CONFIG)
    code = (
        "from robot_forgetting.records.run_folder import RunFolder; "
        f"RunFolder.create({str(tmp_path / 'a')!r}, config={CONFIG!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process" in result.stderr
    folder.close()
    folder.close()
    RunFolder.create(tmp_path / "a", config=CONFIG).close()


def test_stale_lock_file_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").write_text("pid 999999 on elsewhere\n")
    started = time.perf_counter()
    RunFolder.create(tmp_path / "a", config=CONFIG).close()
    assert time.perf_counter() - started < 2


def test_full_disk_keeps_what_was_recorded(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("notes", {"episode": 0})
        real = os.write
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:5]))  # what a nearly full disk does
        with pytest.raises(UserError, match="disk is full.*run the same command again"):
            folder.append("notes", {"episode": 1}, {"episode": 2})
        # Room for the first row of the group only: none of it stays.
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: data.index(b"\n") + 3]))
        with pytest.raises(UserError, match="disk is full"):
            folder.append("notes", {"episode": 1}, {"episode": 2})
        monkeypatch.undo()
        assert (tmp_path / "a" / "notes.jsonl").read_bytes() == b'{"episode":0}\n'
        folder.append("notes", {"episode": 1})
    assert [row["episode"] for row in RunFolder(tmp_path / "a").rows("notes")] == [0, 1]


def test_rows_of_one_call_are_one_write(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        written, real = [], os.write
        monkeypatch.setattr(os, "write", lambda file, data: written.append(data) or real(file, data))
        folder.append("notes", {"episode": 0}, {"episode": 1})
        folder.append("train")
        monkeypatch.undo()
    assert written == [b'{"episode":0}\n{"episode":1}\n']


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_enospc_from_the_kernel_is_one_clear_line(tmp_path):
    folder = RunFolder.create(tmp_path / "a", config=CONFIG)
    (tmp_path / "a" / "train.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="disk is full"):
        folder.append("train", {"step": 1})
    folder.close()


def test_full_disk_leaves_the_old_json(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_keep_removes_rows_of_lost_iterations(tmp_path):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("train", *({"iteration": i} for i in range(6)))
        assert folder.keep("train", lambda row: row["iteration"] < 4) == 2
        folder.append("train", {"iteration": 4})
    assert [row["iteration"] for row in RunFolder(tmp_path / "a").rows("train")] == [0, 1, 2, 3, 4]


def test_other_configuration_is_refused_and_named(tmp_path):
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        folder.append("train", {"loss": 1.0})
    other = CONFIG | {"method": {"name": "sft", "learning_rate": 3e-5}, "debug": True, "extra": 1}
    with pytest.raises(UserError, match=r"method.learning_rate: 1e-05, now 3e-05; extra: absent, now 1") as error:
        RunFolder.create(tmp_path / "a", config=other)
    assert "debug" not in str(error.value)
    RunFolder.create(tmp_path / "a", config=CONFIG | {"debug": True}).close()  # the failed attempt kept no lock


def test_differing_keys_reads_tuples_as_lists():
    assert differing_keys({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert differing_keys({"a": {"b": 1}}, {"a": None}) == ["a.b: 1, now absent", "a: absent, now null"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (UserError("no such task"), "failed", "no such task"),
        (ValueError("two\nlines"), "failed", "ValueError: two lines"),
    ],
)
def test_exception_sets_the_status(tmp_path, error, status, text):
    with pytest.raises(type(error)), RunFolder.create(tmp_path / "a", config=CONFIG):
        raise error
    folder = RunFolder(tmp_path / "a")
    assert (folder.status, folder.run["error"]) == (status, text)
    with RunFolder.create(tmp_path / "a", config=CONFIG) as folder:
        assert (folder.status, folder.run["error"]) == ("running", None)


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        RunFolder(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no run.json"):
        RunFolder(tmp_path)
    with pytest.raises(UserError, match="holds no run folder"):
        find_runs([tmp_path])


def test_newer_schema_is_refused(tmp_path):
    RunFolder.create(tmp_path / "a", config=CONFIG).close()
    write_json(tmp_path / "a" / "run.json", {"schema_version": 2, "status": "finished"})
    with pytest.raises(UserError, match="schema_version 2.*update"):
        RunFolder(tmp_path / "a")
    with pytest.raises(UserError, match="schema_version 2.*update"):
        RunFolder.create(tmp_path / "a", config=CONFIG)


def test_find_runs_expands_a_sweep_once(tmp_path):
    for name in ("s/b", "s/a", "c"):
        RunFolder.create(tmp_path / name, config=CONFIG).close()
    assert [run.id for run in find_runs([tmp_path / "c", tmp_path / "s", tmp_path / "s" / "a"])] == ["c", "a", "b"]


def test_find_runs_passes_over_what_lies_beside_the_folders(tmp_path):
    RunFolder.create(tmp_path / "a", config=CONFIG).close()
    (tmp_path / "report.html").write_text("")
    (tmp_path / "figures").mkdir()
    assert [run.id for run in find_runs(sorted(tmp_path.glob("*")))] == ["a"]
    with pytest.raises(UserError, match="report.html is a file; give run folders"):
        find_runs([tmp_path / "report.html"])
    assert [run.id for run in find_runs([tmp_path / "a" / "run.json"])] == ["a"]
    with pytest.raises(UserError, match="nothing does not exist"):
        find_runs([tmp_path / "a", tmp_path / "nothing"])


@pytest.mark.parametrize("text", ["\ud800", "before \udfff after é", "\udce9", "\0\x1b[31m\u2028", "😀"])
def test_any_text_can_be_recorded_and_read_back(tmp_path, text):
    shown = text.encode("utf-8", "backslashreplace").decode()
    with RunFolder.create(tmp_path / "a", config={**CONFIG, "policy": text}, run={"name": text}) as folder:
        folder.append("notes", {"flags": {"why": text, text: 1}}, {"flags": [text], "error": Path(text)})
        folder.keep("notes", lambda row: "error" not in row)
        folder.update(error=text)
        folder.finish({"said": [text]})
    run = RunFolder(tmp_path / "a")
    assert run.rows("notes") == [{"flags": {"why": shown, shown: 1}}]
    assert (run.run["name"], run.summary()["said"], run.config()["policy"]) == (shown, [shown], shown)


def test_plain():
    assert plain({"a": np.float32(0.5), "b": np.arange(2), "c": (1, None), "d": Path("x"), 1: np.inf}) == {
        "a": 0.5,
        "b": [0, 1],
        "c": [1, None],
        "d": "x",
        "1": None,
    }
    with pytest.raises(TypeError, match="cannot record"):
        plain(object())
