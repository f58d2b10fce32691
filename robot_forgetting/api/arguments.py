"""What a verb's function is given: objects, built from the composed configuration by the names of its parameters."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path

from robot_forgetting.api.composing import GROUPS, Composed, beside, compose, entries, key_of, readable, written
from robot_forgetting.api.config_checks import check_node, check_root
from robot_forgetting.api.run_id import TASK_LISTS, folder_of
from robot_forgetting.api.settings import Settings
from robot_forgetting.built_with import described
from robot_forgetting.errors import UserError, unknown
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.ranges import problem

CHECKPOINT_VERBS = ("run", "evaluate", "record")  # that go on with a run's policy: checkpoint=RUN
BUILT = ("policy", "task", "method", "penalty", "measure", "reproduce")
LISTS = {**dict.fromkeys(TASK_LISTS, "task"), "measures": "measure"}  # of entries of a group
OWN = ("names", "overrides", "run_folders", "sources", "point")


class Arguments:
    """Everything a verb's function may ask for by parameter name.

    policy, task, method, penalty: objects (penalty None for `none`); prior, held_out: lists of tasks; sequence: the new
        tasks in their order, the one that ``task`` names where none is given; measures: a list of measures
    run_dir: where the run folder goes; config: the resolved configuration as plain values; names: group -> chosen name
    run_folders: positional arguments of `report`; temperature: decode.temperature; any other key of config.yaml
    """

    def __init__(
        self,
        verb: str,
        overrides: Sequence[str] = (),
        run_folders: Sequence[str | Path] = (),
        *,
        objects: Mapping[str, object] | None = None,
        composed: Composed | None = None,
    ):
        """overrides: `key=value` texts; objects: what stands in the place of a group's or of a list's names; composed:
        the configuration, where it is not to be made of the overrides"""
        self._verb, self.overrides, self._objects = verb, list(overrides), dict(objects or {})
        self.run_folders = [Path(folder) for folder in run_folders]
        self._recorded = None  # the policy of checkpoint=RUN
        self._bare = composed is not None  # without hydra: what is named is read as it is
        self._named: dict[tuple[str, str], object] = {}
        composed = composed or self._chosen()
        self._config, self.names, self.sources = composed.config, composed.names, composed.sources
        self.plain = composed.plain()
        for name, given in self._objects.items():
            if name in LISTS:
                self.plain |= {name: [_named(one) for one in given], f"{name}_objects": described(list(given))}
            else:
                self.plain[name], self.names[name] = described(given), _named(given)
        check_root(self.plain)
        if self.names["measure"] is not None and verb != "check":
            raise UserError(f"measure= is for `check`; write measures=[forward_kl,{self.names['measure']}]")
        self._check_added()

    def _chosen(self) -> Composed:
        """The command's configuration. Its policy is that of checkpoint=RUN where there is one, which has to be known
        before what the command says of the policy can be read."""
        others = [text for text in self.overrides if not re.match(r"[+~]*policy[.=]", text)]
        if first := self._first_of_sequence():
            self.overrides.append(f"task={first}")
            others.append(self.overrides[-1])
        composed = compose(others)
        checkpoint = composed.config.checkpoint
        if said := problem("checkpoint", checkpoint, str | None):
            raise UserError(said)
        if checkpoint is not None and self._verb not in CHECKPOINT_VERBS:
            raise UserError(f"{self._verb} does not use checkpoint=; {', '.join(CHECKPOINT_VERBS)} do")
        if checkpoint is not None and "policy" not in self._objects:
            from robot_forgetting.engine.run_policy import RecordedPolicy

            self._recorded = RecordedPolicy.of(checkpoint)
        return composed if others == self.overrides and not self._recorded else self._composed(self.overrides)

    def _first_of_sequence(self) -> str | None:
        """The task whose yaml the whole configuration goes by, and which other keys may need: the first of sequence."""
        sequence = self._objects.get("sequence")
        own = [text for text in self.overrides if key_of(text) in ("sequence", "hydra.searchpath")]
        if sequence is None and any(key_of(text) == "sequence" for text in own):
            sequence = compose(own).plain()["sequence"]
        if sequence is None:
            return None
        if self._verb != "run":
            raise UserError(f"{self._verb} does not use sequence=; run does")
        if not isinstance(sequence, list) or not sequence or not all(sequence):
            raise UserError(f"sequence={sequence} is no list of tasks; write sequence=[stack_cube,place_sphere]")
        for text in self.overrides:
            if key_of(text).split(".")[0] == "task":
                raise UserError(f"'{text}' beside a sequence, which names the tasks itself; leave one of the two out")
        return sequence[0] if isinstance(sequence[0], str) else None

    def _composed(self, overrides: Sequence[str]) -> Composed:
        """The configuration that overrides make, with the policy of checkpoint=RUN where there is one."""
        return self._recorded.configuration(overrides, compose) if self._recorded else compose(overrides)

    def with_recorded_policy(self) -> list[str]:
        """The overrides, of which the first names the policy of checkpoint=RUN where there is one."""
        policy = [f"policy={self.names['policy']}"] if self._recorded else []
        return [*policy, *(text for text in self.overrides if not policy or not text.startswith("policy="))]

    def _check_added(self) -> None:
        """`+key=value` at the top, which nothing reads: neither we nor any `${key}` in the configuration."""
        known = {*GROUPS, *Settings.__annotations__}
        for text in self.overrides:
            key = re.split(r"[.@/]", key_of(text))[0]
            if not text.startswith("+") or key in known or key not in self._config:  # a group's may lie elsewhere
                continue
            listed = [one for name in TASK_LISTS for one in self._members(name)]
            tasks = [self._entry("task", one) for one in listed if isinstance(one, str)]
            if not any(key in _read_by(node) for node in (self._config, *tasks)):
                raise UserError(
                    f"nothing reads '{key}' ({text}); a setting of a method, task or policy is +method.{key}=..., "
                    "a value for your own yaml files is read there as ${" + key + "}"
                )

    # ---- what a function asks for

    def call(self, function: Callable):
        """Checks everything that a verb's function asks for, builds it, and calls the function.

        A parameter that is a dataclass is built from its fields, found the same way.
        """
        self.check(function)
        asked = dict(_asked(function))
        # The tasks say whether the policy can suit them.
        built = {name: self.value(name) for name in ("task", *TASK_LISTS) if name in asked}
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
            part = "task" if name == "sequence" else name  # whose first task is the chosen one
            if part in BUILT and part not in self._objects:
                if self._chooses(part):
                    self._checked(part, self._config.get(part), self.names[part])
                elif self._verb != "check" and kind is not inspect.Parameter.empty:
                    if type(None) not in typing.get_args(kind):
                        raise UserError(f"{self._verb} needs a {part}: give {part}=NAME, see robot-forgetting list")
            if name in LISTS:
                for one in self._members(name):
                    if isinstance(one, str):
                        self._checked(LISTS[name], self._entry(LISTS[name], one), one)
            elif name == "pretrain":
                optimiser = {"_target_": "robot_forgetting.method.Optimiser", **self.plain[name]["optimiser"]}
                check_node(optimiser, "pretrain.optimiser", "pretrain.optimiser")

    def value(self, name: str):
        if name in BUILT:
            if name in self._objects or not self._chooses(name):
                return self._objects.get(name)
            return self._build(name, self._config.get(name), self.names[name])
        if name in LISTS:
            chosen = [self.value("task")] if name == "sequence" else []
            named = [
                self._build(LISTS[name], self._entry(LISTS[name], one), one) if isinstance(one, str) else one
                for one in self._members(name)
            ]
            return chosen + named
        if name == "config":
            return self.plain
        if name == "temperature":
            return self.plain["decode"]["temperature"]
        if name == "run_dir":
            if self.plain["run_dir"]:
                return Path(self.plain["run_dir"])
            return folder_of(self._verb, self.names, self.overrides, self.plain, self._objects)
        if name in ("output", "golden"):
            return None if self.plain[name] is None else Path(self.plain[name])
        return getattr(self, name) if name in OWN else self.plain[name]

    def run_folder(self, function: Callable) -> Path | None:
        """Where a function's records go; None where it makes none."""
        return self.value("run_dir") if "run_dir" in {name for name, _ in _asked(function)} else None

    def keys_read(self, function: Callable) -> set[str]:
        """Keys at the top that a verb's function is given, or that are read to build what it is given."""
        asked = {"decode" if name == "temperature" else name for name, _ in _asked(function)} | {"debug"}
        if "run_dir" in asked:
            asked.add("sweep")
        if "sequence" in asked:
            asked.add("task")
        for group in asked & set(GROUPS):
            asked |= _read_by(self._config.get(group)) - {"budget"}
        return asked

    def point(self, common: Mapping[str, object], fixed: Mapping[str, object]) -> Arguments:
        """What `run` would be given: ``common`` keys, then this command's own, then ``fixed`` ones."""
        own = [text for text in self.overrides if key_of(text).split(".")[0] not in ("reproduce", "quick", "run_dir")]
        before, after = ([f"{key}={written(value)}" for key, value in keys.items()] for keys in (common, fixed))
        overrides: dict[str, str] = {}
        for text in (*before, *own, *after):
            overrides.pop(key_of(text), None)
            overrides[key_of(text)] = text
        return Arguments("run", list(overrides.values()))

    # ---- parts

    def _chooses(self, group: str) -> bool:
        """Whether anything is chosen in a group."""
        if self._verb == "check" and not any(text.split("=")[0] == group for text in self.overrides):
            return False  # `check` looks at what was named and nothing else
        if self._verb == "check" and group == "policy" and self.plain["golden"]:
            return False  # golden= brings its own weights; the policy's need not be there
        return self.names[group] is not None and (group, self.names[group]) != ("penalty", "none")

    def _members(self, name: str) -> Sequence:
        """What stands in a list, objects or names; of a sequence what is after the first, which is the chosen task."""
        members = self._objects.get(name, self.plain[name]) or []
        return members[1:] if name == "sequence" else members

    def _entry(self, group: str, name: str):
        """Another entry of a group, as this command's other keys would have it (`prior: [pick_cube, ...]`)."""
        if group == "measure" and (group, name) not in self._named:  # they are many: composed together
            listed = [one for one in self._members("measures") if isinstance(one, str)]
            offered = entries(self.sources, group)
            for one in listed:
                if one not in offered:
                    raise unknown(group, one, offered)
            if self._bare:
                nodes = beside(self._config, [offered[one] for one in listed])
            else:
                added = [f"+measure@listed.m{index}={one}" for index, one in enumerate(listed)]
                nodes = self._composed([*self.overrides, *added]).config["listed"].values()
            self._named |= {(group, one): node for one, node in zip(listed, nodes, strict=True)}
        if (group, name) not in self._named:
            # Not the overrides meant for the chosen entry (task.spawn=near): the named one may not know them.
            own = (group + ".", group + "=")
            shared = [text for text in self.overrides if not text.lstrip("+~").startswith(own)]
            self._named[group, name] = self._composed([*shared, f"{group}={name}"]).config[group]
        return self._named[group, name]

    def _checked(self, group: str, node, name: str) -> dict:
        """The plain values of a node that names what can be built."""
        from omegaconf import OmegaConf

        values = Composed(node, {}, []).plain() if OmegaConf.is_config(node) else node
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
        return values

    def _check_conventions(self, tasks: Sequence) -> None:
        """Compares what the chosen policy is known to mean before it is built, which may load or fetch gigabytes."""
        if "policy" in self._objects:
            return
        node = self.plain["policy"]
        declared = _declared(load_object(node["_target_"], "policy"))
        if declared:
            from robot_forgetting.engine.evaluate import compare_conventions

            given = {key: node[key] for key in ("action_mode", "rotation", "gripper", "control_hz") if key in node}
            compare_conventions(replace(declared, **given), node.get("name") or self.names["policy"], tasks)

    def _build(self, group: str, node, name: str):
        values = self._checked(group, node, name)
        if self._bare and group == "measure":
            return load_object(values.pop("_target_"), name)(**values)
        from hydra.utils import instantiate

        if group == "policy":
            import torch

            torch.manual_seed(self.plain["seed"])  # new weights (adapters, heads) belong to the seed
        with readable():
            return instantiate(node, _convert_="all")


def _asked(function: Callable) -> Iterator[tuple[str, object]]:
    """Names and annotations of what a function is given, those of its data classes in their place."""
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            yield from _asked(parameter.annotation)
        else:
            yield name, parameter.annotation


def _read_by(node) -> set[str]:
    """The keys at the top that a part of a configuration refers to."""
    from omegaconf import OmegaConf

    text = str(OmegaConf.to_container(node, resolve=False)) if OmegaConf.is_config(node) else ""
    return set(re.findall(r"\$\{(?:[\w.]+:)?(\w+)", text))


def _declared(target):
    """``Policy.declares`` of what builds a policy; None for a subclass that has a ``convention`` of its own without."""
    if isinstance(target, type) and hasattr(target, "convention") and hasattr(target, "declares"):
        said, meant = (next(c for c in target.__mro__ if name in vars(c)) for name in ("declares", "convention"))
        return target.declares if issubclass(said, meant) else None
    return getattr(target, "declares", None)


def _named(thing) -> str | None:
    """What records call an object: its name, or its class's; a name stays one."""
    if thing is None or isinstance(thing, str):
        return thing
    name = getattr(thing, "name", None) or type(thing).__name__
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower() if name == type(thing).__name__ else name


def _listed(tasks) -> list:
    return tasks if isinstance(tasks, list) else [tasks]
