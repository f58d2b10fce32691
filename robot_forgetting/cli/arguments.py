"""What a verb's function is given: objects built from the composed configuration, by the names of its parameters."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path

from robot_forgetting.cli.config_checks import GROUPS, check_node, check_root, entries, key_of, typed
from robot_forgetting.cli.keys import Key, keys_of
from robot_forgetting.cli.settings import Settings
from robot_forgetting.errors import UserError
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.ranges import problem

# Keys that a run's id says in a word of its own, or that change nothing in its results.
NOT_IN_ID = {*GROUPS, "seed", "sweep", "debug", "run_dir", "output", "device", "processes"}
CHECKPOINT_VERBS = ("run", "evaluate", "record")  # that go on with a run's policy: checkpoint=RUN
BUILT = ("policy", "task", "method", "penalty", "reproduce")
TASKS = ("task", "prior", "held_out")
OWN = ("names", "run_folders", "sources", "named", "point", "keys")


class Arguments:
    """Everything a verb's function may ask for by parameter name.

    policy, task, method, penalty: built objects (penalty None for `none`); prior, held_out: lists of tasks
    run_dir: where the run folder goes; config: the resolved configuration as plain values; names: group -> chosen name
    run_folders: positional arguments of `report`; temperature: decode.temperature; any other key of config.yaml
    """

    def __init__(self, verb: str, config, run_folders: Sequence[str], hydra_config):
        from omegaconf import OmegaConf

        self._verb = verb
        self._config = config
        self._overrides = list(hydra_config.overrides.task)
        self._hydra_overrides = [text for text in hydra_config.overrides.hydra if "searchpath" in text]
        self._recorded = None  # the policy of checkpoint=RUN
        self.sources = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
        self.names = {group: hydra_config.runtime.choices.get(group) for group in GROUPS}
        self.run_folders = [Path(folder) for folder in run_folders]
        self._named: dict[tuple[str, str], object] = {}
        if said := problem("checkpoint", config.checkpoint, str | None):
            raise UserError(said)
        if config.checkpoint is not None:
            from robot_forgetting.engine.run_policy import RecordedPolicy

            if verb not in CHECKPOINT_VERBS:
                raise UserError(f"{verb} does not use checkpoint=; {', '.join(CHECKPOINT_VERBS)} do")
            self._recorded = RecordedPolicy.of(config.checkpoint)
        if self._recorded is not None:
            self._config = config = self._composed(self._overrides)
            self.names["policy"] = self._recorded.name
        self.plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_root(self.plain)
        self._check_added()

    def _check_added(self) -> None:
        """`+key=value` at the top, which nothing reads: neither we nor any `${key}` in the configuration."""
        known = {*GROUPS, *Settings.__annotations__}
        for text in self._overrides:
            key = re.split(r"[.@/]", key_of(text))[0]
            if not text.startswith("+") or key in known or key not in self._config:  # a group's may lie elsewhere
                continue
            tasks = [self._entry("task", name) for name in (*self.plain["prior"], *self.plain["held_out"])]
            if not any(key in self._read_by(node) for node in (self._config, *tasks)):
                raise UserError(
                    f"nothing reads '{key}' ({text}); a setting of a method, task or policy is +method.{key}=..., "
                    "a value for your own yaml files is read there as ${" + key + "}"
                )

    @staticmethod
    def _read_by(node) -> set[str]:
        """The keys at the top that a part of the configuration refers to."""
        from omegaconf import OmegaConf

        text = str(OmegaConf.to_container(node, resolve=False)) if OmegaConf.is_config(node) else ""
        return set(re.findall(r"\$\{(?:[\w.]+:)?(\w+)", text))

    def call(self, function: Callable):
        """Checks everything that a verb's function asks for, builds it, and calls the function.

        A parameter that is a dataclass is built from its fields, found the same way.
        """
        self.check(function)
        asked = dict(_asked(function))
        built = {name: self.value(name) for name in TASKS if name in asked}  # they say whether the policy can suit them
        if self._verb != "check" and "policy" in asked:
            self._check_conventions([task for tasks in built.values() for task in _listed(tasks)])
        built |= {name: self.value(name) for name in asked if name not in built}

        def filled(wanted: Callable):
            own = inspect.signature(wanted, eval_str=True).parameters.items()
            return wanted(**{n: filled(p.annotation) if is_dataclass(p.annotation) else built[n] for n, p in own})

        return filled(function)

    def check(self, function: Callable) -> None:
        """``UserError`` for what is wrong with anything that a function asks for, before any of it is built."""
        for name, kind in _asked(function):
            if name in BUILT and self._node(name) is not None:
                self._checked(name, self._config.get(name), self.names[name])
            elif name in BUILT and self._verb != "check" and kind is not inspect.Parameter.empty:
                if type(None) not in typing.get_args(kind):
                    raise UserError(f"{self._verb} needs a {name}: give {name}=NAME, see robot-forgetting list")
            elif name in ("prior", "held_out"):
                for task in self.plain[name]:
                    self._checked("task", self._entry("task", task), task)
            elif name == "pretrain":
                optimiser = {"_target_": "robot_forgetting.method.Optimiser", **self.plain[name]["optimiser"]}
                check_node(optimiser, "pretrain.optimiser", "pretrain.optimiser")

    def run_folder(self, function: Callable) -> Path | None:
        """Where a function's records go; None where it makes none."""
        return self.value("run_dir") if "run_dir" in {name for name, _ in _asked(function)} else None

    def _node(self, name: str):
        """The plain values of what is chosen in a group; None where nothing is."""
        if self._verb == "check" and not any(text.split("=")[0] == name for text in self._overrides):
            return None  # `check` looks at what was named and nothing else
        if self._verb == "check" and name == "policy" and self.plain["golden"]:
            return None  # golden= brings its own weights; the policy's need not be there
        if self.names[name] is None or (name, self.names[name]) == ("penalty", "none"):
            return None
        return self.plain.get(name) or {}

    def value(self, name: str):
        if name in BUILT:
            return None if self._node(name) is None else self._build(name, self._config.get(name), self.names[name])
        if name in ("prior", "held_out"):
            return [self.named("task", task) for task in self.plain[name]]
        if name == "config":
            return self.plain
        if name == "temperature":
            return self.plain["decode"]["temperature"]
        if name == "run_dir":
            return Path(self.plain["run_dir"] or f"runs/{self.plain['sweep']}/{self._run_id()}")
        if name in ("output", "golden"):
            return None if self.plain[name] is None else Path(self.plain[name])
        return getattr(self, name) if name in OWN else self.plain[name]

    def _check_conventions(self, tasks: Sequence) -> None:
        """Compares what the chosen policy is known to mean before it is built, which may load or fetch gigabytes."""
        node = self._node("policy")
        declared = node and _declared(load_object(node["_target_"], "policy"))
        if declared:
            from robot_forgetting.engine.evaluate import compare_conventions

            given = {key: node[key] for key in ("action_mode", "rotation", "gripper", "control_hz") if key in node}
            compare_conventions(replace(declared, **given), node.get("name") or self.names["policy"], tasks)

    def keys(self) -> Iterator[Key]:
        """Every key of this configuration, see ``keys_of``."""
        return keys_of(self.plain, self.names, self.sources)

    def keys_read(self, function: Callable) -> list[Key]:
        """Of these, what a verb's function is given, and what is read to build it."""
        asked = {"decode" if name == "temperature" else name for name, _ in _asked(function)} | {"debug"}
        if "run_dir" in asked:
            asked.add("sweep")
        for group in asked & set(GROUPS):
            asked |= self._read_by(self._config.get(group)) - {"budget"}
        return [key for key in self.keys() if key.name.split(".")[0] in asked]

    def point(self, common: Sequence[str], fixed: Sequence[str]) -> Arguments:
        """What `run` would be given: ``common`` overrides, then this command's own, then ``fixed`` ones."""
        import hydra
        from omegaconf import open_dict

        own = [text for text in self._overrides if key_of(text).split(".")[0] not in ("reproduce", "quick", "run_dir")]
        overrides: dict[str, str] = {}
        for text in (*common, *own, *fixed):
            overrides.pop(key_of(text), None)
            overrides[key_of(text)] = text
        given = [*self._hydra_overrides, *overrides.values()]
        config = hydra.compose("config", overrides=given, return_hydra_config=True)
        chosen = config.hydra.copy()
        with open_dict(config):
            del config["hydra"]
        return Arguments("run", config, [], chosen)

    def _composed(self, overrides: Sequence[str]):
        """The configuration that overrides make, with the policy of checkpoint=RUN where there is one."""
        import hydra

        def compose(texts: Sequence[str]):
            return hydra.compose("config", overrides=[*self._hydra_overrides, *texts])

        return compose(overrides) if self._recorded is None else self._recorded.configuration(overrides, compose)

    def named(self, group: str, name: str):
        """Builds another entry of a group, as this command's other keys would have it (`prior: [pick_cube, ...]`)."""
        return self._build(group, self._entry(group, name), name)

    def _entry(self, group: str, name: str):
        if (group, name) not in self._named:
            # Not the overrides meant for the chosen entry (task.spawn=near): the named one may not know them.
            own = (group + ".", group + "=")
            shared = [text for text in self._overrides if not text.lstrip("+~").startswith(own)]
            self._named[group, name] = self._composed([*shared, f"{group}={name}"])[group]
        return self._named[group, name]

    def _checked(self, group: str, node, name: str) -> None:
        from omegaconf import OmegaConf

        values = (
            OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
        )
        if not isinstance(values, dict) or "_target_" not in values:
            file = entries(self.sources, group).get(name, name)
            raise UserError(
                f"{group}={name}: {file} has no `_target_`; it names the class to build: _target_: module.Class"
            )
        check_node(values, group, f"{group}={name}")
        if group == "task" and self.plain["simulation"] != "cpu" and "simulation" not in values:
            from robot_forgetting.tasks.simulator.maniskill_task import check_simulation

            check_simulation(self.plain["simulation"])
            raise UserError(
                f"task={name} cannot be simulated on the GPU; use simulation=cpu "
                "(a task of your own says `simulation: ${simulation}` in its yaml)"
            )

    def _build(self, group: str, node, name: str):
        from hydra.utils import instantiate

        self._checked(group, node, name)
        if group == "policy":
            import torch

            torch.manual_seed(self.plain["seed"])  # new weights (adapters, heads) belong to the seed
        return instantiate(node, _convert_="all")

    def _run_id(self) -> str:
        """'stack_cube-sft-seed0', plus whatever else on the command line changes the result."""
        names = self.names
        parts = [] if self._verb == "run" else [self._verb]
        parts += [names["task"]]
        parts += [names["method"]] if self._verb == "run" else []
        parts += [names[key] for key, usual in (("policy", "openvla-nano"), ("penalty", "none"), ("budget", "demo"))
                  if names[key] != usual]  # fmt: skip
        for text in typed(self._overrides):
            key, _, value = text.lstrip("+~").partition("=")
            if key not in NOT_IN_ID and not key.startswith("hydra."):
                parts.append(key.rpartition(".")[2] + Path(value.strip("[]")).name)
        safe = "-".join([*parts, f"seed{self.plain['seed']}"])
        return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in safe)


def _asked(function: Callable) -> Iterator[tuple[str, object]]:
    """Names and annotations of what a function is given, those of its data classes in their place."""
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            yield from _asked(parameter.annotation)
        else:
            yield name, parameter.annotation


def _declared(target):
    """``Policy.declares`` of what builds a policy; None for a subclass that has a ``convention`` of its own without."""
    if isinstance(target, type) and hasattr(target, "convention") and hasattr(target, "declares"):
        said, meant = (next(c for c in target.__mro__ if name in vars(c)) for name in ("declares", "convention"))
        return target.declares if issubclass(said, meant) else None
    return getattr(target, "declares", None)


def _listed(tasks) -> list:
    return tasks if isinstance(tasks, list) else [tasks]
