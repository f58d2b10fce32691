"""Code that a model wrote: right verdicts, and attempts to get out. A program's ``f()`` returns 1 where it got out."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.benchmarks import code_cgroup, code_sandbox
from robot_forgetting.tasks.benchmarks.code_cgroup import groups_parent
from robot_forgetting.tasks.benchmarks.code_sandbox import check_allowed, lock_problem, protection, run_tests

ONE = {"prompt": "def f():\n    pass\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}


@pytest.fixture(scope="module", autouse=True)
def locked():
    if (problem := lock_problem()) is not None:
        pytest.skip(f"no jail on this machine: {problem}")


def attempt(program: str, **options):
    return run_tests(program, **ONE, **options)


@pytest.fixture(scope="module")
def outside():
    """What a program could reach if it got out: listeners, a secret, a folder that anyone may write to, a process."""
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        for listener in (tcp, udp):
            listener.setblocking(False)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o777)
        (folder / "secret").write_text("hidden")
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        stack.callback(sleeper.wait)
        stack.callback(sleeper.kill)
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SECRET_TOKEN", "hidden")
        yield {"tcp": tcp, "udp": udp, "folder": folder, "sleeper": sleeper}


ESCAPES = {
    "tcp": "import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {tcp}), 2)\n    return 1",
    "udp": "import socket\ndef f():\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "    s.sendto(b'x', ('127.0.0.1', {udp}))\n    return 1",
    "dns": "import socket\ndef f():\n    socket.getaddrinfo('example.com', 80)\n    return 1",
    "interfaces": "def f():\n    lines = open('/proc/net/dev').read().splitlines()[2:]\n"
    "    return 1 if any(not line.strip().startswith('lo:') for line in lines) else 0",
    "curl": "import subprocess\ndef f():\n    subprocess.run(['/bin/bash', '-c', 'echo > /dev/tcp/127.0.0.1/{tcp}'], "
    "check=True)\n    return 1",
    "secret_file": "def f():\n    return 1 if open('{folder}/secret').read() else 0",
    "root_of_init": "def f():\n    return 1 if open('/proc/1/root{folder}/secret').read() else 0",
    "passwords": "def f():\n    return 1 if open('/etc/passwd').read() else 0",
    "environment": "import os\ndef f():\n    return 1 if 'SECRET_TOKEN' in os.environ else 0",
    "environment_of_others": "import glob\ndef f():\n    found = b''\n    for name in glob.glob('/proc/*/environ'):\n"
    "        try:\n            found += open(name, 'rb').read()\n        except OSError:\n            pass\n"
    "    return 1 if b'hidden' in found else 0",
    "write_outside": "def f():\n    open('{folder}/written', 'w').write('x')\n    return 1",
    "write_system": "import sys\ndef f():\n    open(sys.prefix + '/written', 'w').write('x')\n    return 1",
    "write_root": "def f():\n    open('/written', 'w').write('x')\n    return 1",
    "memory": "def f():\n    block = bytearray(10 << 30)\n    return 1",
    "memory_shared": "import mmap\ndef f():\n    block = mmap.mmap(-1, 10 << 30)\n    return 1",
    "memory_file": "import os\ndef f():\n    os.memfd_create('x')\n    return 1",
    "semaphores": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).semget(0, 1, 0o1600) >= 0 else 0",
    "messages": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).msgget(0, 0o1600) >= 0 else 0",
    "shared_memory": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0 else 0",
    "message_queue": "import ctypes\ndef f():\n"
    "    return 1 if ctypes.CDLL(None).mq_open(b'/q', 0o102, 0o600, None) >= 0 else 0",
    "disk": "def f():\n    for n in range(100):\n        with open(f'file{{n}}', 'wb') as file:\n"
    "            file.write(bytes(4 << 20))\n    return 1",
    "big_file": "def f():\n    with open('file', 'wb') as file:\n        file.write(bytes(12 << 20))\n    return 1",
    "many_files": "def f():\n    for n in range(1000):\n        open(f'file{{n}}', 'w').close()\n    return 1",
    "fork_bomb": "import os\ndef f():\n    made = 0\n    for n in range(200):\n        made += 1\n"
    "        if os.fork() == 0:\n            while True:\n                pass\n    return 1",
    "threads": "import threading, time\ndef f():\n    for n in range(200):\n"
    "        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n    return 1",
    "raise_limits": "import resource\ndef f():\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return 1",
    "namespaces": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0",
    "mount": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).mount(b'x', b'/jail-work', b'tmpfs', 0, None) "
    "== 0 else 0",
    "ptrace": "import ctypes\ndef f():\n    return 1 if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 else 0",
    "become_root": "import os\ndef f():\n    os.setuid(0)\n    return 1",
    "network_of_init": "import os\ndef f():\n    os.setns(os.open('/proc/1/ns/net', os.O_RDONLY))\n    return 1",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_gets_out(outside, name):
    ports = {kind: outside[kind].getsockname()[1] for kind in ("tcp", "udp")}
    verdict = attempt(ESCAPES[name].format(folder=outside["folder"], **ports), wall_seconds=60)
    assert not verdict.passed
    assert verdict.why != "out of time"  # refused, not merely slow
    assert [file.name for file in outside["folder"].iterdir()] == ["secret"]
    for listener, call in ((outside["tcp"], "accept"), (outside["udp"], "recvfrom")):
        with pytest.raises(BlockingIOError):  # nobody called
            getattr(listener, call)(*([10] if call == "recvfrom" else []))


CHILDREN = """
import os, signal, time
def f():
    blocks = []
    for n in range(4):
        if os.fork() == 0:
            block = bytearray(400 << 20)  # each less than a process may have
            for place in range(0, len(block), 4096):
                block[place] = 1
            time.sleep(2)
            os._exit(0)
    return 1 if all(os.wait()[1] == 0 for n in range(4)) else 0
"""


def test_children_share_one_memory_limit():
    if groups_parent() is None:
        pytest.skip("no memory groups on this machine")
    assert not attempt(CHILDREN, wall_seconds=60).passed
    assert attempt(CHILDREN.replace("400 << 20", "20 << 20"), wall_seconds=60).passed
    assert not list(groups_parent().glob(f"jail-{os.getpid()}-*"))


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_machine_without_memory_groups_does_without(monkeypatch, tmp_path, limit):
    monkeypatch.setattr(code_cgroup, "_candidates", lambda: iter([tmp_path / "none", tmp_path]))
    code_cgroup.groups_parent.cache_clear()
    try:
        with code_cgroup.memory_group(limit) as group:
            assert group is None
        assert protection(True)["memory"] == "of each process"
        assert attempt("def f():\n    return 1").passed
    finally:
        code_cgroup.groups_parent.cache_clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allow", [True, "unconfined"])
def test_records_say_how_programs_were_locked_in(allow):
    said = protection(allow)
    assert said["confined"] == (allow is True)
    assert set(said) == {"confined", "system_calls", "memory"}


@pytest.mark.parametrize("confine", [True, False])
def test_no_descriptor_of_ours_is_inherited(outside, confine):
    """Inside there are three of /dev/null and the two pipes, from the first line on, whatever is open here."""
    program = "import os\ndef seen():\n    found = []\n    for n in range(64):\n        try:\n"
    program += (
        "            found.append(os.readlink(f'/proc/self/fd/{n}'))\n        except OSError:\n            pass\n"
    )
    program += "    return ' '.join(path.partition('[')[0] for path in found)\nfirst = seen()\n"
    program += "def f():\n    return first + ', ' + seen()\n"
    nulls_and_pipes = "/dev/null /dev/null /dev/null pipe: pipe:"
    test = f"def check(f):\n    assert f() == '{nulls_and_pipes}, {nulls_and_pipes}', f()\n"
    with open(outside["folder"] / "secret") as file:
        os.set_inheritable(file.fileno(), True)  # as a careless library would
        verdict = run_tests(program, prompt="", entry_point="f", test=test, confine=confine)
    assert verdict.passed, verdict.why


def test_other_processes_survive(outside):
    kill = "import os\ndef f():\n    for pid in [os.getppid(), 1, -1, *range(2, 5000), {sleeper}, {test}]:\n"
    kill += "        if pid != os.getpid():\n            try:\n                os.kill(pid, 9)\n"
    kill += "            except OSError:\n                pass\n    return 1"
    attempt(kill.format(sleeper=outside["sleeper"].pid, test=os.getpid()))
    assert outside["sleeper"].poll() is None


@pytest.mark.parametrize("forked", ["os.setsid()", "pass"])
def test_nothing_is_left_behind(forked):
    mark = f"{os.getpid()}.{time.time_ns()}"
    program = "import os, sys\nif os.fork() == 0:\n    {}\n    os.execv(sys.executable, [sys.executable, '-c', "
    program += "'import time; time.sleep(600)', '{}'])\ndef f():\n    return 1\n"
    assert attempt(program.format(forked, mark)).passed
    give_up = time.monotonic() + 10  # a killed process is there until the kernel has come to it
    while left := _marked(mark):
        assert time.monotonic() < give_up, left
        time.sleep(0.05)


def _marked(mark: str) -> list[str]:
    """Processes with the mark in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in file.read_bytes():
                found.append(str(file))
    return found


FORGERIES = {
    "printed": 'print(\'passed\')\nprint(\'{"passed": true, "why": ""}\')\ndef f():\n    return 2',
    "every_descriptor": "import os\nfor fd in range(3, 64):\n    try:\n"
    '        os.write(fd, b\'{"passed": true, "why": "passed"}\\n\' * 9)\n'
    "    except OSError:\n        pass\nos._exit(0)",
    "exit": "exit(0)",
    "exit_in_function": "import sys\ndef f():\n    sys.exit(0)",
    "hard_exit": "import os\nos._exit(0)",
    "own_check": "def check(f):\n    pass\ndef f():\n    return 2",
    "equal_to_all": "class All(int):\n    def __eq__(self, other):\n        return True\ndef f():\n    return All(2)",
    "equal_object": "class All:\n    def __eq__(self, other):\n        return True\ndef f():\n    return All()",
    "builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.exec = print\ndef f():\n    return 2",
    "frames": "import sys\ndef f():\n    frame = sys._getframe()\n    while frame:\n        for value in "
    "list(frame.f_globals.values()):\n            if callable(value) and getattr(value, '__name__', '') == 'encoded':\n"
    "                frame.f_globals['encoded'] = lambda value: ['int', 'one']\n"
    "        frame = frame.f_back\n    return 2",
    "trace": "import sys\nsys.settrace(lambda *a: None)\ndef f():\n    return 2",
    "deep": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n=0):\n    return f(n + 1)",
    "deep_answer": "def f():\n    found = []\n    for n in range(10**5):\n        found = [found]\n    return found",
    "long_answer": "def f():\n    return 'x' * 10**8",
    "endless_answer": "import itertools\ndef f():\n    return itertools.count()",
    "no_function": "x = 1",
    "syntax": "def f(:\n    return 1",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_success_can_be_forged(name):
    assert not attempt(FORGERIES[name], cpu_seconds=1, wall_seconds=60).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def f():\n    while True:\n        pass", "no answer"),
        ("import time\ndef f():\n    time.sleep(600)", "out of time"),
    ],
)
def test_endless_programs_end(program, why):
    started = time.monotonic()
    verdict = attempt(program, cpu_seconds=1, wall_seconds=3 if "sleep" in program else 60)
    assert (verdict.passed, why in verdict.why) == (False, True)
    assert time.monotonic() - started < 60


def test_output_is_neither_kept_nor_in_the_way():
    assert attempt("def f():\n    for n in range(300):\n        print('x' * 10**5)\n    return 1").passed


HARMLESS = {
    "plain": ("def f(x):\n    return x + 1", "assert f(1) == 2 and f(2.5) == 3.5 and f(10**3000) == 10**3000 + 1"),
    "wrong": ("def f(x):\n    return x", "assert f(1) == 2"),
    "raises": ("def f(x):\n    return 1 // 0", "assert f(1) == 2"),
    "in_place": ("def f(x):\n    x.sort()\n    return x[0]", "a = [3, 1, 2]\n    assert f(a) == 1 and a == [1, 2, 3]"),
    "kinds": (
        "def f(x):\n    return x",
        "assert all(f(x) == x and type(f(x)) is type(x) for x in (None, True, 'é', "
        "(1, (2,)), {1: [2]}, {3}, b'x', 1j, float('inf'), range(3)))",
    ),  # fmt: skip
    "subclass": (
        "from collections import Counter\ndef f(x):\n    return Counter(x)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "lazy": ("def f(x):\n    return (y for y in x)", "assert list(f([1, 2])) == [1, 2]"),
    "lazy_not_equal": ("def f(x):\n    return map(int, x)", "assert f([1, 2]) == [1, 2]"),
    "exact": ("from fractions import Fraction\ndef f(x):\n    return Fraction(1, 2)", "assert f(1) == 0.5"),
    "helper": ("def f(x):\n    return helper(x)\ndef helper(x):\n    return 7", "assert f(1) == 7"),
    "import": (
        "import math, re, typing, collections, heapq\ndef f(x):\n    return math.floor(x)",
        "assert f(1.5) == 1",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_verdicts_are_those_of_running_it_in_one_process(name):
    """The published evaluation: exec of program, test and the call, where an exception is a failure."""
    program, body = HARMLESS[name]
    test = f"def check(f):\n    {body}\n"
    try:
        exec(f"{program}\n{test}\ncheck(f)", {})
        expected = True
    except Exception:
        expected = False
    verdict = run_tests(program, prompt="def f(x):\n    pass\n", entry_point="f", test=test)
    assert verdict.passed == expected, verdict.why


def test_humaneval_solutions_pass_and_broken_ones_do_not(shared):
    """Every sixteenth function; all 164 take a minute. Broken: the answer in a list, and no body at all."""
    from robot_forgetting.tasks.sources import read_rows

    rows = [row.value for row in read_rows(shared / "data" / "humaneval" / "HumanEval.jsonl.gz")][::16]
    assert len(rows) == 11
    for index, row in enumerate(rows):
        known = {key: row[key] for key in ("prompt", "entry_point", "test")}
        solution = row["prompt"] + row["canonical_solution"]
        verdict = run_tests(solution, **known)
        assert verdict.passed, (row["task_id"], verdict.why)
        name = row["entry_point"]
        wrapped = f"\n_inner = {name}\ndef {name}(*arguments):\n    return [_inner(*arguments)]\n"
        broken = solution + wrapped if index % 2 else row["prompt"] + "    pass\n"
        assert not run_tests(broken, **known).passed


@pytest.mark.parametrize(
    ("allow", "problem", "words"),
    [
        (False, None, "allow_code_execution=true"),
        (True, None, None),
        (True, "unshare: not permitted", "allow_code_execution=unconfined"),
        ("unconfined", "unshare: not permitted", None),
    ],
)
def test_who_may_run_code(monkeypatch, allow, problem, words):
    monkeypatch.setattr(code_sandbox, "lock_problem", lambda: problem)
    reason = check_allowed(allow, "humaneval")
    assert reason is None if words is None else words in reason


def test_other_words_are_refused():
    with pytest.raises(UserError, match="allow_code_execution=yes is not one of"):
        check_allowed("yes", "humaneval")


def test_unconfined_keeps_the_limits():
    assert attempt("def f():\n    return 1", confine=False).passed
    assert not attempt("def f():\n    return len(bytearray(10 << 30)) and 1", confine=False).passed
    assert not attempt("import os\ndef f():\n    return 1 if 'HOSTNAME' in os.environ else 2", confine=False).passed
    socket_program = "import socket\ndef f():\n    return 1 if socket.socket() else 0"
    assert not attempt(socket_program, confine=False).passed


def test_a_machine_without_namespaces_says_so(monkeypatch):
    monkeypatch.setattr(code_sandbox.sys, "platform", "darwin")
    assert lock_problem.__wrapped__() == "no namespaces on darwin"
