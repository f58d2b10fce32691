"""One process writes a folder: a lock that dies with its process, and what stands for it where there are no locks.

The file systems of many clusters know no POSIX locks. There a file that only one process can have made stands for the
lock. It outlives a process that is killed; on the machine that made it this is found out, and the next start takes
over. From another machine nobody can tell a process that was killed from one that works, and two writers would mix
their rows: there the next start is refused until the file has been deleted by hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import disk

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
LOCK, WRITER, TAKING_OVER = ".lock", ".writer", ".writer.taken_over"

# Folders this process has locked. POSIX locks belong to a process and vanish when *any* descriptor of the lock file is
# closed, so we must know which locks are our own before probing one. (Unlike flock they are not inherited by forked
# environment workers, which could outlive a killed parent and keep its folder locked.)
_LOCKED: set[str] = set()


def take_lock(path: Path) -> int:
    """Locks a folder for this process until ``release_lock`` or the process's death, however it dies."""
    key = str(path.resolve())
    if key in _LOCKED:
        raise _busy(path, f"pid {os.getpid()}")
    with disk(path):
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _locked_soon(file):
                raise _busy(path, (path / LOCK).read_text().strip())
        except OSError as error:
            os.close(file)
            if error.errno not in NO_LOCKS:
                raise
            file = _take_without_locks(path)
        except UserError:
            os.close(file)
            raise
        else:
            with contextlib.suppress(OSError):  # the text is only for the message above
                os.ftruncate(file, 0)
                os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _LOCKED.add(key)
    return file


def _busy(path: Path, owner: str) -> UserError:
    return UserError(
        f"{path} is being written by another process ({owner}); wait for it, stop it, or choose another run_dir"
    )


def _locked_soon(file: int) -> bool:
    for _ in range(5):  # a reader's ``has_writer`` holds the lock for an instant
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            time.sleep(0.05)
    return False


def release_lock(path: Path, file: int) -> None:
    """Gives a folder free."""
    if _owner(path) == _me():
        with contextlib.suppress(OSError):
            (path / WRITER).unlink()
    os.close(file)  # the kernel does the same for a process that dies, so a lock is never stale
    _LOCKED.discard(str(path.resolve()))


def has_writer(path: Path) -> bool:
    """Whether a living process has the folder locked."""
    if str(path.resolve()) in _LOCKED:
        return True
    try:
        with open(path / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:  # no lock file: a copied or shipped folder
        return error.errno in NO_LOCKS and (path / WRITER).exists() and not _dead(_owner(path))
    return False


# ---- without locks


def _take_without_locks(path: Path) -> int:
    if (path / WRITER).exists() and _dead(_owner(path)):
        # Of two that find a dead owner one may go on; the other's look at it may be outdated.
        os.close(_make(path / TAKING_OVER, path))
        if _dead(_owner(path)):
            (path / WRITER).unlink()
        (path / TAKING_OVER).unlink()
    return _make(path / WRITER, path)


def _make(file: Path, path: Path) -> int:
    try:
        made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        owner = _owner(path)
        who = f"pid {owner.get('pid')} on {owner.get('host')}"
        if _mine(owner) and not _dead(owner):
            raise _busy(path, who) from None
        raise UserError(
            f"{path} is being written by {who}, or that process was killed: this file system has no locks, which would "
            f"tell; if it has ended, delete {file} and run the same command again"
        ) from None
    os.write(made, json.dumps(_me()).encode())
    os.fsync(made)
    return made


def _me() -> dict:
    """This process, so that it is told from a later one of the same number, of another machine or container."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "started": _started(os.getpid())}


def _owner(path: Path) -> dict:
    try:
        found = json.loads((path / WRITER).read_text())
    except (OSError, ValueError):  # none, or about to be written
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _mine(owner: dict) -> bool:
    return owner.get("machine") == _machine()


def _dead(owner: dict) -> bool:
    """Whether the owner is known to have ended: a process of this machine that is there no more."""
    return _mine(owner) and isinstance(owner.get("pid"), int) and _started(owner["pid"]) != owner.get("started")
