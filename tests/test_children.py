"""Child processes end with their parent, whatever ends it; a signal ends a command in order."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_training import start

from robot_forgetting.engine.replica import _shared
from robot_forgetting.errors import UserError
from robot_forgetting.machine import children

ROOT = Path(__file__).resolve().parent.parent

# A command with children of both kinds that is at work in a run folder until a signal ends it.
SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from robot_forgetting.machine import children
from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder

def main(arguments):
    with RunFolder.create("run", config={}) as folder:
        folder.append("notes", {"note": "begun"})
        made = [children.start(multiprocessing.get_context(kind), time.sleep, 600) for kind in ("fork", "spawn")]
        try:
            print(*(child.pid for child in made), flush=True)
            time.sleep(600)
        finally:
            with children.undisturbed():
                print("tidying up", flush=True)
                time.sleep(0.5)
                children.end(*made)
            print("tidied up", flush=True)

if __name__ == "__main__":
    sys.exit(children.stoppable(main)())
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone(pids: list[int]) -> bool:
    """Whether all end within a minute (the machine may be busy)."""
    for _ in range(600):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def command(tmp_path):
    """The running command, and the numbers of its children."""
    (tmp_path / "command.py").write_text(SCRIPT)
    started = []

    def begin(**options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        # Of a shell's background job, as which the tests may run, Ctrl-C is ignored.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        given = {"cwd": tmp_path, "env": environment, **pipes, **heard, **options}
        process = subprocess.Popen([sys.executable, "command.py"], **given)
        started.append(process)
        return process, [int(word) for word in process.stdout.readline().split()]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_signal_ends_a_command_in_order(command, tmp_path, number, again):
    process, pids = command()
    process.send_signal(number)
    if again:
        assert process.stdout.readline() == "tidying up\n"
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert errors == f"\n{what}; the same command again continues where it stopped\n"
    assert output.endswith("tidied up\n") or again
    assert not any(map(alive, pids))  # at once
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@linux
def test_killed_with_9(command):
    process, pids = command()
    for pid in pids:  # a signal to the whole group (scancel, Ctrl-C) is the parent's to obey
        for number in children.ENDING:
            os.kill(pid, number)
    time.sleep(0.2)
    assert all(map(alive, pids)) and len(pids) == 2
    process.kill()
    assert gone(pids)
    assert process.stderr.read() == ""


PROGRAM = {"program": "def f():\n    import time\n    time.sleep(600)\n", "prompt": "", "entry_point": "f"}
PROGRAM |= {"test": "def check(f):\n    f()\n", "wall_seconds": 600.0}
PROGRAMS = {
    "a jail": "from robot_forgetting.tasks.benchmarks import code_sandbox; "
    f"code_sandbox.run_tests(**{PROGRAM!r}, confine=False)",
    "the renderer": "import sys; from robot_forgetting.machine import vulkan; "
    "sys.executable = sys.argv[1]; vulkan.probe()",
}


@linux
@pytest.mark.parametrize("what", PROGRAMS)
def test_programs_that_are_started(tmp_path, what):
    """Those that would not notice: a jail without namespaces, a driver that hangs."""
    hanging = tmp_path / "python"  # as the probe would be while a driver hangs
    hanging.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from robot_forgetting.machine import children\nchildren.end_with(int(sys.argv[-1]))\ntime.sleep(600)\n"
    )
    hanging.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", PROGRAMS[what], hanging], cwd=ROOT) as process:
        for _ in range(600):
            found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if found:
                break
            time.sleep(0.1)
        time.sleep(1.0)  # so that they have come as far as to look after their parent
        process.kill()
    assert found and gone(list(map(int, found)))


@linux
def test_nohup(command):
    deaf = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process, pids = command(**deaf)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None and all(map(alive, pids))


@linux
def test_where_the_system_does_not_tell_of_a_parents_death():
    """Elsewhere than on Linux: a child that looks after its parent itself."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from robot_forgetting.machine import children
from robot_forgetting.errors import UserError
parent = os.getpid()
if os.fork() == 0:
    sys.platform = "darwin"
    children.end_with(parent)
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
        assert gone([pid])


def test_a_child_whose_parent_was_faster():
    script = "from robot_forgetting.machine import children; children.end_with(1); print('still here')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_tidying_up_is_not_disturbed():
    order = []
    with pytest.raises(KeyboardInterrupt), children.undisturbed():
        with children.undisturbed():
            signal.raise_signal(signal.SIGINT)
            order.append("inner")
        order.append("outer")
    assert order == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_memory_shared_with_forked_processes():
    for values in (torch.randn(3, 4).t(), torch.zeros(0, 3), torch.randn(2, 5)[:, 1:3].bfloat16(), torch.tensor(1.0)):
        shared = _shared(values)
        assert torch.equal(shared, values) and shared.stride() == values.stride()
        process = children.start(multiprocessing.get_context("fork"), shared.add_, 1)
        process.join()
        assert torch.equal(shared, values + 1)
        children.end(process)


def test_every_process_is_started_in_one_place():
    """So that none is forgotten when it comes to who ends with whom."""
    found = {
        path.name
        for path in (ROOT / "robot_forgetting").rglob("*.py")
        if re.search(r"\bProcess\(|ProcessPool|multiprocessing\.Pool|share_memory_\(", path.read_text())
    }
    assert found == {"children.py"}


def test_training_where_dev_shm_is_full(tmp_path, monkeypatch):
    """A container has 64 MB of it, or less."""

    def full(*arguments, **options):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    with pytest.raises(UserError, match="no room in /dev/shm for a batch .*; enlarge it .*, or use processes=1"):
        start(tmp_path, processes=3)
