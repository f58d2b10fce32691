"""Every key that can be set: its value, what it may be, what it means; for `list keys`, `--help` and the docs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_forgetting.api.composing import CONFIGS, GROUPS, entries, files
from robot_forgetting.api.config_checks import signature
from robot_forgetting.api.settings import Root
from robot_forgetting.errors import shortened
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.ranges import known_keys, options, unmarked, words

# Keys of a mapping that the user chooses are shown with the mapping, and so are those of a study's grid.
LINE = re.compile(
    r"^(?P<indent> *)(?P<key>[\w@/.]+):(?P<value>(?:[^#\"']|\"[^\"]*\"|'[^']*'|(?<! )#)*)(?:# ?(?P<comment>.*))?$"
)

# What a key means wherever it stands, unless a comment in its yaml says more.
MEANINGS = {
    "alpha": "of LoRA: its output is scaled by alpha / rank",
    "batch_rows": "completions sampled at once",
    "batch_size": "demonstrations, questions or pictures per optimiser step",
    "clip": "how far pi / pi_sampled may leave 1",
    "coefficient": "nats of KL against the method's loss",
    "control_hz": "commands per second that the policy was trained for",
    "demonstrations": "episodes of the expert that are imitated",
    "dino_dim": "width of the first vision tower",
    "divergence_states": "decisions per task, at most, on which divergence is measured",
    "epochs": "passes over what was collected",
    "every": "steps between measurements",
    "greedy_episodes": "evaluated per task, greedily; 0: none",
    "group_size": "episodes or answers per initial state or question",
    "hidden_size": "width of the language model",
    "highest_rate": "the last of the evenly spaced learning rates",
    "image_size": "pixels a side",
    "images": "pictures of each data set",
    "interim_episodes": "evaluated per task at an interim point",
    "interim_points": "evaluations between the base and the end",
    "intermediate_size": "width of the language model's feed-forward layers",
    "iterations": "of collecting data and taking optimiser steps",
    "kick": "sigma of rare, large disturbances of demonstrations, in command units",
    "kick_probability": "how often a step of a demonstration gets one",
    "label_sigma": "bins by which an action's label is smoothed; 0: not at all",
    "learning_rate": "of AdamW",
    "limit": "training items; null: all",
    "lowest_rate": "the first of the evenly spaced learning rates",
    "margin": "by which a right answer is to be ahead of a wrong one, in nats per token",
    "max_new_tokens": "of an answer, at most",
    "max_steps": "control steps of an episode, at most",
    "micro_batch": "rows per forward pass, with the same gradient; null: as many as memory has room for",
    "minibatch_size": "decisions per optimiser step",
    "num_envs": "environments that a method's rollouts use",
    "num_heads": "of attention",
    "num_layers": "of the language model",
    "processes": "that share the simulation, and the optimiser steps on a CPU",
    "rank": "of LoRA's matrices",
    "rates": "learning rates",
    "rl_iterations": "of RL methods",
    "seed": "of everything that is drawn at random",
    "seeds": "how many, from seed= on",
    "sft_iterations": "of supervised methods",
    "siglip_depth": "layers of the second vision tower",
    "siglip_dim": "width of the second vision tower",
    "sizes": "of the network's layers, inputs first",
    "small": "sigma of the disturbance of every step of a demonstration, in command units",
    "steps_per_iteration": "optimiser steps",
    "test_fraction": "of the items, held out for tests",
    "threads": "on a CPU",
    "warmup_ratio": "of a run's steps, over which the learning rate rises",
    "warmup_steps": "over which the learning rate rises",
}


@dataclass(frozen=True)
class Key:
    name: str
    value: Any
    kind: str
    meaning: str = ""


def keys_of(plain: dict, names: dict[str, str | None], folders: Sequence[Path]) -> Iterator[Key]:
    """The keys of a configuration: those of config.yaml, then those of what is chosen in each group.

    plain: its values, resolved or not; names: group -> the chosen name; folders: where yaml files are looked for
    """
    meant = comments(folders, None, "config")
    for group in GROUPS:
        meant |= comments(folders, group, names.get(group))
    every = [*_keys("", plain, Root), *(key for group in GROUPS for key in _node_keys(group, plain.get(group)))]
    seen: set[str] = set()
    for key in every:
        if key.name not in seen:
            seen.add(key.name)
            meaning = meant.get(key.name) or MEANINGS.get(key.name.rpartition(".")[2], "")
            yield Key(key.name, key.value, key.kind, meaning)


def _keys(path: str, value: Any, kind: Any) -> Iterator[Key]:
    """The keys below a value with a declared annotation, or itself."""
    fields = next((found for one in options(kind) if (found := known_keys(*unmarked(one))) is not None), None)
    if isinstance(value, dict) and "_target_" in value:
        yield from _node_keys(path, value)
    elif fields and isinstance(value, dict):
        for key, (inner, _) in fields.items():
            if key in value:
                yield from _keys(f"{path}.{key}" if path else key, value[key], inner)
    elif path:
        yield Key(path, value, words(kind))


def _node_keys(path: str, node: Any) -> Iterator[Key]:
    """The keys of something that is built: its constructor's arguments that its yaml gives."""
    if not isinstance(node, dict) or "_target_" not in node:
        return
    for key, parameter in (signature(load_object(str(node["_target_"]), path)) or {}).items():
        if key in node:
            yield from _keys(f"{path}.{key}", node[key], parameter.annotation)


def comments(folders: Sequence[Path], group: str | None, name: str | None) -> dict[str, str]:
    """Dotted key -> the comment behind it in a group's yaml, and in those that this one builds upon."""
    file = files(folders, group or "").get(name)
    if file is None:
        return {}
    found: dict[str, str] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    package = next((line.split()[-1] for line in lines if line.startswith("# @package")), group)
    above = [(-1, "" if package in (None, "_global_") else f"{package}.")]
    for line in lines:
        if not (match := LINE.match(line)):
            continue
        indent, key = len(match["indent"]), match["key"]
        while above[-1][0] >= indent:
            above.pop()
        path = above[-1][1] + key
        if key == "defaults" and group is not None and indent == 0:
            for parent in re.findall(r"[\w.-]+", match["value"]):
                found |= comments(folders, group, parent) if parent != name else {}
        if match["comment"]:
            found[path] = match["comment"].strip()
        above.append((indent, f"{path}."))
    return found


def shown(value: Any) -> str:
    """A value as a user would write it; of a value not resolved yet, what it depends on."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    for pattern, words_ in (
        (r"\$\{oc\.select:([\w.]+),([^{}]*)\}", r"\1 or \2"),
        (r"\$\{([\w.]+)\}", r"\1"),
        (r"\$\{by_kind:([^{},]*),([^{}]*)\}", r"\1; of text: \2"),
    ):
        text = re.sub(pattern, words_, text)
    text = text.splitlines()[0] + " ..." if "\n" in text else text
    return shortened(text, 80)


def page(folder: Path) -> str:
    """docs/settings.md: every key of config.yaml, and of the constructors that the groups' yaml files name."""
    import yaml

    def load(file: Path) -> dict:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        parents = [name for name in values.get("defaults", ()) if str(name).startswith("_") and name != "_self_"]
        for parent in parents:
            for key, value in load(file.with_name(f"{parent}.yaml")).items():
                values[key] = {**value, **values.get(key, {})} if isinstance(value, dict) else values.get(key, value)
        return values

    root = load(folder / "config.yaml") | {"budget": load(folder / "budget" / "demo.yaml")}
    lines = [HEAD, *_table(keys_of(root, {"budget": "demo"}, [folder]))]
    for group in ("method", "penalty", "policy", "task", "measure", "reproduce"):
        lines += ["", f"## {group}="]
        built: dict[str, list[tuple[str, dict]]] = {}
        for name, file in sorted(entries([folder], group).items(), key=lambda entry: entry[1]):
            node = load(file)
            node = node.get(group, node)
            if "_target_" in node:
                built.setdefault(node["_target_"], []).append((name, node))
        for target, several in built.items():
            names, found = [name for name, _ in several], {}
            for name, node in several:
                for key in keys_of({group: node}, {group: name}, [folder]):
                    found.setdefault(key.name, key)
            lines += ["", f"**{', '.join(names)}** (`{target}`)", "", *_table(found.values())]
    return "\n".join(lines) + "\n"


HEAD = """\
# Settings

Written by `python -m robot_forgetting.cli.keys > docs/settings.md`; a test compares the two. `robot-forgetting list
keys` shows the same for a command's own choices, `robot-forgetting VERB --help` the keys that a verb reads. A value
outside its range ends the command before anything is built.

A class of your own declares its ranges where it takes the numbers, and its yaml's comments say what they mean:

```python
from typing import Annotated
from robot_forgetting.ranges import Count, Range

class MyMethod(Method):
    def __init__(self, *, iterations: Count, clip: Annotated[float, Range(0, 1)] = 0.2): ...
```

## config.yaml and budget=demo
"""


def _table(keys) -> Iterator[str]:
    yield "| key | is | value in the yaml | |"
    yield "| --- | --- | --- | --- |"
    for key in keys:
        cells = (f"`{key.name}`", key.kind, f"`{shown(key.value)}`", key.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(CONFIGS), end="")
