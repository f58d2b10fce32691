"""One writer per folder, also where the file system has no locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import cached
from robot_forgetting.records import locks
from robot_forgetting.records.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
# A file system without locks is what the system call says of it.
SCRIPT = """
import errno, os, sys, time
from robot_forgetting.records import locks
def refuse(*arguments):
    raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))
locks.fcntl.lockf = refuse
from robot_forgetting.records.run_folder import RunFolder
folder = RunFolder.create("run", config={})
folder.append("notes", {"note": "begun"})
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=lambda code: errno.errorcode[code])
def no_locks(request, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    monkeypatch.chdir(tmp_path)
    return request.param


@pytest.fixture
def writer(no_locks, tmp_path):
    """Another process that writes ``run``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(no_locks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=environment) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        process.kill()


def again() -> None:
    with RunFolder.create("run", config={}) as folder:
        assert folder.status == "running" and folder.rows("notes") == [{"note": "begun"}]
        folder.append("notes", {"note": "again"})
    assert sorted(path.name for path in Path("run").glob(".*")) == [".lock"]


def test_a_second_writer_is_refused_until_the_first_is_killed(writer):
    with pytest.raises(UserError, match=f"run is being written by another process .pid {writer.pid} on "):
        RunFolder.create("run", config={})
    assert RunFolder("run").status == "running"
    writer.kill()
    writer.wait()
    assert RunFolder("run").status == "interrupted"
    again()


def test_a_writer_on_another_machine(writer):
    owner = json.loads(Path("run/.writer").read_text())
    Path("run/.writer").write_text(json.dumps(owner | {"machine": "another", "host": "node7"}))
    writer.kill()
    writer.wait()
    with pytest.raises(UserError, match="pid .* on node7, or that process was killed.*delete run/.writer and run the"):
        RunFolder.create("run", config={})
    assert RunFolder("run").status == "running"  # as its record says; nobody here knows better
    Path("run/.writer").unlink()
    again()


def test_a_later_process_of_the_same_number(writer):
    """It is not taken for the owner."""
    owner = json.loads(Path("run/.writer").read_text())
    Path("run/.writer").write_text(json.dumps(owner | {"started": "1"}))
    again()


def test_two_take_over_at_once(writer):
    """The one that is slower finds the other's claim, or the other."""
    writer.kill()
    writer.wait()
    Path("run/.writer.taken_over").write_text("")
    with pytest.raises(UserError, match="delete run/.writer.taken_over and run the same"):
        RunFolder.create("run", config={})
    Path("run/.writer.taken_over").unlink()
    again()


def test_the_lock_is_kept_while_its_text_is_written(tmp_path):
    """A POSIX lock is lost when any descriptor of its file is closed."""
    path = tmp_path / "run"
    with RunFolder.create(path, config={}):
        script = "from robot_forgetting.records.run_folder import RunFolder; "
        script += f"RunFolder.create({str(path)!r}, config={{}})"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert f"written by another process (pid {os.getpid()} on " in done.stderr


@pytest.mark.parametrize("what", ["append", "update"])
def test_a_folder_that_is_deleted_meanwhile(tmp_path, what):
    with pytest.raises(UserError, match="its folder was deleted or moved meanwhile; run the same command again"):
        with RunFolder.create(tmp_path / "run", config={}) as folder:
            folder.append("notes", {"note": "begun"})
            shutil.rmtree(tmp_path / "run")
            folder.append("notes", {"note": "lost"}) if what == "append" else folder.update(status="running")


def test_what_a_killed_process_had_not_finished_goes_at_the_next_start(tmp_path):
    path = tmp_path / "run"
    kept = ["videos/a.mp4", "checkpoints/iteration_000001/state.json", "videos/.hidden", "notes.tmp"]
    left = [".run.json.123.tmp", "checkpoints/iteration_000001/.state.json.9.tmp", "videos/.a.77.mp4"]
    left += ["checkpoints/iteration_000002.part/policy.safetensors", "adapter/.adapter_model.safetensors.part"]
    with RunFolder.create(path, config={}):
        for name in [*kept, *left]:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("{}")
    with RunFolder.create(path, config={}):
        assert all((path / name).exists() for name in kept) and not any((path / name).exists() for name in left)
        assert not (path / "checkpoints" / "iteration_000002.part").exists()


def test_cached_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    first = cached("a.obj", "text")
    assert first == cached("a.obj", "text") != cached("a.obj", "other") and first.read_text() == "text"
    first.write_text("damaged")
    assert cached("a.obj", "text").read_text() == "text"
    assert len(list(tmp_path.rglob("*.obj"))) == 2 and not list((tmp_path / "temporary").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(first))  # a file: no cache can be had
    assert cached("a.obj", "text").read_text() == "text"
