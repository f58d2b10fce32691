"""One memory limit for all processes of a jail together, where this machine lets us set one: cgroups of either version.

The limit on address space is each process's own, so a program with six processes could hold six times as much.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

NUMBERS = itertools.count()
JOIN = "import sys; open(sys.argv[1], 'w').write('0')"  # 0: whoever writes


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[str | None]:
    """A group with at most ``limit`` bytes: the file that a process joins it by; None where there can be none."""
    if (parent := groups_parent()) is None:
        yield None
        return
    group = _made(parent, limit)
    try:
        yield None if group is None else str(group / "cgroup.procs")
    finally:
        _removed(group)


@lru_cache(maxsize=1)
def groups_parent() -> Path | None:
    """The folder in which such groups can be made; found out once, by making one and joining it."""
    if sys.platform != "linux":
        return None
    for parent in _candidates():
        group = _made(parent, 1 << 30)
        try:
            if group is not None:
                command = [sys.executable, "-I", "-S", "-c", JOIN, str(group / "cgroup.procs")]
                if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0:
                    return parent
        except (OSError, subprocess.SubprocessError):
            pass
        finally:
            _removed(group)
    return None


def _candidates() -> Iterator[Path]:
    """Our own groups with a memory controller, and their parents: version 2 lets no group with processes have parts."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        mine = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            name = "" if kind == "cgroup2" else "memory"
            path = next((path for _, names, path in mine if name in names.split(",")), "/").strip("/")
            own = Path(place) / path
            yield from (folder for folder in dict.fromkeys([own, own.parent, Path(place)]) if folder.is_dir())


def _made(parent: Path, limit: int) -> Path | None:
    group = parent / f"jail-{os.getpid()}-{next(NUMBERS)}"
    try:
        group.mkdir()
        name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        with open(group / name, "r+") as file:  # never makes a file: where it is missing, there is no limit
            file.write(str(limit))
    except OSError:
        _removed(group)
        return None
    for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", limit)):
        with contextlib.suppress(OSError), open(group / name, "r+") as file:
            file.write(str(value))
    return group


def _removed(group: Path | None) -> None:
    for _ in range(40):  # processes that were killed leave it a moment later
        try:
            if group is not None:
                group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
