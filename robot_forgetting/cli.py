"""The command line: `robot-forgetting VERB [key=value ...] [--multirun]`.

The only module that knows hydra: it composes the configuration, builds policy, task, method and penalty from their
`_target_` and hands plain objects to plain functions. Whatever goes wrong ends as one line on stderr (exit code 2 for
bad input, 1 for a bug); `debug=true` adds the traceback. torch is imported only when a verb needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path

from robot_forgetting.config_checks import ROOT_TYPES, by_kind, check_node, check_root, replacing, typed
from robot_forgetting.errors import UserError, unknown

GROUPS = ("task", "method", "policy", "penalty", "budget", "reproduce")
# Keys that a run's id says in a word of its own, or that change nothing in its results.
NOT_IN_ID = {*GROUPS, "seed", "sweep", "debug", "run_dir", "output", "device", "processes"}

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
    except KeyboardInterrupt:
        print("\ninterrupted; the same command again continues where it stopped", file=sys.stderr)
        return 130
    except SystemExit as end:  # hydra's own parser, for example --cfg with an unknown value
        return end.code if isinstance(end.code, int) else 2
    except Exception as error:
        return _complain(error, rest, debug)


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

    codes = []

    def job(config) -> None:
        # Caught here and not by hydra, so that one failing point of a sweep does not end the others.
        try:
            code = Arguments(verb, config, folders, HydraConfig.get()).call(_load(VERBS[verb][0]))
            codes.append(code if type(code) is int else 0)
        except Exception as error:
            codes.append(_complain(error, overrides, debug, point=" ".join(HydraConfig.get().overrides.task)))

    configs = importlib.import_module("robot_forgetting.configs")
    sys.path.insert(0, os.getcwd())  # so that `_target_` finds a user's own modules
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


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _load(dotted: str) -> Callable:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


# --- what a verb's function is given ---


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
        self.sources = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
        for folder in self.sources[1:]:
            sys.path.append(str(folder.resolve()))
        self.names = {group: hydra_config.runtime.choices.get(group) for group in GROUPS}
        self.run_folders = run_folders
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

    def named(self, group: str, name: str):
        """Builds another entry of a group, as this command's other keys would have it (`prior: [pick_cube, ...]`)."""
        import hydra

        # Not the overrides meant for the chosen entry (task.spawn=near): the named one may not know them.
        shared = [text for text in self._overrides if not text.lstrip("+~").startswith((group + ".", group + "="))]
        config = hydra.compose("config", overrides=[*self._hydra_overrides, *shared, f"{group}={name}"])
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


# --- errors as one line ---


def _complain(error: BaseException, overrides: Sequence[str], debug: bool, point: str = "") -> int:
    """Prints an error as one line, which says where in a sweep it happened; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader has gone (`| head`): nothing to say, and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(error)
    message = explain(error, overrides)
    start = f"error: [{point}] " if {"--multirun", "-m"} & set(overrides) else "error: "
    if message is not None:
        print(f"{start}{message}", file=sys.stderr)
        return 2
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    hint = "" if debug else "; debug=true shows the traceback"
    print(f"{start}{type(error).__name__}{place}: {_one_line(error)}{hint}", file=sys.stderr)
    return 1


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: BaseException, overrides: Sequence[str]) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    chain, seen = [], error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    for link in chain:
        if isinstance(link, UserError):
            return _one_line(link)
    if isinstance(error, UserWarning):  # raised only for a search path (see the filter in _hydra_main)
        folder = _one_line(error).rpartition("path=")[2].replace(" is not available.", "")
        return f"hydra.searchpath: {folder} does not exist; give a folder as file://FOLDER"
    if not type(error).__module__.startswith(("hydra", "omegaconf", "yaml")):
        return None
    return _explain_hydra(error, _one_line(error), overrides)


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
    if "config directory" in text:
        return f"{text}; give an existing folder after --config-dir"
    if "hydra.searchpath must be a list" in text:
        return "hydra.searchpath is a list of folders: write 'hydra.searchpath=[file://FOLDER]'"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], overrides)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = match[1].partition("=")
        return f"'{match[1]}' is ambiguous: add --multirun to sweep over it, or write '{key}=[{value}]' for a list"
    if type(error).__name__ == "OverrideParseException":
        return f"cannot read '{error.override}' as key=value; quote special characters, for example 'key=\"a b\"'"
    if type(error).__module__.startswith("yaml"):
        return f"not valid yaml: {text}"
    cause = error.__cause__
    if cause is not None and (match := re.search(r"Error in call to target '([^']+)'", text)):
        return f"{match[1]} failed with {type(cause).__name__}: {_one_line(cause)}; debug=true shows the traceback"
    return f"{text} ({_one_line(cause)})" if cause is not None and str(cause) not in str(error) else text


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
    usable = [text for text in overrides if text.partition("=")[0] in (*GROUPS, "hydra.searchpath") and "," not in text]
    with hydra.initialize_config_dir(str(Path(configs.__file__).parent), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", overrides=usable))

    def walk(node: dict, prefix: str = ""):
        for name, value in node.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return {name for name in walk(config) if not name.endswith("_target_")}


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
