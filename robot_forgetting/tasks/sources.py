"""Where data sets come from: a local folder in the original files' layout, else a download of those same files.

$ROBOT_FORGETTING_DATA names a folder with one sub-folder per data set. Without it files are fetched from the Hub
("hub:OWNER/NAME") or from a pinned commit on GitHub ("https://...") and kept. Rows know their file and number, so that
every complaint can name them.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.machine.files import cache_folder, write_atomic

VARIABLE = "ROBOT_FORGETTING_DATA"
SURROGATE = re.compile("[\ud800-\udfff]")
SECONDS = 60.0  # without a byte, before a download is given up


def local_folder(name: str) -> Path | None:
    """$ROBOT_FORGETTING_DATA/NAME; None where the variable is not set."""
    root = os.environ.get(VARIABLE)
    return Path(root) / name if root else None


def find(name: str, files: Sequence[str], origin: str, *, needed: bool = True) -> Path | None:
    """The first of ``files`` in the data set's local folder; without local data, ``files[0]`` from its ``origin``.

    needed: False gives None, not a ``UserError``, where the local folder lacks all of them
    """
    folder = local_folder(name)
    if folder is None:
        return download(origin, files[0], f"set {VARIABLE} to a folder that holds {name}/{files[0]}")
    for file in files:
        if (folder / file).is_file():
            return folder / file
    if not needed:
        return None
    raise UserError(f"{folder} holds no {files[0]}; put it there ({origin}), or unset {VARIABLE} to download it")


def download(origin: str, file: str, otherwise: str) -> Path:
    """A file of the Hub or of a web folder, from the cache after the first time; ``UserError`` where neither works."""
    try:
        if origin.startswith("hub:"):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(origin.removeprefix("hub:"), file, repo_type="dataset"))
        cached = cache_folder() / origin.rstrip("/").partition("://")[2] / file
        if not cached.is_file():
            with urllib.request.urlopen(f"{origin.rstrip('/')}/{file}", timeout=SECONDS) as answer:
                content = answer.read()
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, content)
        return cached
    except UserError:
        raise
    except (OSError, ValueError, HTTPException) as error:  # no network, no such file, a cut connection
        text = one_line(error)[:200]
        raise UserError(f"{file} cannot be downloaded from {origin} ({text}); {otherwise}") from error


@dataclass(frozen=True)
class Row:
    """One record of a data file. where: 'FILE, row 3', counted from 1, for messages."""

    value: object
    where: str

    def get(self, *path: str | int, kind: type | tuple[type, ...] = str):
        """The value at a path of keys and indices; ``UserError`` where it is missing or of another type.

        A text with half of a surrogate pair is none: no tokenizer reads it.
        """
        value = self.value
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                raise UserError(f"{self.where}: no '{_dotted(path)}'; repair or remove that row") from None
        if not isinstance(value, kind) or isinstance(value, bool):
            names = {str: "a text", list: "a list", dict: "a mapping", int: "a whole number", object: "a value"}
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(names.get(one, one.__name__) for one in kinds)
            raise UserError(f"{self.where}: '{_dotted(path)}' is not {wanted}; repair or remove that row")
        if isinstance(value, str) and SURROGATE.search(value):
            raise UserError(f"{self.where}: '{_dotted(path)}' holds half a character; repair or remove that row")
        return value


def _dotted(path: Sequence) -> str:
    return ".".join(map(str, path))


def read_rows(file: Path) -> list[Row]:
    """All rows of a .jsonl file or of a .json file that holds one array, either gzipped or not."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    rows = list(_lines(file, text) if ".jsonl" in file.suffixes else _array(file, text))
    if not rows:
        raise UserError(f"{file} holds no rows; download it again")
    return rows


def _lines(file: Path, text: str) -> Iterator[Row]:
    # Not splitlines: texts may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line), f"{file}, row {number}")
        except ValueError as error:
            raise UserError(f"{file}, row {number} is not valid JSON ({error}); repair or remove that row") from None


def _array(file: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, list):
        raise UserError(f"{file} holds no list of rows; download it again")
    for number, value in enumerate(values, 1):
        yield Row(value, f"{file}, row {number}")
