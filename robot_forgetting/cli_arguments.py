"""What a verb's function is given: objects built from the composed configuration, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path

from robot_forgetting.config_checks import GROUPS, check_node, check_root, typed
from robot_forgetting.errors import UserError

# Keys that a run's id says in a word of its own, or that change nothing in its results.
NOT_IN_ID = {*GROUPS, "seed", "sweep", "debug", "run_dir", "output", "device", "processes"}
CHECKPOINT_VERBS = ("run", "evaluate", "record")  # that go on with a run's policy: checkpoint=RUN


class Arguments:
    """Everything a verb's function may ask for by parameter name.

    policy, task, method, penalty: built objects (penalty None for `none`); prior, held_out: lists of tasks
    run_dir: where the run folder goes; config: the resolved configuration as plain values; names: group -> chosen name
    run_folders: positional arguments of `report`; temperature: decode.temperature; any other key of config.yaml
    """

    def __init__(self, verb: str, config, run_folders: list[Path], hydra_config):
        from omegaconf import OmegaConf

        self._verb = verb
        self._config = config
        self._overrides = list(hydra_config.overrides.task)
        self._hydra_overrides = [text for text in hydra_config.overrides.hydra if "searchpath" in text]
        self._recorded = None  # the policy of checkpoint=RUN
        self.sources = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
        self.names = {group: hydra_config.runtime.choices.get(group) for group in GROUPS}
        self.run_folders = run_folders
        if config.checkpoint is not None:
            from robot_forgetting.run_policy import RecordedPolicy

            if verb not in CHECKPOINT_VERBS:
                raise UserError(f"{verb} does not use checkpoint=; {', '.join(CHECKPOINT_VERBS)} do")
            self._recorded = RecordedPolicy.of(config.checkpoint)
        if self._recorded is not None:
            self._config = config = self._composed(self._overrides)
            self.names["policy"] = self._recorded.name
        self.plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_root(self.plain)

    def call(self, function: Callable):
        """Calls a verb's function; a parameter that is a dataclass is built from its fields, found the same way."""
        given = {}
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            kind = parameter.annotation
            given[name] = self.call(kind) if is_dataclass(kind) else self.value(name)
        return function(**given)

    def value(self, name: str):
        if name in ("policy", "task", "method", "penalty", "reproduce"):
            if self._verb == "check" and not any(text.split("=")[0] == name for text in self._overrides):
                return None  # `check` looks at what was named and nothing else
            if self._verb == "check" and name == "policy" and self.plain["golden"]:
                return None  # golden= brings its own weights; the policy's need not be there
            node = self.plain.get(name)  # `reproduce: null` leaves no key at all
            return None if node is None else self._build(name, self._config[name])
        if name in ("prior", "held_out"):
            return [self.named("task", task) for task in self.plain[name]]
        if name == "config":
            return self.plain
        if name == "pretrain":
            optimiser = {"_target_": "robot_forgetting.train.Optimiser", **self.plain[name]["optimiser"]}
            check_node(optimiser, "pretrain.optimiser", "pretrain.optimiser")
        if name == "temperature":
            return self.plain["decode"]["temperature"]
        if name == "run_dir":
            return Path(self.plain["run_dir"] or f"runs/{self.plain['sweep']}/{self._run_id()}")
        if name in ("output", "golden"):
            return None if self.plain[name] is None else Path(self.plain[name])
        return (
            getattr(self, name) if name in ("names", "run_folders", "sources", "named", "point") else self.plain[name]
        )

    def point(self, common: Sequence[str], fixed: Sequence[str]) -> Arguments:
        """What `run` would be given: ``common`` overrides, then this command's own, then ``fixed`` ones."""
        import hydra
        from omegaconf import open_dict

        own = [text for text in self._overrides if _key(text).split(".")[0] not in ("reproduce", "quick", "run_dir")]
        overrides: dict[str, str] = {}
        for text in (*common, *own, *fixed):
            overrides.pop(_key(text), None)
            overrides[_key(text)] = text
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
        # Not the overrides meant for the chosen entry (task.spawn=near): the named one may not know them.
        shared = [text for text in self._overrides if not text.lstrip("+~").startswith((group + ".", group + "="))]
        config = self._composed([*shared, f"{group}={name}"])
        return self._build(group, config[group], name)

    def _build(self, group: str, node, name: str | None = None):
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if node is not None else None
        if not values:
            return None  # penalty=none
        name = name or self.names[group]
        check_node(values, group, f"{group}={name}")
        if group == "task" and self.plain["simulation"] != "cpu" and "simulation" not in values:
            from robot_forgetting.robot.task import check_simulation

            check_simulation(self.plain["simulation"])
            raise UserError(
                f"task={name} cannot be simulated on the GPU; use simulation=cpu "
                "(a task of your own says `simulation: ${simulation}` in its yaml)"
            )
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


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]
