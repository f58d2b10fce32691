"""A run's config.yaml: read with today's names, and compared with the configuration of a command that continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.machine.files import plain
from robot_forgetting.moved import current


class _Loader(yaml.SafeLoader):
    """Without aliases, of which none is written here: a few lines of them are a gigabyte."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)


def _with_current_names(value):
    if isinstance(value, dict):
        return {key: _with_current_names(item) for key, item in value.items()}
    return current(value) if isinstance(value, str) else value


def read_config(path: Path) -> dict:
    """The values that JSON knows, with today's names of what they name; a date is a text."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        value = _with_current_names(json.loads(json.dumps(value, default=str)))
        if not isinstance(value, dict):
            raise TypeError("no mapping")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML ({one_line(error)}); restore it") from None
    return value


def check_config(path: Path, config: Mapping, ignore: Sequence[str]) -> None:
    """``UserError`` where the run folder ``path`` was made with another one; see ``differing_keys``."""
    file = path / "config.yaml"
    if not file.is_file():
        return
    new = yaml.safe_load(yaml.safe_dump(plain(config)))  # the same round trip as the file's content
    lines = differing_keys(read_config(file), new, ignore)
    if lines:
        shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
        raise UserError(
            f"{path} was made with another configuration ({shown}); repeat the earlier command to continue it, "
            "or choose another run_dir"
        )


def differing_keys(old: Mapping, new: Mapping, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys in which two nested configurations differ, as 'key: old, now new'."""

    def flat(value, prefix=""):
        if isinstance(value, Mapping) and value:
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
        return {prefix[:-1]: current(value) if isinstance(value, str) else value}

    absent = object()
    left, right = (flat({k: v for k, v in plain(config).items() if k not in ignore}) for config in (old, new))
    lines = []
    for key in list(left) + [key for key in right if key not in left]:
        a, b = left.get(key, absent), right.get(key, absent)
        if a != b:
            said = ["absent" if value is absent else json.dumps(value, ensure_ascii=False) for value in (a, b)]
            lines.append(f"{key}: {said[0]}, now {said[1]}")
    return lines
