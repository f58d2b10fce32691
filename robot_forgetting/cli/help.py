"""What `robot-forgetting --help`, `VERB --help` and `list` print."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from robot_forgetting.api.arguments import Arguments
from robot_forgetting.api.composing import GROUPS, entries
from robot_forgetting.cli.keys import Key, keys_of, shown

HELP = {"-h", "--help", "help"}

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


def help_text(verbs: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, verbs))
    listed = "\n".join(f"  {verb:{width}}  {what}" for verb, (_, what) in verbs.items())
    return (
        "How much do policies forget when they learn a new task?\n\n"
        "usage: robot-forgetting VERB [key=value ...] [--multirun] [--cfg job]\n\n"
        f"verbs:\n{listed}\n\n{EXAMPLES}\n\n"
        "`robot-forgetting list` names what task=, method=, policy=, penalty= and budget= accept;\n"
        "`robot-forgetting list keys` shows every other key with its range, `robot-forgetting VERB --help` a verb's."
    )


def verb_help(verb: str, what: str, arguments: Arguments, function: Callable) -> str:
    """A verb's own page: what it does, and the keys that it reads, with their values and ranges."""
    read = arguments.keys_read(function)
    keys = keys_of(arguments.plain, arguments.names, arguments.sources)
    return (
        f"usage: robot-forgetting {verb} [key=value ...]\n\n{what}\n\n"
        f"keys (with other choices, for example method=grpo, their keys):\n"
        f"{table(key for key in keys if key.name.split('.')[0] in read)}"
    )


def table(keys: Iterable[Key]) -> str:
    rows = [(f"{key.name}={shown(key.value)}", key.kind, key.meaning) for key in keys]
    return "\n".join(f"  {name}\n      {kind}{f' # {meaning}' if meaning else ''}" for name, kind, meaning in rows)


def list_choices(sources: list[Path], run_folders: list[Path], names: dict, config: dict) -> None:
    """Prints what each group offers, with the first comment line of its yaml; the user's search path included.

    `list keys` prints every key of the configuration instead, with its value, range and meaning.
    """
    if run_folders:
        print(table(keys_of(config, names, sources)))
        return
    for group in GROUPS:
        files = entries(sources, group)
        width = max(map(len, files), default=0)
        print(f"{group}=")
        for name, path in sorted(files.items()):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            first = next((line for line in lines if not line.startswith("# @package")), "")
            print(f"  {name:{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
