"""Files that survive a kill: atomic JSON, and clear words for a disk that is full or a folder that is gone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from robot_forgetting.errors import UserError


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
            with contextlib.suppress(OSError):  # some file systems cannot
                os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)


def cache_folder() -> Path:
    """The user's, for what can be made again; ``RuntimeError`` where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robot_forgetting"


def cached(name: str, text: str) -> Path:
    """A file of this text in the user's cache, the same for every process: for what a library reads from files only."""
    file = f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{name}"
    try:
        path = cache_folder() / file
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
    except (OSError, RuntimeError, ValueError, UserError):  # no home, or one that cannot be written
        path = Path(tempfile.mkdtemp(prefix="robot_forgetting_")) / name
        path.write_text(text, encoding="utf-8")
    return path


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process had not finished writing below a folder that nobody else writes."""
    for pattern in (".*.[0-9]*.tmp", "*/.*.[0-9]*.tmp", "*/*/.*.[0-9]*.tmp", "*/.*.part", "videos/.*.[0-9]*.mp4"):
        for file in folder.glob(pattern):
            with contextlib.suppress(OSError):
                file.unlink()
    for part in folder.glob("checkpoints/*.part"):
        shutil.rmtree(part, ignore_errors=True)


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
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(path, error)}") from error
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
        raise UserError(f"{path} cannot be written: {_reason(path, error)}") from error


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT and not Path(path).parent.is_dir():
        return "its folder was deleted or moved meanwhile; run the same command again"
    return f"{error.strerror}; choose another run_dir or output"
