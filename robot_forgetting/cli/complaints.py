"""Whatever goes wrong on the command line, as one line that names the problem and the fix."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from robot_forgetting.cli.config_checks import GROUPS
from robot_forgetting.errors import UserError, blamed, described, located, one_line, unknown


def complain(error: BaseException, overrides: Sequence[str], debug: bool, where: str = "") -> int:
    """Prints an error as one line, which says where in a sweep it happened; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader has gone (`| head`): nothing to say, and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(error)
    message = explain(error, overrides)
    start = f"error: {where}"
    if message is not None:
        print(f"{start}{message}", file=sys.stderr)
        return 2
    hint = "" if debug else "; debug=true shows the traceback"
    print(f"{start}{located(error)}{hint}", file=sys.stderr)
    return 1


def explain(error: BaseException, overrides: Sequence[str]) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    chain, seen = [], error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    for link in chain:
        if isinstance(link, UserError):
            return one_line(link)
    if (line := blamed(error)) is not None:
        return f"{line}; debug=true shows the traceback"
    if isinstance(error, UserWarning):  # raised only for a search path (see the filter in _hydra_main)
        folder = one_line(error).rpartition("path=")[2].replace(" is not available.", "")
        return f"hydra.searchpath: {folder} does not exist; give a folder as file://FOLDER"
    if not type(error).__module__.startswith(("hydra", "omegaconf", "yaml")):
        said = f"is no yaml file with keys ({one_line(error)}); mend it, or take it out of the folder"
        return f"{file} {said}" if (file := _file_being_read(error)) else None
    return _explain_hydra(error, one_line(error), overrides)


def _explain_hydra(error: BaseException, text: str, overrides: Sequence[str]) -> str:
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, name = missing.rpartition("/")
        options = getattr(error, "options", None)
        if group and options:
            root, _, folder = group.partition("/")  # of reproduce/llm
            shipped = Path(importlib.import_module("robot_forgetting.configs").__file__).parent / root
            nested = [path.relative_to(shipped).with_suffix("").as_posix() for path in shipped.glob("*/*.yaml")]
            return str(unknown(root, f"{folder}/{name}" if folder else name, {*options, *nested}))
        return f"there is no config '{missing}'"
    if "hydra.searchpath must be a list" in text:
        return "hydra.searchpath is a list of folders: write 'hydra.searchpath=[file://FOLDER]'"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], overrides)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = match[1].partition("=")
        return f"'{match[1]}' is ambiguous: add --multirun to sweep over it, or write '{key}=[{value}]' for a list"
    if type(error).__name__ == "OverrideParseException":
        return f"cannot read '{error.override}' as key=value; quote special characters, for example 'key=\"a b\"'"
    if match := re.search(r"Interpolation key '([^']+)' not found(?: full_key: (\S+))?", text):
        where = f"{match[2]} refers to" if match[2] else "there is no"
        return f"{where} ${{{match[1]}}}{', which there is not' if match[2] else ''}; write a key that --cfg job shows"
    if type(error).__module__.startswith("yaml"):
        return f"not valid yaml: {text}"
    cause = error.__cause__
    if cause is not None and (match := re.search(r"Error in call to target '([^']+)'", text)):
        return f"{match[1]} failed with {described(cause)}; debug=true shows the traceback"
    return f"{text} ({one_line(cause)})" if cause is not None and str(cause) not in str(error) else text


def _file_being_read(error: BaseException) -> str | None:
    """The yaml file that hydra was reading, which its error does not name."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "load_config"]
    return next((str(path) for frame in frames if (path := frame.f_locals.get("full_path"))), None)


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """'unknown key ...', naming the nearest ones that the same command without it has."""
    group = key.split("@")[0].replace("/", ".")
    known = sorted(_known_keys([text for text in overrides if text.split("=")[0] != key]))
    near = difflib.get_close_matches(group, known, n=3, cutoff=0.6)
    root = group.partition(".")[0] if "." in group else ""
    siblings = [name for name in known if name.rpartition(".")[0] == group.rpartition(".")[0]]
    more = f"; for one that its yaml leaves out, write +{key}=..." if "." in key else ""
    if root in GROUPS and not any(name.startswith(f"{root}.") for name in known):
        chosen = next((text.partition("=")[2] for text in overrides if text.startswith(f"{root}=")), "none")
        return f"unknown key '{key}': {root}={chosen} has no keys; choose another {root}, see robot-forgetting list"
    choices = near or siblings or [name for name in known if "." not in name]
    return f"unknown key '{key}'; {'did you mean' if near else 'choose one of'}: {', '.join(choices)}{more}"


def _known_keys(overrides: Sequence[str]) -> set[str]:
    import hydra
    from omegaconf import OmegaConf

    configs = importlib.import_module("robot_forgetting.configs")
    usable = [text for text in overrides if text.partition("=")[0] in (*GROUPS, "hydra.searchpath")]
    with hydra.initialize_config_dir(str(Path(configs.__file__).parent), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", overrides=usable))

    def walk(node: dict, prefix: str = ""):
        for name, value in node.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return {name for name in walk(config) if not name.endswith("_target_")}
