"""The command line: `robot-forgetting VERB [key=value ...] [--multirun]`.

Reads the arguments and lets hydra compose the configuration; `cli_arguments` builds policy, task, method and penalty
from their `_target_` and hands plain objects to plain functions; `cli_errors` makes one line on stderr of whatever goes
wrong (exit code 2 for bad input, 1 for a bug; `debug=true` adds the traceback). Nothing else knows hydra. torch is
imported only when a verb needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from robot_forgetting import children
from robot_forgetting.cli_arguments import CHECKPOINT_VERBS, Arguments
from robot_forgetting.cli_errors import complain
from robot_forgetting.config_checks import GROUPS, ROOT_TYPES, by_kind, replacing
from robot_forgetting.errors import UserError, unknown
from robot_forgetting.user_modules import search

# Verb: (function, what it does). The function's parameter names say what it is given (see ``Arguments``).
VERBS = {
    "run": ("robot_forgetting.experiment:run", "fine-tune the policy on the new task, measure it before and after"),
    "evaluate": ("robot_forgetting.commands:evaluate_command", "success of a policy on a task"),
    "record": ("robot_forgetting.commands:record_command", "one video per episode, into videos/"),
    "pretrain": ("robot_forgetting.pretrain:pretrain", "train a base policy from scripted demonstrations"),
    "reproduce": (
        "robot_forgetting.reproduce:reproduce",
        "a published study, with all its runs: parity_mnist, llm/science",
    ),
    "report": ("robot_forgetting.report:write_report", "one HTML page from run folders"),
    "check": ("robot_forgetting.conformance:check", "what is wrong with a task, method or policy of your own"),
    "assets": (
        "robot_forgetting.robot.assets:command",
        "SimplerEnv's meshes: assets bridge [folder=FOLDER] [yes=true]",
    ),
    "list": ("robot_forgetting.cli:list_choices", "the tasks, methods, policies, penalties and budgets there are"),
    "doctor": ("robot_forgetting.doctor:doctor", "what is missing on this machine, and what to type"),
}

# Only these build objects, and so need a user's own modules; the others never look into the working folder for code.
BUILDING = {"run", "evaluate", "record", "pretrain", "reproduce", "check"}

EXAMPLES = """\
examples:
  robot-forgetting doctor
  robot-forgetting run method=sft seed=0
  robot-forgetting run --multirun method=sft,reinforce,grpo seed=0,1,2 sweep=mine
  robot-forgetting report runs/mine/*/ output=report.html
  robot-forgetting evaluate policy=openvla-nano task=pick_cube episodes=100
  robot-forgetting record task=stack_cube episodes=4
  robot-forgetting reproduce parity_mnist quick=true
  robot-forgetting check task=my_task 'hydra.searchpath=[file://my_configs]'
  robot-forgetting run --cfg job          # show the configuration, run nothing"""

# The hydra flags that make sense here. (--experimental-rerun, for one, would read a pickle.)
FLAGS = {"--multirun", "-m", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--config-dir", "-cd"}
FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd"}


@children.stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # Before torch is imported: the parallelism is in processes, and threads that wait for a busy core make it slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "debug=true" in (argument.lower() for argument in arguments)
    rest: list[str] = []
    try:
        if not arguments or {"-h", "--help", "help"} & set(arguments):
            print(help_text())
            return 0
        verb, *rest = arguments
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        if verb == "doctor":  # must work where nothing else does
            if rest:
                raise UserError(f"doctor takes no arguments, not '{rest[0]}'")
            return _load(VERBS[verb][0])()
        if verb == "assets":  # no experiment: nothing of the configuration matters
            return _load(VERBS[verb][0])(rest)
        return _hydra_main(verb, *_split(verb, rest), debug)
    except SystemExit as end:  # hydra's own parser, for example --cfg with an unknown value
        return end.code if isinstance(end.code, int) else 2
    except Exception as error:
        return complain(error, rest, debug)


def help_text() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, (_, what) in VERBS.items())
    return (
        "How much do policies forget when they learn a new task?\n\n"
        "usage: robot-forgetting VERB [key=value ...] [--multirun] [--cfg job]\n\n"
        f"verbs:\n{verbs}\n\n{EXAMPLES}\n\n"
        "`robot-forgetting list` names what task=, method=, policy=, penalty= and budget= accept;\n"
        "`robot-forgetting run --cfg job` shows every other key."
    )


def _split(verb: str, arguments: list[str]) -> tuple[list[str], list[Path]]:
    """What hydra gets, flags first and then overrides, and positional run folders (`report` only)."""
    flags, overrides, folders, value_next = [], [], [], False
    for argument in arguments:
        if value_next or argument.startswith("-"):
            if not value_next and argument.partition("=")[0] not in FLAGS:
                raise UserError(f"unknown option '{argument}'; robot-forgetting --help shows what there is")
            flags.append(argument)
            value_next = not value_next and argument in FLAGS_WITH_VALUE
        elif verb == "report" and ("=" not in argument or Path(argument).exists()):
            folders.append(Path(argument))
        elif verb == "reproduce" and "=" not in argument and not argument.startswith("~"):
            overrides.append(f"reproduce={argument}")
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(_without_value(argument))
        else:
            overrides += replacing(argument)
    if value_next or ({"--cfg", "-c"} & set(flags) and not {"job", "hydra", "all"} & set(flags)):
        raise UserError(f"'{flags[-1]}': write --cfg job (or hydra, or all); --package NAME; --config-dir FOLDER")
    return [*flags, *overrides], folders


def _without_value(argument: str) -> str:
    text = f"'{argument}' is not of the form key=value"
    if argument in GROUPS:
        return f"{text}; write {argument}=NAME (robot-forgetting list shows the names)"
    return f"{text} (for example {f'{argument}=...' if argument in ROOT_TYPES else f'task={argument}'})"


def _hydra_main(verb: str, overrides: list[str], folders: list[Path], debug: bool) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register_resolvers()
    overrides = [*overrides, *_policy_of_checkpoint(verb, overrides)]
    codes = []

    def job(config) -> None:
        # Caught here and not by hydra, so that one failing point of a sweep does not end the others.
        try:
            given = Arguments(verb, config, folders, HydraConfig.get())
            if verb in BUILDING:
                search([os.getcwd(), *given.sources[1:]])
            code = given.call(_load(VERBS[verb][0]))
            codes.append(code if type(code) is int else 0)
        except Exception as error:
            codes.append(complain(error, overrides, debug, point=" ".join(HydraConfig.get().overrides.task)))

    configs = importlib.import_module("robot_forgetting.configs")
    program, before = f"robot-forgetting {verb}", sys.argv
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", before)
        if {"--multirun", "-m"} & set(overrides):
            # A sweep insists on writing a multirun.yaml: into the scratch folder with it.
            overrides = [*map(_postponed, overrides), f"hydra.sweep.dir={scratch}"]
        sys.argv = [program, *overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", message="provider=.*is not available")
        main_dir = str(Path(configs.__file__).parent)
        hydra.main(version_base="1.3", config_path=main_dir, config_name="config")(job)()
    return max(codes, default=0)


def _policy_of_checkpoint(verb: str, overrides: Sequence[str]) -> list[str]:
    """`policy=NAME` of checkpoint=RUN where keys of it follow, which hydra must know; else `Arguments` finds it."""
    given = {text.lstrip("+~").partition("=")[0]: text.partition("=")[2] for text in overrides}
    run = given.get("checkpoint", "null").strip("'\"")
    keys = any(key.startswith("policy.") for key in given)
    if verb not in CHECKPOINT_VERBS or not keys or "policy" in given or run == "null" or "," in run:
        return []
    from robot_forgetting.run_policy import policy_chosen

    return policy_chosen(run)


def register_resolvers() -> None:
    """What the yaml files may write besides plain interpolations: ``${by_kind:ROBOT,TEXT}``."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("by_kind", by_kind, replace=True)


def _postponed(text: str) -> str:
    """`method.group_size=8` as a sweep over one value.

    Hydra applies plain overrides before it chooses the groups that are swept over, and would refuse a key that the
    default method lacks.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key, _, value = text.partition("=")
    if "." not in key or key.startswith(("-", "~", "hydra.")):
        return text
    is_sweep = OverridesParser.create().parse_overrides([text])[0].is_sweep_override()
    return text if is_sweep else f"{key}=choice({value})"


def _load(dotted: str) -> Callable:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


# --- list ---


def list_choices(sources: list[Path]) -> None:
    """Prints what each group offers, with the first comment line of its yaml; the user's search path included."""
    for group in GROUPS:
        files = {
            path.relative_to(folder / group).with_suffix("").as_posix(): path
            for folder in reversed(sources)
            for path in (folder / group).rglob("*.yaml")
        }
        width = max(map(len, files), default=0)
        print(f"{group}=")
        for name, path in sorted(files.items()):
            lines = path.read_text(encoding="utf-8").splitlines()
            first = next((line for line in lines if not line.startswith("# @package")), "")
            print(f"  {name:{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
