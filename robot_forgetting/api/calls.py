"""The Python API: the verbs of the command line, with objects where it has names.

Keywords are keys of config.yaml. The parts of an experiment (policy, task, method, penalty, the tasks of ``prior`` and
``held_out``) are objects, or names of yaml files. A mapping stands for the keys below its own (``decode={"temperature":
0.7}``), and a dotted key goes through ``**{"method.optimiser.learning_rate": 1e-4}``, with a + in front where the yaml
leaves it out. With objects alone, no yaml is read but config.yaml and the budget's, and hydra is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from robot_forgetting.api.arguments import LISTS, Arguments
from robot_forgetting.api.composing import defaults, written
from robot_forgetting.api.frames import Run
from robot_forgetting.api.scripts import check_script
from robot_forgetting.errors import UserError
from robot_forgetting.machine.user_modules import search

PARTS = ("policy", "task", "method", "penalty")
PLAIN = (str, bool, int, float, list, tuple, Mapping, type(None))  # what a key of config.yaml can be
# What has to be an object where no yaml is to be read.
NEEDED = {"run": {"policy", "task", "method"}, "evaluate": {"policy", "task"}, "record": {"policy", "task"}}


def run(**given) -> Run:
    """Fine-tunes a policy on a task, measures before and after what it can do, and records it: `robot-forgetting run`.

        run(policy=policy, task=task, method=SFT(...), prior=[other], budget={"episodes": 100}, seed=1)
        run(policy="qwen-nano", task="skill_over", method="grpo", seed=1)

    given: see above; defaults are config.yaml's, but ``prior`` and ``held_out`` are empty where the task is an object
    config_dir: a folder of yaml files of your own, or several

    The same call again continues an unfinished run, and leaves a finished one as it is. A policy object is trained in
    place: build it anew for another run.
    """
    from robot_forgetting.engine import experiment

    return _recorded("run", experiment.run, given)


def evaluate(**given) -> Run:
    """Success of a policy on a task, sampled and greedy; with ``checkpoint`` of a run's fine-tuned policy."""
    from robot_forgetting.engine.one_task import evaluate_command

    return _recorded("evaluate", evaluate_command, given)


def record(**given) -> Path:
    """One mp4 per episode, and a grid of them; returns their folder: ``output``, or videos/."""
    from robot_forgetting.engine.one_task import record_command

    arguments = _arguments("record", given)
    arguments.call(record_command)
    return arguments.value("output") or Path("videos")


def check(**given) -> bool:
    """What is wrong with a task, method, penalty or policy, one printed line per check; whether all passed."""
    from robot_forgetting import conformance

    return _arguments("check", given).call(conformance.check) == 0


def _recorded(verb: str, function: Callable, given: Mapping) -> Run:
    arguments = _arguments(verb, given)
    arguments.call(function)
    return Run(arguments.value("run_dir"))


def _arguments(verb: str, given: Mapping) -> Arguments:
    """The keywords of a call as the arguments of a verb."""
    check_script(f"robot_forgetting.{verb}()")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of worker processes
    given = {key: value for key, value in given.items() if value is not None or key not in (*PARTS, *LISTS)}
    folders = given.pop("config_dir", None) or []
    if given.get("penalty") == "none":
        del given["penalty"]
    if "sequence" in given and verb != "run":
        raise UserError(f"{verb} does not use a sequence; run does")
    if "sequence" in given and "task" in given:
        raise UserError("a task beside a sequence, which names the tasks itself; leave one of the two out")
    objects = {name: given.pop(name) for name in (*PARTS, *LISTS) if not _named(given.get(name))}
    for name, value in objects.items():
        if name in LISTS and not isinstance(value, list | tuple):
            raise UserError(f"{name} is a list; write {name}=[...]")
    first = objects.get("task") or next(iter(objects.get("sequence", [])), None)
    if first is not None and not isinstance(first, str):
        objects |= {name: [] for name in ("prior", "held_out") if name not in given and name not in objects}
        objects["task"] = first
    settings = dict(_settings(given))
    for key, value in settings.items():
        if not isinstance(value, PLAIN):
            kind, known = type(value).__name__, ", ".join((*PARTS, *LISTS))
            raise UserError(f"{key}={kind}(...): objects are given as {known}, and {key} is none of them")
        if (part := key.lstrip("+").partition(".")[0]) in objects:
            raise UserError(f"{part} is an object here: what {key} would set is said where it is built")
    texts = [f"{key}={written(value)}" for key, value in settings.items()]
    if NEEDED.get(verb, set()) <= objects.keys() and not any(name in given for name in (*PARTS, "sequence")):
        return Arguments(verb, texts, objects=objects, composed=defaults(settings))
    folders = [f"file://{Path(one).absolute()}" for one in ([folders] if isinstance(folders, str | Path) else folders)]
    arguments = Arguments(verb, [*texts, *[f"hydra.searchpath={written(folders)}"] * bool(folders)], objects=objects)
    search([os.getcwd(), *arguments.sources[1:]])
    return arguments


def _named(value) -> bool:
    """Whether a keyword's value is read as the command line would, and is no object."""
    every = value if isinstance(value, list | tuple) else [value]
    return all(one is None or isinstance(one, str | Mapping) for one in every)


def _settings(given: Mapping) -> Iterator[tuple[str, object]]:
    """Dotted keys and values; a mapping stands for the keys below its own."""
    for key, value in given.items():
        if isinstance(value, Mapping) and "." not in key:
            yield from ((f"{key}.{name}", one) for name, one in value.items())
        else:
            yield key, str(value) if isinstance(value, Path) else value
