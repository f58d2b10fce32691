"""Runs code that a model wrote against a data set's tests, locked in: what HumanEval's pass@1 is computed from.

Linux only: every program gets namespaces of its own (no network but an unconnected loopback, no other processes, a file
system of the interpreter read-only and 16 MB of memory to write in), a system-call filter, an unprivileged user, no
environment, no descriptors, and limits on memory (of all its processes together where cgroups can be made, otherwise of
each), processor time, processes and file sizes; all of it ends with its first process or after the wall-clock limit.
``code_jail`` is the part that runs on the far side.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.benchmarks.code_cgroup import groups_parent, memory_group
from robot_forgetting.tasks.benchmarks.code_jail import SYSCALLS

JAIL = Path(__file__).with_name("code_jail.py")
# 3 seconds are those of the published evaluation. Wall clock: generous, for machines that are busy with other things.
CPU_SECONDS, WALL_SECONDS = 3, 20.0
MEMORY, DISK, FILE, OPEN_FILES, PROCESSES = 1 << 30, "16m", 8 << 20, 64, 6
UNCONFINED = "unconfined"


@dataclass(frozen=True)
class Verdict:
    """Whether every test passed; otherwise why not, in one line ("AssertionError", "out of time", ...)."""

    passed: bool
    why: str


def check_allowed(allow: bool | str, task: str) -> str | None:
    """Why ``task`` cannot run the model's code here and now, as one line with the fix; None where it can.

    allow: the key allow_code_execution: false, true (locked in, or not at all), or "unconfined" (limits only)
    """
    if allow not in (True, False, UNCONFINED):
        raise UserError(f"allow_code_execution={allow} is not one of: false, true, {UNCONFINED}")
    if allow is False:
        return f"{task} runs code that the model writes; allow_code_execution=true lets it, locked in"
    if allow is True and (problem := lock_problem()) is not None:
        return (
            f"{task} runs code that the model writes, and this machine cannot lock it in ({problem}); use a Linux "
            f"machine with user namespaces, or allow_code_execution={UNCONFINED} where nothing on the machine or its "
            "network is worth protecting"
        )
    return None


@lru_cache(maxsize=1)
def lock_problem() -> str | None:
    """None where a trivial program passes its test inside a jail; else what is in the way."""
    if sys.platform != "linux":
        return f"no namespaces on {sys.platform}"
    program = {"prompt": "def f():\n    pass\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
    verdict = run_tests("def f():\n    return 1\n", **program)
    return None if verdict.passed else verdict.why


def protection(allow: bool | str) -> dict:
    """What a run's records say of it: pass@1 from a machine that cannot lock programs in is to be seen as such."""
    return {
        "confined": allow is True,
        "system_calls": "filtered" if sys.platform == "linux" and platform.machine() in SYSCALLS else "unfiltered",
        "memory": "of all processes" if groups_parent() is not None else "of each process",
    }


def run_tests(
    program: str,
    *,
    prompt: str,
    entry_point: str,
    test: str,
    confine: bool = True,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
) -> Verdict:
    """Runs ``program`` in one jail and ``test``'s ``check(candidate)`` in another; they exchange plain values only.

    prompt: the trusted beginning of the program, whose helper functions the test may use
    confine: False leaves the namespaces out (limits and, on Linux, the system-call filter remain)
    """
    with contextlib.ExitStack() as stack:
        (asks_in, asks_out), (says_in, says_out), (result_in, result_out) = (_pipe(stack) for _ in range(3))
        theirs = _file(stack, {"program": program, "entry_point": entry_point})
        ours = _file(stack, {"prompt": prompt, "entry_point": entry_point, "test": test})
        limits = _limits(cpu_seconds)
        group = stack.enter_context(memory_group(MEMORY))
        model = _start(stack, "serve", [theirs, asks_in, says_out], confine, limits, group)
        judge = _start(stack, "judge", [ours, asks_out, says_in, result_out], confine, limits, None)
        for descriptor in (asks_in, asks_out, says_in, says_out, result_out):
            os.close(descriptor)
        text = _read(result_in, time.monotonic() + wall_seconds)
        if text:
            return Verdict(**json.loads(text))
        if text is None:
            return Verdict(False, "out of time")
        said = [_last_line(process) for process in (model, judge)]
        return Verdict(False, next(filter(None, said), "ended without a verdict"))


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _file(stack: contextlib.ExitStack, content: dict) -> int:
    file = stack.enter_context(tempfile.TemporaryFile("w+"))
    file.write(json.dumps(content))
    file.seek(0)
    return file.fileno()


def _limits(cpu_seconds: int) -> dict[str, int]:
    limits = {"AS": MEMORY, "CPU": cpu_seconds, "FSIZE": FILE, "NOFILE": OPEN_FILES, "NPROC": PROCESSES, "CORE": 0}
    return limits | {"STACK": 8 << 20}


def _start(
    stack: contextlib.ExitStack, role: str, fds: list[int], confine: bool, limits: dict, group: str | None
) -> subprocess.Popen:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jail-", ignore_cleanup_errors=True))
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    site = sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")})
    settings = {
        "confine": confine,
        "group": group,
        "root": os.path.realpath(folder),
        "mounts": _mounts(python, site),
        "limits": limits,
        "disk": DISK,
        "role": role,
        "fds": fds,
        "site": site if role == "serve" else [],
        "python": python,
        "environment": {"PATH": "/usr/bin:/bin", "HOME": "/jail-work" if confine else folder, "LANG": "C.UTF-8"}
        | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    }
    errors = stack.enter_context(tempfile.TemporaryFile("w+"))
    process = subprocess.Popen(
        [python, "-I", "-S", "-B", str(JAIL), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        cwd=folder,
        env={},
        pass_fds=fds,
        start_new_session=True,
    )
    process.errors = errors
    stack.callback(_end, process)
    return process


def _mounts(python: str, site: list[str]) -> list[str]:
    """What is visible inside, read-only: the system's programs, the interpreter, the installed packages."""
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    paths = [path for path in [*system, sys.base_prefix, str(Path(python).parent), *site] if os.path.exists(path)]
    kept: list[str] = []
    for path in sorted(dict.fromkeys(paths), key=len):
        if not any(path.startswith(other + "/") for other in kept if not os.path.islink(other)):
            kept.append(path)
    return kept


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(descriptor: int, deadline: float) -> str | None:
    """Everything until the other side closes; None where that takes too long."""
    parts = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _last_line(process: subprocess.Popen) -> str:
    """What the jail itself complained of while it was built."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.errors.seek(0)
    lines = process.errors.read(10_000).strip().splitlines()
    return lines[-1][:200] if lines else ""
