"""Files that survive a kill: atomic JSON, clear words for a full disk, and a lock that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from robot_forgetting.errors import UserError

# Folders this process has locked. POSIX locks belong to a process and vanish when *any* descriptor of the lock file is
# closed, so we must know which locks are our own before probing one. (Unlike flock they are not inherited by forked
# environment workers, which could outlive a killed parent and keep its folder locked.)
_LOCKED: set[str] = set()


def write_json(path: Path, value: Mapping) -> None:
    """Writes a JSON file atomically. Non-finite numbers become null."""
    write_atomic(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a kill at any moment, sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)


def follow_umask(path: Path) -> None:
    """Gives a file the mode that the umask gives new files; safetensors makes its own private (600)."""
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def plain(value):
    """Plain JSON values: numpy and torch scalars become numbers, paths strings, non-finite numbers null.

    A text with half of a surrogate pair, which a model's program can raise and no file can hold, shows it as \\ud800.
    """
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return plain(str(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"cannot record a {type(value).__name__}: {value!r}")


def read_json(path: Path) -> dict:
    """A JSON object from a file; ``UserError`` where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or delete the run folder") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; restore it or delete the run folder")
    return value


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` while writing ``path`` into a ``UserError`` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {path} could not be written; free some space and run the same command again, "
                "what was recorded before is intact"
            ) from error
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another run_dir or output") from error


def take_lock(path: Path) -> int:
    """Locks a folder for this process until ``release_lock`` or the process's death, however it dies."""
    key = str(path.resolve())
    with disk(path):
        file = None if key in _LOCKED else os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if file is None or not _locked_soon(file):
        owner = f"pid {os.getpid()}" if file is None else (path / ".lock").read_text().strip()
        if file is not None:
            os.close(file)
        raise UserError(
            f"{path} is being written by another process ({owner}); wait for it, stop it, or choose another run_dir"
        )
    with contextlib.suppress(OSError):  # the text is only for the message above
        os.ftruncate(file, 0)
        os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _LOCKED.add(key)
    return file


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
    os.close(file)  # the kernel does the same for a process that dies, so a lock is never stale
    _LOCKED.discard(str(path.resolve()))


def has_writer(path: Path) -> bool:
    """Whether a living process has the folder locked."""
    if str(path.resolve()) in _LOCKED:
        return True
    try:
        with open(path / ".lock", "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no lock file: a copied or shipped folder
        return False
    return False
