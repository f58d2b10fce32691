"""Configurations from yaml files, composed by hydra; what it says against them becomes a ``UserError`` of one line."""

from __future__ import annotations

import difflib
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from robot_forgetting import configs
from robot_forgetting.errors import UserError, blamed, described, one_line, unknown

GROUPS = ("task", "method", "policy", "penalty", "budget", "measure", "reproduce")
OWN_KEYS = "pretrain.demonstrations"  # a mapping whose keys the user chooses
NO_TEXTS = ("true", "false", "null", "nan", "inf")  # unless they are quoted
CONFIGS = Path(configs.__file__).parent


@dataclass(frozen=True)
class Composed:
    """config: an OmegaConf node; names: group -> what is chosen in it; sources: folders of yaml files, ours first"""

    config: object
    names: dict[str, str | None]
    sources: list[Path]

    def plain(self) -> dict:
        """Plain values, with all that they refer to."""
        from omegaconf import OmegaConf

        with readable():
            return OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)


def compose(overrides: Sequence[str] = ()) -> Composed:
    """What `key=value` texts make of config.yaml, as hydra reads them."""
    import hydra
    from omegaconf import open_dict

    register_resolvers()
    texts = [text for override in overrides for text in replacing(override)]
    with readable(overrides), _own_hydra(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=.*is not available")
        config = hydra.compose("config", overrides=texts, return_hydra_config=True)
    runtime = config.hydra.runtime
    sources = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    names = {group: runtime.choices.get(group) for group in GROUPS}
    with open_dict(config):
        del config["hydra"]
    return Composed(config, names, sources)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra with our configurations, also within a program that is a hydra application itself."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    before, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def defaults(settings: Mapping[str, object]) -> Composed:
    """config.yaml without its groups but for the budget, which ``settings`` names (default: demo), with settings by
    dotted keys. Read without hydra."""
    from omegaconf import OmegaConf

    register_resolvers()
    budgets = entries([CONFIGS], "budget")
    name = settings.get("budget", "demo")
    if name not in budgets:
        raise unknown("budget", name, budgets)
    config = OmegaConf.load(CONFIGS / "config.yaml")
    for key in ("defaults", "hydra"):
        del config[key]
    config.budget = OmegaConf.load(budgets[name])
    OmegaConf.set_struct(config, True)
    for key, value in settings.items():
        known, added = key.lstrip("+"), key.startswith("+")
        if not added and known not in set(_keys_of(config)):
            raise UserError(_unknown_key(key, config))
        if key != "budget":
            OmegaConf.update(config, known, value, merge=known != OWN_KEYS, force_add=added)
    return Composed(config, {group: None for group in GROUPS} | {"budget": name}, [CONFIGS])


def beside(config, paths: Sequence[Path]) -> list:
    """What yaml files say, which may refer to the keys of a configuration; read without hydra."""
    from omegaconf import OmegaConf

    read = OmegaConf.create({**config, "read": [OmegaConf.load(path) for path in paths]})
    return list(read.read)


def entries(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Name -> yaml file of what a group offers. One whose name begins with "_" is no choice of its own: others name it
    in their ``defaults``."""
    return {name: path for name, path in files(folders, group).items() if not path.name.startswith("_")}


def files(folders: Sequence[Path], group: str) -> dict[str, Path]:
    """Name -> yaml file in a group; of two files of one name, that of the folder named first."""
    return {
        path.relative_to(folder / group).with_suffix("").as_posix(): path
        for folder in reversed(folders)
        for path in (folder / group).rglob("*.yaml")
    }


def register_resolvers() -> None:
    """``${by_kind:ROBOT,TEXT}`` in a yaml: the value for the kind of task that the configuration is about."""
    from omegaconf import OmegaConf

    def by_kind(robot, text, *, _root_):
        return text if _root_.get("kind") == "text" else robot

    OmegaConf.register_new_resolver("by_kind", by_kind, replace=True)


# ---- overrides


def key_of(argument: str) -> str:
    """The key that an override sets, adds or removes."""
    return argument.lstrip("+~").partition("=")[0]


def replacing(argument: str) -> list[str]:
    """A given mapping of ``OWN_KEYS`` takes the place of ours; hydra would merge the two."""
    return [f"~{OWN_KEYS}", f"+{argument}"] if argument.startswith(f"{OWN_KEYS}={{") else [argument]


def written(value: object) -> str:
    """A plain value as hydra reads it behind `key=`."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{written(key)}:{written(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    bare = re.fullmatch(r"[a-zA-Z_/][\w./-]*", text) and text.lower() not in NO_TEXTS
    if bare or not isinstance(value, str | Path):
        return text
    # Backslashes count only before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


# ---- errors


@contextmanager
def readable(overrides: Sequence[str] = ()) -> Iterator[None]:
    """``UserError`` for what the configuration libraries complain of, or wrap; any other exception, as that of a
    plug-in, stays what it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain, seen = [], error
        while seen is not None and seen not in chain:
            chain.append(seen)
            seen = seen.__cause__ or seen.__context__
        message = next((one_line(link) for link in chain if isinstance(link, UserError)), None)
        if message is None and blamed(error) is None:
            message = _said(error, one_line(error), overrides)
        if message is None:
            raise
        raise UserError(message) from error


def _said(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    if isinstance(error, UserWarning):  # raised only for a search path, see ``compose``
        folder = text.rpartition("path=")[2].replace(" is not available.", "")
        return f"hydra.searchpath: {folder} does not exist; give a folder as file://FOLDER"
    if not type(error).__module__.startswith(("hydra", "omegaconf", "yaml")):
        file = _file_being_read(error)
        return file and f"{file} is no yaml file with keys ({text}); mend it, or take it out of the folder"
    if missing := getattr(error, "missing_cfg_file", None):
        return _not_there(missing, getattr(error, "options", None))
    if "hydra.searchpath must be a list" in text:
        return "hydra.searchpath is a list of folders: write 'hydra.searchpath=[file://FOLDER]'"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], _usable(match[1], overrides), overrides)
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


def _not_there(missing: str, options: Sequence[str] | None) -> str:
    group, _, name = missing.rpartition("/")
    if not group or not options:
        return f"there is no config '{missing}'"
    root, _, folder = group.partition("/")  # of reproduce/llm
    choices = {option for option in options if not option.startswith("_")}
    choices |= {entry for entry in entries([CONFIGS], root) if "/" in entry}
    return str(unknown(root, f"{folder}/{name}" if folder else name, choices))


def _file_being_read(error: Exception) -> str | None:
    """The yaml file that hydra was reading, which its error does not name."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "load_config"]
    return next((str(path) for frame in frames if (path := frame.f_locals.get("full_path"))), None)


def _unknown_key(key: str, config, overrides: Sequence[str] = ()) -> str:
    """'unknown key ...', naming the nearest ones of a configuration without it."""
    group = key.split("@")[0].replace("/", ".")
    known = sorted(_keys_of(config))
    near = difflib.get_close_matches(group, known, n=3, cutoff=0.6)
    root = group.partition(".")[0] if "." in group else ""
    siblings = [name for name in known if name.rpartition(".")[0] == group.rpartition(".")[0]]
    more = f"; for one that its yaml leaves out, write +{key}=..." if "." in key else ""
    if root in GROUPS and not any(name.startswith(f"{root}.") for name in known):
        chosen = next((text.partition("=")[2] for text in overrides if text.startswith(f"{root}=")), "none")
        return f"unknown key '{key}': {root}={chosen} has no keys; choose another {root}, see robot-forgetting list"
    choices = near or siblings or [name for name in known if "." not in name]
    return f"unknown key '{key}'; {'did you mean' if near else 'choose one of'}: {', '.join(choices)}{more}"


def _usable(key: str, overrides: Sequence[str]):
    """The configuration of the groups that were chosen, without a key that is wrong."""
    chosen = [text for text in overrides if text.partition("=")[0] in (*GROUPS, "hydra.searchpath")]
    return compose([text for text in chosen if text.partition("=")[0] != key]).config


def _keys_of(config) -> Iterator[str]:
    """Dotted keys, but for what says which class is built."""
    from omegaconf import OmegaConf

    def walk(node: dict, prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return (name for name in walk(OmegaConf.to_container(config)) if not name.endswith("_target_"))
