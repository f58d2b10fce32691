"""The command line: every error is one line with exit code 2, users' own modules work, start-up is quick."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import hydra
import pytest
import yaml
from command_line import complaint
from omegaconf import OmegaConf

from robot_forgetting.api.arguments import OWN
from robot_forgetting.api.config_checks import check_node
from robot_forgetting.cli import command_line as cli
from robot_forgetting.ranges import problem
from robot_forgetting.records.run_folder import RunFolder

PLUGIN = """
from robot_forgetting.errors import UserError

class Counter:
    def __init__(self, count: int, factor: float = 1.0, note: str | None = None):
        if count > 8:
            raise UserError("count is at most 8")
        if count > 6:
            raise ValueError("a bug of the plug-in's author")
        self.count = count
"""


def probe(task, prior, names, run_dir, temperature, config):
    """Stands in for a verb's function."""
    print(task.count, [other.count for other in prior], names["task"], run_dir, temperature, config["seed"])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with a module of their own and two tasks; commands run in it. `check` calls ``probe``."""
    name = f"plugin_{tmp_path.name.replace('-', '_')}"  # a module of its own per test: imports are cached
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    group = tmp_path / "my_configs" / "task"
    group.mkdir(parents=True)
    (group / "one.yaml").write_text(f"# Counts to three\n_target_: {name}.Counter\ncount: 3\n")
    (group / "two.yaml").write_text(f"# Counts to five\n_target_: {name}.Counter\ncount: 5\n")
    (group / "lacking.yaml").write_text(f"_target_: {name}.Counter\n")
    (group / "lost.yaml").write_text("_target_: no_such_module.Thing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(cli.VERBS, "check", (f"{__name__}:probe", ""))
    return tmp_path


RESULTS = Path(__file__).parents[1] / "results"
SEARCH = "hydra.searchpath=[file://my_configs]"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["lst"], "unknown verb 'lst'; choose one of: assets, check, doctor, evaluate, list"),
        (["run", "task=pick_cub"], "unknown task 'pick_cub'; choose one of: fashion_mnist"),
        (["run", "method=sfd"], "unknown method 'sfd'; choose one of:"),
        (["run", "--multirun", "task=pick_cub", "seed=0,1"], "unknown task 'pick_cub'"),
        (["run", "sed=1"], "unknown key 'sed'; did you mean: seed"),
        (["run", "metod=sft"], "unknown key 'metod'; did you mean: method"),
        (["run", "decode.temprature=1"], "did you mean: decode.temperature"),
        (["run", "seed=abc"], "seed=abc is not a whole number"),
        (["run", "seed=-1"], "seed=-1 is not a whole number from 0 to 4_000_000_000"),
        (["run", "num_envs=1.5"], "num_envs=1.5 is not a whole number"),
        (["run", "decode.temperature=hot"], "decode.temperature=hot is not a number"),
        (["run", "prior=pick_cube"], "prior=pick_cube is not a list"),
        (["run", "decode.temperature=nan"], "decode.temperature=nan is not a number"),
        (["run", "method.optimiser.learning_rate=inf"], "method.optimiser.learning_rate=inf is not a number"),
        (["run", "method.optimiser.learning_rate=-1"], "learning_rate=-1 is not a number above 0 and up to 1e+38"),
        (["run", "method.optimser.learning_rate=1"], "did you mean: method.optimiser.learning_rate"),
        (["run", "num_envs=0"], "num_envs=0 is not a whole number from 1 to 16_384"),
        (["run", "processes=0"], "processes=0 is not a whole number from 1 to 512"),
        (["evaluate", "episodes=0"], "episodes=0 is not a whole number from 1 to 500_000"),
        (["run", "budget=unknown"], "unknown budget 'unknown'; choose one of: demo"),
        (["run", "budget.episodes=many"], "budget.episodes=many is not a whole number"),
        (["run", "budget.videos=-1"], "budget.videos=-1 is not a whole number from 0 to 1_000"),
        (["run", "~budget.videos"], "budget lacks 'videos'; add it to its yaml"),
        (["pretrain", "pretrain.iterations=x"], "pretrain.iterations=x is not a whole number"),
        (["pretrain", "pretrain.demonstrations={pick_cube: x}"], "pretrain.demonstrations.pick_cube=x is not a whole"),
        (["pretrain", "pretrain.demonstrations={}"], "pretrain.demonstrations asks for none; for example"),
        (["pretrain", "pretrain.optimiser.learning_rate=x"], "pretrain.optimiser.learning_rate=x is not a number"),
        (["run", "penalty.coefficient=1"], "'penalty.coefficient': penalty=none has no keys; choose another penalty"),
        (["run", "seed=0,1"], "add --multirun"),
        (["run", "seed=["], "cannot read 'seed=['"),
        (["doctor", "task=stack_cube"], "doctor takes no arguments"),
        (["run", "stack_cube"], "is not of the form key=value"),
        (["run", "task", "stack_cube"], "write task=NAME (robot-forgetting list shows the names)"),
        (["run", "seed"], "for example seed=..."),
        (["run", "hydra.searchpath=configs"], "hydra.searchpath is a list of folders: write 'hydra.searchpath=[file:"),
        (["run", "--config-dir", "/no/such/folder"], "not found; give an existing folder after --config-dir"),
        (["report"], "no run folder given; name some, as in: robot-forgetting report runs/demo"),
        (["evaluate", "policy.checkpoint=Makefile"], "Makefile is a file; give the folder that holds config.json"),
        (["evaluate", "checkpoint=Makefile"], "Makefile is not a run folder: it is a file; give a folder like runs/"),
        (["evaluate", "checkpoint=tests"], "tests is not a run folder: it has no run.json; give a folder like runs/"),
        (["report", "tests"], "tests holds no run folder; give run folders, or a folder that holds some"),
        (["record", "output=Makefile"], "Makefile cannot be written: File exists; choose another run_dir or output"),
        (["pretrain", "output=Makefile"], "Makefile cannot be written: File exists; choose another run_dir or output"),
        (["run", "--experimental-rerun=config.pickle"], "unknown option"),
        (["run", "--cfg", "everything"], "--cfg job"),
        (["run", "hydra.searchpath=[file:///no/such/folder]"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert words in complaint(capsys, *arguments)


def test_a_run_folder_that_cannot_be_used(capsys, tmp_path, monkeypatch):
    """It is a file, or it holds the rows of another seed; found before anything is simulated."""
    monkeypatch.setattr("robot_forgetting.machine.doctor.render_backend", dict)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert "file cannot be written: File exists; choose another run_dir" in complaint(capsys, "run", "run_dir=file")
    assert cli.main(["run", "--cfg", "job", "--resolve"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    with RunFolder.create(tmp_path / "begun", config=config) as folder:
        folder.append("train", {"iteration": 1})
    said = complaint(capsys, "run", "run_dir=begun", "seed=1")
    assert "begun was made with another configuration (seed: 0, now 1; " in said
    assert said.endswith("repeat the earlier command to continue it, or choose another run_dir\n")


def test_a_method_that_clones_and_a_task_without_expert(capsys, folder):
    target = "_target_: robot_forgetting.tasks.simulator.maniskill_task.ManiSkillTask\n"
    target += "name: poke\nenv_id: PokeCube-v1\n"
    (folder / "my_configs" / "task" / "poke.yaml").write_text(f"{target}instruction: poke\nimage_size: 64\n")
    said = complaint(capsys, "run", SEARCH, "task=poke", "method=sft")
    assert "task 'poke' has no demonstrations; give it an expert, or use a method that needs none" in said
    assert not (folder / "runs").exists()


CONFIGS = Path(cli.__file__).parents[2] / "configs"
ENTRIES = sorted(f"{path.parent.name}={path.stem}" for path in CONFIGS.glob("*/[!_]*.yaml"))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_config_suits_its_class_and_says_what_it_is(entry):
    group, _, name = entry.partition("=")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = OmegaConf.to_container(hydra.compose("config", overrides=[entry]), resolve=True)[group]
    check_node(node, group, entry)
    first = (CONFIGS / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# "), "the first line is what `robot-forgetting list` shows"


def test_help_and_no_arguments(capsys):
    for arguments in ([], ["--help"], ["help"], ["-h"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_a_verbs_own_help(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: robot-forgetting {verb}") and cli.VERBS[verb][1] in out
    assert ("seed=0\n" in out) == (verb in ("run", "evaluate", "pretrain", "reproduce", "check"))
    assert ("method.label_sigma=0\n      a number from 0 to 256" in out) == (verb in ("run", "check"))


def test_help_shows_the_keys_of_what_is_chosen(capsys):
    assert cli.main(["run", "--help", "method=grpo"]) == 0
    assert "method.clip=0.2\n      a number above 0 and up to 1" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"robot-forgetting {metadata.version('robot-forgetting')}\n"


def test_a_users_own_task(capsys, folder):
    assert cli.main(["check", SEARCH, "task=one", "prior=[two]", "seed=4", "task.factor=2"]) == 2  # not in the yaml
    assert "write +task.factor=" in capsys.readouterr().err
    assert cli.main(["check", SEARCH, "task=one", "prior=[two]", "seed=4", "+task.factor=2"]) == 0
    assert capsys.readouterr().out == "3 [5] one runs/default/check-one-priortwo-factor2-seed4 1.0 4\n"
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} <= {"__pycache__", "my_configs"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["task=lacking"], "task=lacking lacks 'count', which Counter needs"),
        (["task=lost"], "task=lost: cannot import 'no_such_module.Thing'"),
        (["task=one", "task.count=x"], "task.count=x is not a whole number"),
        (["task=one", "+task.cout=1"], "unknown key 'task.cout'; Counter takes: count, factor, note"),
        (["task=one", "task.count=9"], "count is at most 8"),
        (["task=one", "task.count=7"], "ValueError: a bug of the plug-in's author; debug=true shows the traceback"),
        (["task=one", "prior=[three]"], "unknown task 'three'; choose one of: fashion_mnist, "),
    ],
)
def test_what_is_wrong_with_a_users_own_task(capsys, folder, arguments, words):
    assert words in complaint(capsys, "check", SEARCH, *arguments)


def test_a_sweep_goes_on_after_a_failure_and_leaves_no_files(capsys, folder):
    command = ["check", SEARCH, "--multirun", "task=one,two", "task.count=9,4", "prior=[]", "sweep=mine"]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    expected = [f"4 [] {name} runs/mine/check-{name}-count4-prior-seed0 1.0 0" for name in ("one", "two")]
    assert out.splitlines() == expected
    assert err.splitlines()[0].startswith("error: [task=one task.count=9") and err.count("count is at most 8") == 2
    assert not (folder / "multirun").exists() and not (folder / "multirun.yaml").exists()


@dataclasses.dataclass(frozen=True)
class Wanted:
    seed: int
    names: dict
    episodes: int | None


def test_a_dataclass_is_filled_from_its_fields(capsys, folder, monkeypatch):
    def show(wanted: Wanted, num_envs: int):
        print(wanted.seed, wanted.names["task"], wanted.episodes, num_envs)

    monkeypatch.setitem(globals(), "show", show)
    monkeypatch.setitem(cli.VERBS, "check", (f"{__name__}:show", ""))
    assert cli.main(["check", SEARCH, "task=one", "seed=4", "num_envs=3"]) == 0
    assert capsys.readouterr().out == "4 one None 3\n"


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - {"assets"}))  # assets reads no configuration
def test_every_verb_asks_for_things_that_there_are(verb):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        keys = set(hydra.compose("config"))
    known = keys | {"reproduce", "penalty", "measure", "config", "temperature", *OWN}

    def asked(function):
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            kind = parameter.annotation
            yield from asked(kind) if dataclasses.is_dataclass(kind) else [name]

    assert set(asked(cli.load(cli.VERBS[verb][0]))) <= known


def test_debug_shows_the_traceback(capsys, folder):
    assert cli.main(["check", SEARCH, "task=one", "task.count=9", "debug=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Arguments, "call", interrupted)
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted; the same command again continues where it stopped"


@pytest.mark.parametrize(
    "arguments, ids",
    [
        (["run"], ["stack_cube-sft-seed0"]),
        (["run", "sweep=demo", "processes=1", "device=cpu", "debug=true", "seed=3"], ["stack_cube-sft-seed3"]),
        (["run", "--multirun", "render=low_poly,stock", "episodes=8"],
         ["stack_cube-sft-renderlow_poly-episodes8-seed0", "stack_cube-sft-renderstock-episodes8-seed0"]),
        (["run", "--multirun", "image_size=64,128", "num_envs=4"],
         ["stack_cube-sft-image_size64-num_envs4-seed0", "stack_cube-sft-image_size128-num_envs4-seed0"]),
        (["run", "method=grpo", "method.optimiser.learning_rate=1e-4"],
         ["stack_cube-grpo-learning_rate1e-4-seed0"]),
        (["evaluate", "episodes=9", "checkpoint=runs/a/b"], ["evaluate-stack_cube-episodes9-checkpointb-seed0"]),
        (["pretrain", "pretrain.demonstrations={pick_cube: 3}"],
         ["pretrain-stack_cube-demonstrations_pick_cube__3_-seed0"]),
    ],
)  # fmt: skip
def test_run_id_says_whatever_changes_the_result(capsys, monkeypatch, tmp_path, arguments, ids):
    monkeypatch.chdir(tmp_path)
    RunFolder.create("runs/a/b", config={}).close()
    monkeypatch.setattr(cli.Arguments, "call", lambda self, _: print(self.value("run_dir").name))
    monkeypatch.setattr(cli, "load", lambda _: lambda: None)
    assert cli.main(arguments) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(ids)


def test_run_folders_are_positional(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.Arguments, "call", lambda self, _: print(self.run_folders, self.value("output")))
    monkeypatch.setattr(cli, "load", lambda _: lambda: None)
    assert cli.main(["report", "runs/a", "runs/b", "output=x.html"]) == 0
    assert capsys.readouterr().out == f"{[Path('runs/a'), Path('runs/b')]} x.html\n"


def test_a_mapping_of_tasks_replaces_the_default_one(capsys):
    assert cli.main(["pretrain", "pretrain.demonstrations={poke: 3}", "--cfg", "job", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["pretrain"]["demonstrations"] == {"poke": 3}


def test_list_shows_own_tasks_and_first_comments(capsys, folder):
    assert cli.main(["list", SEARCH]) == 0
    out = capsys.readouterr().out
    assert "Counts to three" in out and "stack_cube" in out and "openvla-nano" in out


@pytest.mark.parametrize("command", [["list"], ["report", str(RESULTS / "three-seeds"), "output=page.html"]])
def test_nothing_large_is_imported_to_read(tmp_path, command):
    code = f"import sys; from robot_forgetting.cli import command_line as cli; assert cli.main({command}) == 0; "
    code += "assert not {'torch', 'scipy.stats'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        (1, int, True), (True, int, False), (1, float, True), (True, float, False), ("1", float, False),
        (None, int | None, True), (None, int, False), ([1], list, True), ("a", Path, True), (1, bool, False),
    ],
)  # fmt: skip
def test_types(value, kind, expected):
    assert (problem("key", value, kind) is None) is expected
