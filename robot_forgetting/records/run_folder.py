"""Run folders: every number, table, figure and page is computed from these files alone.

A folder holds config.yaml, run.json, ``*.jsonl`` rows, checkpoints/, videos/ and, written last, summary.json. Rows are
only ever appended, JSON files are replaced atomically, so a process killed at any moment loses at most the line that it
was writing. One process writes a folder; any number may read it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import yaml

from robot_forgetting.errors import UserError, described, one_line
from robot_forgetting.machine.children import undisturbed
from robot_forgetting.machine.files import disk, plain, read_json, remove_leftovers, write_atomic, write_json
from robot_forgetting.records import schema
from robot_forgetting.records.config_file import check_config, read_config
from robot_forgetting.records.locks import has_writer, release_lock, take_lock

SCHEMA_VERSION = 1
STATUSES = ("running", "finished", "interrupted", "failed")
TABLES = ("episodes", "train", "divergence")

# Keys of config.yaml that say how a command is run and not what it computes.
PASSING_KEYS = ("debug", "run_dir", "hydra", "reproduce", "quick")


class RunFolder:
    """A run folder, open for reading; ``RunFolder.create`` (re)opens one for writing.

    Raises ``UserError`` where ``path`` is no run folder or was written by a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, int] = {}
        self._lock: int | None = None
        if not (self.path / "run.json").is_file():
            what = "is a file" if self.path.is_file() else "has no run.json" if self.path.is_dir() else "does not exist"
            raise UserError(f"{self.path} is not a run folder: it {what}; give a folder like runs/NAME/RUN_ID")
        version = self.run.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise UserError(
                f"{self.path} has schema_version {version!r}, this program reads up to {SCHEMA_VERSION}; "
                "update robot-forgetting"
            )

    @classmethod
    def create(cls, path: str | Path, *, config: Mapping, run: Mapping | None = None) -> RunFolder:
        """Makes the folder, or continues the one that is there, and locks it until ``close``.

        config: the resolved configuration as plain values, written to config.yaml; continuing with another one is an
            error that names the differing keys (``PASSING_KEYS`` excepted).
        run: further keys of run.json (verb, name, policy, task, method, penalty, seed, decode, roles, ...).
        """
        path = Path(path)
        with disk(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
        try:
            earlier = read_json(path / "run.json") if (path / "run.json").is_file() else None
            if earlier is not None:
                cls(path)  # refuses a newer schema before anything is touched
            try:
                check_config(path, config, PASSING_KEYS)
            except UserError:
                if holds_records(path):
                    raise
                # A start that failed before it recorded anything: the command has been corrected, begin again.
                earlier = None
                (path / "config.yaml").unlink()
            remove_leftovers(path)
            for file in sorted(path.glob("*.jsonl")):
                _drop_broken_tail(file)
            if earlier is None:
                state = {
                    "schema_version": SCHEMA_VERSION,
                    "status": "running",
                    "verb": None,
                    "name": path.name,
                    **dict.fromkeys(("policy", "task", "method", "penalty", "seed", "decode")),
                    **{key: {} for key in ("roles", "versions", "hardware", "render", "timings")},
                    **dict.fromkeys(("peak_memory_bytes", "shipped", "error")),
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "restarts": 0,
                } | dict(run or {})
            else:
                kept = {key: value for key, value in (run or {}).items() if key not in ("timings", "status")}
                state = earlier | kept
                if earlier.get("status") != "finished":
                    state |= {"status": "running", "error": None, "restarts": earlier.get("restarts", 0) + 1}
            if not (path / "config.yaml").is_file():
                write_atomic(path / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
            write_json(path / "run.json", state)
            folder = cls(path)
        except BaseException:
            release_lock(path, lock)
            raise
        folder._lock = lock
        return folder

    # ---- reading

    @property
    def run(self) -> dict:
        """The content of run.json."""
        file = self.path / "run.json"
        return schema.checked(read_json(file), schema.RUN, str(file), "restore it or delete the run folder")

    @property
    def id(self) -> str:
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """``running | finished | interrupted | failed``; a run that says "running" but has no writer was "
        "interrupted."""
        status = self.run.get("status", "failed")
        return "interrupted" if status == "running" and not has_writer(self.path) else status

    @property
    def finished(self) -> bool:
        return self.run.get("status") == "finished" and (self.path / "summary.json").is_file()

    def config(self) -> dict:
        """The content of config.yaml, empty where there is none."""
        file = self.path / "config.yaml"
        return read_config(file) if file.is_file() else {}

    def rows(self, table: str) -> list[dict]:
        """Complete rows of ``<table>.jsonl`` in the order written; none where the file is absent."""
        file, keys = self.path / f"{table}.jsonl", schema.TABLES.get(table, {})
        return [
            schema.checked(row, keys, f"{file} line {number}", "remove that line")
            for number, row in enumerate(_lines(file), start=1)
        ]

    def episodes(self) -> list[dict]:
        return self.rows("episodes")

    def summary(self) -> dict | None:
        """The content of summary.json, or None before the run has ended."""
        file = self.path / "summary.json"
        if not file.is_file():
            return None
        fix = "restore it, or delete it and run the same command again"
        found = schema.checked(read_json(file), schema.SUMMARY, str(file), fix)
        for name, keys in {"success": schema.SUCCESS, **schema.TABLES}.items():
            if found.get(name):
                rows = enumerate(found[name], start=1)
                found[name] = [schema.checked(row, keys, f"{file}, {name}, row {n}", fix) for n, row in rows]
        return found

    def file(self, name: str | Path) -> Path | None:
        """The regular file that a record or a link in the folder names, where it lies below the folder; else None."""
        try:
            path, top = (self.path / name).resolve(), self.path.resolve()
            return path if path.is_file() and path.is_relative_to(top) else None
        except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, a link to itself
            return None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def videos(self) -> Path:
        return self.path / "videos"

    # ---- writing

    def append(self, table: str, *rows: Mapping) -> None:
        """Appends rows in one write, so that a kill loses all of them or none. Non-finite numbers become null.

        When the disk is full the file is cut back to what it was before and a ``UserError`` says so.
        """
        if not rows:
            return
        self._must_write()
        path = self.path / f"{table}.jsonl"
        with disk(path):
            if table not in self._files:
                self._files[table] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            file = self._files[table]
            lines = "".join(_dumps(row) + "\n" for row in rows).encode()
            if os.fstat(file).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            size = os.fstat(file).st_size
            try:
                if os.write(file, lines) < len(lines):  # the rest does not fit
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)
                raise
            os.fsync(file)

    def keep(self, table: str, predicate: Callable[[dict], bool]) -> int:
        """Atomically removes the rows for which ``predicate`` is false; returns how many.

        For a restart: rows of iterations after the last checkpoint will be written again.
        """
        self._must_write()
        rows = _lines(self.path / f"{table}.jsonl")
        kept = [row for row, read in zip(rows, self.rows(table), strict=True) if predicate(read)]
        if len(kept) < len(rows):
            if table in self._files:
                os.close(self._files.pop(table))
            write_atomic(self.path / f"{table}.jsonl", "".join(_dumps(row) + "\n" for row in kept))
        return len(rows) - len(kept)

    def update(self, **fields) -> None:
        """Sets keys of run.json; dictionaries (versions, timings, ...) are merged into those that are there."""
        self._must_write()
        if "status" in fields and fields["status"] not in STATUSES:
            raise ValueError(f"status {fields['status']!r}; one of {STATUSES}")
        state = self.run
        for key, value in fields.items():
            both = isinstance(value, Mapping) and isinstance(state.get(key), Mapping)
            state[key] = {**state[key], **value} if both else value
        write_json(self.path / "run.json", state)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Adds to ``timings[name]``, so that the time of a restarted run is the time of all its parts."""
        timings = self.run.get("timings", {})
        self.update(timings={name: timings.get(name, 0.0) + seconds})

    def finish(self, summary: Mapping, **fields) -> None:
        """Marks the run finished and writes summary.json, the last file of a run."""
        self.update(status="finished", error=None, **fields)
        write_json(self.path / "summary.json", {"schema_version": SCHEMA_VERSION} | dict(summary))

    def close(self) -> None:
        """Closes the files and gives the folder free; idempotent."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._lock is not None:
            release_lock(self.path, self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """An exception is recorded as the run's end: Ctrl-C as "interrupted", anything else as "failed"."""
        with undisturbed(), contextlib.closing(self), contextlib.suppress(UserError):
            # Suppressed: that the disk is full, or the folder gone, must not hide the first error.
            if kind is not None and not self.finished:
                status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
                text = one_line(error) if isinstance(error, UserError) else described(error)
                self.update(status=status, error=None if status == "interrupted" else text)

    def _must_write(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is open for reading; use RunFolder.create to write")


def holds_records(path: Path) -> bool:
    """Whether a run in this folder got as far as recording anything: a row, a checkpoint, a video, a summary."""
    kept = ("*.jsonl", "checkpoints/*/*", "videos/*", "summary.json")
    return any(file.stat().st_size > 0 for pattern in kept for file in path.glob(pattern))


def find_runs(paths: Iterable[str | Path]) -> list[RunFolder]:
    """The run folders at or below the given paths, in the order given, each once; a path that is not there is an error.

    Files, and folders without a run, are passed over beside others: runs/NAME/* also matches the report and what else
    lies beside the run folders. No run folder at all is an error.
    """
    found: dict[Path, RunFolder] = {}
    paths = list(map(Path, paths))
    for path in paths:
        if path.name == "run.json":
            path = path.parent
        elif path.is_file():
            continue
        if not path.is_dir():
            raise UserError(f"{path} does not exist; give run folders, or a folder that holds some, like runs/NAME")
        for file in [path / "run.json"] if (path / "run.json").is_file() else sorted(path.glob("**/run.json")):
            found.setdefault(file.parent.resolve(), RunFolder(file.parent))
    if paths and not found:
        folders = [path for path in paths if path.is_dir()]
        what = f"{folders[0]} holds no run folder" if folders else f"{paths[0]} is a file"
        raise UserError(f"{what}; give run folders, or a folder that holds some, like runs/NAME")
    return list(found.values())


def _dumps(row: Mapping) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _lines(path: Path) -> list[dict]:
    return _parse(path, path.read_bytes())[0] if path.is_file() else []


def _parse(path: Path, data: bytes) -> tuple[list[dict], int]:
    """Rows and the length in bytes of the part that holds them. Only the last line may be broken."""
    rows, good = [], 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError("not an object")
        except (ValueError, TypeError, RecursionError) as error:
            # A power cut can leave a last line of zero bytes that even ends in a newline.
            if number == len(lines) - 1 and not lines[-1]:
                break
            raise UserError(f"{path} line {number} is not a JSON row ({error}); remove that line") from None
        rows.append(row)
        good += len(line) + 1
    return rows, good


def _drop_broken_tail(path: Path) -> None:
    data = path.read_bytes()
    good = _parse(path, data)[1]
    if good < len(data):
        with disk(path), open(path, "r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
