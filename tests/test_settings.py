"""Every number that can be set has a declared type and range, checked before anything is built, and is documented."""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import hydra
import pytest
from command_line import complaint
from omegaconf import OmegaConf

from robot_forgetting.api.config_checks import check_node, check_root, signature
from robot_forgetting.api.settings import Settings
from robot_forgetting.cli import command_line as cli
from robot_forgetting.cli.keys import keys_of
from robot_forgetting.errors import UserError
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.method import Optimiser
from robot_forgetting.policies import lora
from robot_forgetting.ranges import ArgumentsOf, Count, Range, known_keys, options, problem, unmarked, words

CONFIGS = Path(cli.__file__).parents[2] / "configs"
FILES = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/**/[!_]*.yaml")]
ENTRIES = sorted("=".join(name.split("/", 1)) for name in FILES)
# What a study's runs are given: keys of somewhere else, checked there.
ELSEWHERE = ("reproduce.common.", "reproduce.quick.common.")


@cache
def configuration(entry: str, kind: str = "robot") -> dict:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("config", overrides=[entry, *([] if "task=" in entry else [f"kind={kind}"])])
    return OmegaConf.to_container(composed, resolve=True)


def check(plain: dict, group: str) -> None:
    check_root(plain)
    check_node(plain.get(group), group, group)
    optimiser = {"_target_": "robot_forgetting.method.Optimiser", **plain["pretrain"]["optimiser"]}
    check_node(optimiser, "pretrain.optimiser", "pretrain.optimiser")


def numbers(node, path: tuple = ()) -> Iterator[tuple]:
    """The places of all numbers in plain values."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, (*path, key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path


def changed(plain: dict, path: tuple, value) -> dict:
    """A copy in which one place has another value."""
    made = inner = copy.deepcopy(plain)
    for key in path[:-1]:
        inner[key] = {} if inner[key] is None else inner[key]
        inner = inner[key]
    inner[path[-1]] = value
    return made


def dotted(path: tuple) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


@pytest.mark.parametrize("kind", ["robot", "text"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_number_in_every_yaml_has_a_range(entry, kind):
    """A number without one would be accepted however large or small it is."""
    group, plain, usual = entry.partition("=")[0], configuration(entry, kind), configuration("penalty=none", kind)
    check(plain, group)
    shared = set() if entry == "penalty=none" else set(numbers({k: v for k, v in usual.items() if k != group}))
    for path in set(numbers(plain)) - shared:
        name = dotted(path)
        if name.startswith(ELSEWHERE) or (path[0] != group and path[0] in ("task", "method", "policy")):
            continue
        for value in (-(10**60), 10**60):
            with pytest.raises(UserError) as caught:
                check(changed(plain, path, value), group)
            assert name.rpartition("[")[0] or name in str(caught.value)


def leaves(path: tuple, kind) -> Iterator[tuple]:
    """(place, annotation) of every single value below a declared annotation."""
    fields = next((found for one in options(kind) if (found := known_keys(*unmarked(one))) is not None), None)
    if fields is None:
        yield path, kind
    else:
        for key, (inner, _) in fields.items():
            yield from leaves((*path, key), inner)


def ranged(kind) -> tuple[type, Range] | None:
    """The type and range of a number, which may be null too."""
    for plain, marks in map(unmarked, options(kind)):
        for mark in marks:
            if isinstance(mark, Range) and plain in (int, float):
                return plain, mark
    return None


def right(kind) -> list:
    plain, allowed = ranged(kind)
    values = [allowed.most, *([] if allowed.above else [allowed.least])]
    values += [] if allowed.also is None else [plain(allowed.also)]
    return values + [None] * (problem("", None, kind) is None)


def wrong(kind) -> list:
    plain, allowed = ranged(kind)
    step = 1 if plain is int else 1e-6 * max(1, abs(allowed.least))
    below = allowed.least if allowed.above else allowed.least - step
    values = [below, allowed.most + 1 if plain is int else allowed.most * 1.001 + 1, math.nan, math.inf, "text", True]
    values += [{}, *([1.5] if plain is int else []), *([None] if problem("", None, kind) else [])]
    return values + [[]] * all(typing.get_origin(option) is not list for option in options(kind))


ROOT = [(path, kind) for path, kind in leaves((), Settings) if ranged(kind)]


@pytest.mark.parametrize("path, kind", ROOT, ids=[dotted(path) for path, _ in ROOT])
def test_the_ends_of_a_range_of_config_yaml(path, kind):
    plain = configuration("penalty=none")
    for value in right(kind):
        check_root(changed(plain, path, value))
    for value in wrong(kind):
        with pytest.raises(UserError) as caught:
            check_root(changed(plain, path, value))
        assert str(caught.value).startswith(f"{dotted(path)}=") and "\n" not in str(caught.value)


def targets(node, path: tuple) -> Iterator[tuple]:
    """The places of everything that is built."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, (*path, key))


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.startswith(("budget", "penalty=none"))])
def test_the_ends_of_a_range_of_a_constructor(entry):
    group, plain = entry.partition("=")[0], copy.deepcopy(configuration(entry))
    tried = 0
    for where, node in targets(plain[group], (group,)):
        for key, parameter in signature(load_object(node["_target_"])).items():
            for path, kind in leaves((*where, key), parameter.annotation):
                if not ranged(kind) or key in ("camera", "noise"):  # whole mappings, which no yaml of ours gives
                    continue
                node.setdefault(key, None)
                tried += 1
                for value in right(kind):
                    check_node(changed(plain, path, value)[group], group, entry)
                for value in wrong(kind):
                    with pytest.raises(UserError) as caught:
                        check_node(changed(plain, path, value)[group], group, entry)
                    assert str(caught.value).startswith(f"{dotted(path)}=") and "\n" not in str(caught.value)
                if node[key] is None and problem("", None, parameter.annotation):
                    del node[key]
    assert tried or group == "measure"  # of which most take nothing


# ---- on the command line: one line that names the key, before anything is built


ACCEPTED_ONCE = [  # all were accepted, or ended in a Python error
    "+method.optimiser.max_grad_norm=-1", "method.optimiser.micro_batch=-1", "method.optimiser.micro_batch=0",
    "+method.optimiser.weight_decay=-1", "method.optimiser.warmup_steps=-3", "+method.optimiser.betas=[0.9]",
    "+method.optimiser.betas=[0.9,1.0]", "method.label_sigma=-1", "decode.temperature=1e308",
    "decode.temperature=1e-39", "decode.temperature=-0.0001", "budget.episodes=0",
    "budget.interim_points=1000000", "num_envs=100000000",
    "image_size=1000000", "processes=100000", "seed=1785912345678901234", "seed=", "prior=[1]", "prior=[[a]]",
    "pretrain.iterations=0", "held_out_text.number=0", "method.optimiser=3", "method.optimiser=null", "episodes=[]",
]  # fmt: skip


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize("text", ACCEPTED_ONCE)
def test_a_bad_number_on_the_command_line(capsys, text):
    key = text.lstrip("+").partition("=")[0]
    assert f"error: {key}" in complaint(capsys, "run", "method=sft", text)


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize(
    "text",
    ["method.minibatch_size=0", "method.clip=-1", "method.clip=0", "method.epochs=0", "method.group_size=1",
     "method.iterations=0", "policy.control_hz=0", "policy.lora={rank: 0, alpha: 1}",
     "policy.lora={rank: 4, alfa: 1}", "task.max_steps=0", "task.image_size=1000000"],
)  # fmt: skip
def test_a_bad_number_of_a_constructor(capsys, text):
    assert text.partition("=")[0] in complaint(capsys, "run", "method=grpo", text)


@pytest.mark.usefixtures("nothing_built")
def test_prior_tasks_are_checked_before_anything_is_built(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/task").mkdir(parents=True)
    Path("mine/task/bad.yaml").write_text(
        "_target_: robot_forgetting.tasks.text.skills.Skill\nname: bad\nskill: sort\nitems: 0\n"
    )
    said = complaint(capsys, "run", "hydra.searchpath=[file://mine]", "prior=[bad]")
    assert "task.items=0 is not a whole number from 1" in said


def test_a_range_of_a_users_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    Path("own_ranges.py").write_text(
        "from typing import Annotated\nfrom robot_forgetting.ranges import Range\n\n\n"
        "class Mine:\n    def __init__(self, strength: Annotated[float, Range(0, 2)] = 1.0):\n        pass\n"
    )
    Path("mine/penalty").mkdir(parents=True)
    Path("mine/penalty/own.yaml").write_text("# Mine\n_target_: own_ranges.Mine\nstrength: 1.0 # of the pull\n")
    command = ["hydra.searchpath=[file://mine]", "penalty=own"]
    said = complaint(capsys, "run", *command, "penalty.strength=3")
    assert "penalty.strength=3 is not a number from 0 to 2" in said
    assert cli.main(["list", "keys", *command]) == 0
    assert "penalty.strength=1.0\n      a number from 0 to 2 # of the pull" in capsys.readouterr().out


# ---- the declarations themselves


class Inner(TypedDict):
    size: Annotated[int, Range(1, 3)]
    note: NotRequired[str]


@pytest.mark.parametrize(
    "value, kind, said",
    [
        (3, Count, None),
        (0, Count, "key=0 is not a whole number from 1 to 10_000_000"),
        (None, Count | None, None),
        (0, Count | None, "key=0 is not a whole number from 1 to 10_000_000, or null"),
        (0.0, Annotated[float, Range(0.01, 1, also=0)], None),
        (0.001, Annotated[float, Range(0.01, 1, also=0)], "key=0.001 is not a number from 0.01 to 1, or 0"),
        ([1, 0], list[Count], "key[1]=0 is not a whole number from 1 to 10_000_000"),
        ([1], tuple[Count, Count], "key=[1] is not a list of 2, each a whole number from 1 to 10_000_000"),
        ({"size": 4}, Inner, "key.size=4 is not a whole number from 1 to 3"),
        ({}, Inner, "key lacks 'size'; add it to its yaml"),
        ({"size": 1, "sise": 1}, Inner, "unknown key 'key.sise'; key takes: size, note"),
        ({"size": 1}, Inner | None, None),
        ({"a": 0}, dict[str, Count], "key.a=0 is not a whole number from 1 to 10_000_000"),
        ({"rank": 0}, Annotated[dict, ArgumentsOf(lora.add)], "key.rank=0 is not a whole number from 1 to 65_536"),
        ({"learning_rate": 0}, Optimiser, "key.learning_rate=0 is not a number above 0 and up to 1e+38"),
    ],
)
def test_what_a_declaration_says(value, kind, said):
    assert problem("key", value, kind) == said


def test_words_of_an_annotation_that_is_not_judged():
    assert words(Path) == "anything" and problem("key", 3, Path) is None


def test_an_optimiser_of_the_python_api_is_checked_too():
    with pytest.raises(UserError, match="max_grad_norm=-1 is not a number above 0"):
        Optimiser(learning_rate=1.0, max_grad_norm=-1)


def test_the_docs_are_in_step():
    from robot_forgetting.cli.keys import page

    written = (CONFIGS.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(CONFIGS), "python -m robot_forgetting.cli.keys > docs/settings.md"


def test_every_number_in_the_docs_says_what_it_means():
    rows = [line.split(" | ") for line in (CONFIGS.parent / "docs" / "settings.md").read_text().splitlines()]
    bare = [row[0] for row in rows if len(row) == 4 and "number" in row[1] and not row[3].strip(" |")]
    assert bare == [], "write a comment behind it in its yaml"


def test_every_key_of_a_configuration_is_listed():
    plain = configuration("method=grpo")
    listed = {key.name for key in keys_of(plain, {"method": "grpo"}, [CONFIGS])}
    own = {dotted(path) for path in numbers(plain) if path[0] in ("method", "budget", "decode", "seed", "pretrain")}
    assert {
        name for name in own if "[" not in name and not name.startswith(("pretrain.demo", "pretrain.optim"))
    } <= listed
