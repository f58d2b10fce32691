"""The command line: `robot-forgetting VERB [key=value ...] [--multirun]`.

Reads the arguments; ``api.arguments`` composes the configuration and hands plain objects to plain functions, as the
Python API does; ``complaints`` makes one line on stderr of whatever goes wrong (exit code 2 for bad input, 1 for a bug;
`debug=true` adds the traceback). torch is imported only when a verb needs it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from robot_forgetting import __version__
from robot_forgetting.api.arguments import Arguments
from robot_forgetting.api.composing import CONFIGS, GROUPS, entries, key_of, readable, register_resolvers, replacing
from robot_forgetting.api.scripts import check_script
from robot_forgetting.api.settings import Settings
from robot_forgetting.cli.complaints import complain
from robot_forgetting.cli.help import HELP, help_text, verb_help
from robot_forgetting.errors import UserError, unknown
from robot_forgetting.machine import children
from robot_forgetting.machine.user_modules import search

# Verb: (function, what it does). The function's parameter names say what it is given (see ``Arguments``).
VERBS = {
    "run": ("robot_forgetting.engine.experiment:run", "fine-tune the policy on a new task, measure before and after"),
    "evaluate": ("robot_forgetting.engine.one_task:evaluate_command", "success of a policy on a task"),
    "record": ("robot_forgetting.engine.one_task:record_command", "one video per episode, into videos/"),
    "pretrain": ("robot_forgetting.engine.pretrain:pretrain", "train a base policy from scripted demonstrations"),
    "reproduce": (
        "robot_forgetting.studies:reproduce",
        "a published study, with all its runs: parity_mnist, llm/science",
    ),
    "report": ("robot_forgetting.studies:write_report", "one HTML page from run folders"),
    "check": ("robot_forgetting.conformance:check", "what is wrong with a task, method or policy of your own"),
    "assets": (
        "robot_forgetting.machine.assets:command",
        "SimplerEnv's meshes: assets bridge [folder=FOLDER] [yes=true]",
    ),
    "list": (
        "robot_forgetting.cli.help:list_choices",
        "what task=, method=, ... accept; list keys: every key with its range",
    ),
    "doctor": ("robot_forgetting.machine.doctor:doctor", "what is missing on this machine, and what to type"),
}

# Only these build objects, and so need a user's own modules; the others never look into the working folder for code.
BUILDING = {"run", "evaluate", "record", "pretrain", "reproduce", "check"}

# Verbs that read no configuration: `doctor` must work where nothing else does, `assets` is no experiment.
PLAIN = {
    "doctor": "usage: robot-forgetting doctor",
    "assets": "usage: robot-forgetting assets NAME [folder=FOLDER] [yes=true]",
}

# The hydra flags that make sense here. (--experimental-rerun, for one, would read a pickle.)
FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd"}
FLAGS = {"--multirun", "-m", "--resolve", "--info", "-i", *FLAGS_WITH_VALUE}
CFG = ("job", "hydra", "all")
SWEEP = {"--multirun", "-m"}
LIST_KEYS = ("list", "keys")


@children.stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # Before torch is imported: the parallelism is in processes, and threads that wait for a busy core make it slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        if not arguments or arguments[0] in HELP:
            print(help_text(VERBS))
            return 0
        if arguments[0] == "--version":
            print(f"robot-forgetting {__version__}")
            return 0
        verb, *rest = arguments
        if verb in BUILDING:
            check_script("main()")
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        asks = bool(HELP & set(rest))
        if verb in PLAIN:
            return _plain(verb, rest, asks)
        return _configured(verb, *_split(verb, [text for text in rest if text not in HELP]), debug, asks)
    except SystemExit as end:  # hydra's own parser, for example --cfg with an unknown value
        return end.code if isinstance(end.code, int) else 2
    except Exception as error:
        return complain(error, debug)


def _plain(verb: str, rest: list[str], asks: bool) -> int:
    if asks:
        print(f"{PLAIN[verb]}\n\n{VERBS[verb][1]}")
        return 0
    if verb == "doctor" and rest:
        raise UserError(f"doctor takes no arguments, not '{rest[0]}'")
    return load(VERBS[verb][0])(*[rest] * (verb != "doctor"))


def _split(verb: str, arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Hydra's flags, overrides, and positional arguments (run folders of `report`, `keys` of `list`)."""
    flags, overrides, positional = [], [], []
    given: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            if flag not in FLAGS:
                raise UserError(f"unknown option '{argument}'; robot-forgetting --help shows what there is")
            if flag in FLAGS_WITH_VALUE and not equals:
                value = next(rest, "")
            if flag in FLAGS_WITH_VALUE and not value or flag in ("--cfg", "-c") and value not in CFG:
                raise UserError(f"'{argument}': write --cfg job (or hydra, all), --package NAME, --config-dir FOLDER")
            if flag in ("--config-dir", "-cd"):
                overrides.append(_searchpath(value, given))
            else:
                flags += [flag, value] if flag in FLAGS_WITH_VALUE else [argument]
        elif (verb == "report" and ("=" not in argument or Path(argument).exists())) or (verb, argument) == LIST_KEYS:
            positional.append(argument)
        elif verb == "reproduce" and "=" not in argument and not argument.startswith("~"):
            overrides.append(f"reproduce={argument}")
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(_without_value(argument))
        else:
            _check_override(argument, given)
            overrides.append(argument)
    return flags, overrides, positional


def _searchpath(folder: str, given: dict[str, str]) -> str:
    """`--config-dir FOLDER` as the key that says the same, which also reaches what hydra's option does not."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} not found; give an existing folder after --config-dir")
    override = f'hydra.searchpath=["file://{Path(folder).absolute()}"]'
    _check_override(override, given)
    return override


def _check_override(argument: str, given: dict[str, str]) -> None:
    """What hydra would take, or end with a Python error; ``given``: key -> the argument that has set it."""
    key, value = key_of(argument), argument.partition("=")[2].strip()
    if not key:
        raise UserError(f"'{argument}' names no key; write key=value")
    if key in given:
        raise UserError(f"'{key}' is given twice: {given[key]} and {argument}; leave one out")
    given[key] = argument
    if argument.startswith("~") and key in (*Settings.__annotations__, "penalty"):
        raise UserError(f"'{key}' cannot be left out; give it a value: {key}=...")
    if key in GROUPS and (value.startswith(("[", "{")) or value == "null"):
        raise UserError(f"'{argument}': write {key}=NAME, one of those that robot-forgetting list shows")


def _without_value(argument: str) -> str:
    text = f"'{argument}' is not of the form key=value"
    if argument in GROUPS:
        return f"{text}; write {argument}=NAME (robot-forgetting list shows the names)"
    example = f"{argument}=..." if argument in Settings.__annotations__ else f"task={argument.lstrip('+') or 'NAME'}"
    return f"{text} (for example {example})"


def _configured(
    verb: str, flags: list[str], overrides: list[str], positional: list[str], debug: bool, asks: bool
) -> int:
    """A verb that reads the configuration, at every point of a sweep."""
    sweep = bool(SWEEP & set(flags))
    flags = [flag for flag in flags if flag not in SWEEP]
    if flags:
        return _shown(verb, flags, overrides)
    points = _points(overrides) if sweep else [overrides]
    folders: set[Path] = set()
    codes = []

    def check(arguments: Arguments) -> None:
        arguments.check(function())
        folder = arguments.run_folder(function())
        if folder in folders:
            raise UserError(f"an earlier point has this one's folder, {folder}; leave run_dir out, give sweep=NAME")
        if folder is not None:
            folders.add(folder)

    def run(arguments: Arguments) -> None:
        code = arguments.call(function())
        codes.append(code if type(code) is int else 0)

    def explain(arguments: Arguments) -> None:
        print(verb_help(verb, VERBS[verb][1], arguments, function()))

    def function() -> Callable:
        return load(VERBS[verb][0])

    def attempt(point: list[str], job: Callable[[Arguments], None], before: str = "") -> int:
        try:
            arguments = Arguments(verb, point, positional)
            own = verb == "report" and any("." in name for name in arguments.plain["sections"])
            if verb in BUILDING or own or (verb, *positional) == LIST_KEYS:
                search([os.getcwd(), *arguments.sources[1:]])
            job(arguments)
        except Exception as error:
            named = f"[{' '.join(text for text in point if not text.startswith('hydra.'))}] "
            return complain(error, debug, before + named if sweep else "")
        return 0

    if asks:
        return attempt(overrides, explain)
    # Every point is checked before the first one runs; after that, one that fails does not end the others.
    for point in points if sweep else ():
        if code := attempt(point, check, "nothing was run: "):
            return code
    codes += [attempt(point, run) for point in points]
    return max(codes, default=0)


def _shown(verb: str, flags: list[str], overrides: list[str]) -> int:
    """What hydra itself shows of a configuration: --cfg, --info."""
    import hydra

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    chosen = overrides
    keys = {key_of(text).partition(".")[0] for text in overrides}
    if "sequence" in keys or {"checkpoint", "policy"} <= keys:
        chosen = Arguments(verb, overrides).with_recorded_policy()
    texts = [text for override in chosen for text in replacing(override)]
    before, sys.argv = sys.argv, [f"robot-forgetting {verb}", *flags, *texts]
    try:
        with readable(overrides):
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(lambda config: None)()
    finally:
        sys.argv = before
    return 0


def _points(overrides: list[str]) -> list[list[str]]:
    """A sweep's points: every combination of the values that the overrides list, the last one changing fastest.

    Not hydra's own sweep, which applies plain overrides before it chooses the groups that are swept over, and would
    refuse a key that the default method lacks.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    folders = [CONFIGS]

    class Choices:
        """What `method=glob(s*)` chooses from, as far as hydra asks for it."""

        def get_group_options(self, group_name: str, results_filter=None) -> list[str]:
            return sorted(entries(folders, group_name))

    values = []
    with readable(overrides):
        parsed = OverridesParser.create(Choices()).parse_overrides(overrides)
    for one in parsed:
        if one.key_or_group == "hydra.searchpath":
            folders += [Path(str(folder).removeprefix("file://")) for folder in one.value()]
    for text, one in zip(overrides, parsed, strict=True):
        listed = one.sweep_string_iterator() if one.is_sweep_override() else ()
        values.append([f"{one.get_key_element()}={value}" for value in listed] or [text])
        if one.is_sweep_override() and values[-1] == [text]:
            raise UserError(f"'{text}' lists nothing to sweep over")
    return [list(point) for point in itertools.product(*values)]


def load(dotted: str) -> Callable:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)
