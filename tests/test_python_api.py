"""The Python API: what the command line does, from objects; runs as tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import ToyPolicy, ToyTask
from toy_runs import DISTANCES, same
from toy_runs import run as toy_run

import robot_forgetting as rf
from robot_forgetting.api.arguments import Arguments
from robot_forgetting.api.composing import CONFIGS, written
from robot_forgetting.api.frames import Run
from robot_forgetting.api.run_id import MOST, run_folder
from robot_forgetting.built_with import described
from robot_forgetting.errors import UserError
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.records.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("no_renderer")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_document(capsys):
    space: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.M | re.S):
        exec(code, space)
    run, again, runs = space["run"], space["again"], space["runs"]
    assert run.folder.finished and again.folder.finished and len(runs) == 4
    assert run.path.parent == Path("runs/mine") and run.path.name.startswith("skill_over-sft-")
    config = run.folder.config()
    assert config["policy"]["_target_"].endswith("CausalLM") and config["method"]["optimiser"]["learning_rate"] == 1e-3
    assert config["prior"] == ["skill_sort"] and config["prior_objects"][0]["skill"] == "sort"
    assert space["after"].folder.run["checkpoint"] == str(again.path) and len(space["before"].success) == 2
    assert set(runs.measures.run) == {run.path.name, again.path.name} and Path("runs/mine/report.html").is_file()
    assert all(f"rf.{name}(" in DOCUMENT for name in rf.API) and "docs/python.md" in (ROOT / "README.md").read_text()


# ---- objects


def made(groups: int = 6, **more) -> dict:
    """The keywords that make ``toy_runs.run``'s run."""
    optimiser = Optimiser(learning_rate=0.05)
    method = GRPO(iterations=4, groups=groups, group_size=4, optimiser=optimiser, minibatch_size=40, seed=0)
    budget = {"episodes": 6, "greedy_episodes": 3, "interim_episodes": 3, "divergence_episodes": 3, "videos": 0}
    budget |= {"divergence_states": 12}
    given = {"policy": ToyPolicy(seed=1), "task": ToyTask(), "method": method, "prior": [ToyTask("mirror")],
             "measures": DISTANCES}  # fmt: skip
    return given | {"budget": budget, "num_envs": 4, "processes": 1} | more


def test_objects_alone_need_no_hydra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hydra", None)
    run = rf.run(**made())
    same(run.folder, toy_run(tmp_path / "whole"))
    assert run.summary()["success"][0]["task"] == "reach" and run.folder.run["method"] == "grpo"
    found = dict(zip(run.forgetting.decode, run.forgetting.forgetting, strict=True))
    ended = [row for row in run.summary()["forgetting"] if row["iteration"] == 4 and row["task"] == "mirror"]
    assert found == {row["decode"]: pytest.approx(row["forgetting"]) for row in ended} and len(run.success)
    assert run.folder.config()["measures"] == ["forward_kl", "total_variation", "l2", "reverse_kl"]
    # The same again is the same run, another argument another one, though the method does not keep it by that name.
    assert rf.run(**made()).path == run.path and run.folder.config()["method"]["groups"] == 6
    (other,) = {rf.run(**made(groups=8)).path} - {run.path}
    named = rf.run(**made(measures=["forward_kl", "cka_debiased"]))
    assert set(named.measures.measure) == {"forward_kl"} and "cka_debiased" in str(named.folder.run["left_out"])
    after = rf.evaluate(policy=ToyPolicy(seed=1), task=ToyTask(), checkpoint=run.path, episodes=6, num_envs=4)
    tuned = run.episodes.query("stage == 1 and iteration == 4 and task == 'reach' and decode == 'sampled'")
    found = after.episodes.query("decode == 'sampled'")
    assert dict(zip(found.seed, found.success, strict=True)) == dict(zip(tuned.seed, tuned.success, strict=True))
    assert {path.name for path in Path("runs/default").iterdir()} == {
        one.name for one in (run.path, other, named.path, after.path)
    }
    page = rf.write_report([run.path, other], tmp_path / "page.html")
    assert page.is_file()


def test_a_sequence_of_objects():
    run = rf.run(**made(sequence=[ToyTask(), ToyTask("mirror")], task=None, prior=None))
    assert run.folder.finished and set(run.episodes.stage) == {0, 1, 2} and "sequence_objects" in run.folder.config()


def test_an_interrupted_call_continues(monkeypatch, tmp_path):
    collect = GRPO.collect

    def stops(self, policy, task, iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return collect(self, policy, task, iteration)

    monkeypatch.setattr(GRPO, "collect", stops)
    with pytest.raises(KeyboardInterrupt):
        rf.run(**made(run_dir=tmp_path / "run"))
    assert Run(tmp_path / "run").folder.status == "interrupted" and Run(tmp_path / "run").summary() is None
    assert len(rf.load_runs(tmp_path).train) and len(rf.load_runs(tmp_path).success), "an unfinished run has tables"
    monkeypatch.setattr(GRPO, "collect", collect)
    same(rf.run(**made(run_dir=tmp_path / "run")).folder, toy_run(tmp_path / "elsewhere" / "whole"))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"nosuch": 1}, "unknown key 'nosuch'; choose one of"),
        ({"num_env": 1}, "unknown key 'num_env'; did you mean: num_envs"),
        ({"seed": -1}, "seed=-1 is not a whole number from 0"),
        ({"budget": "nosuch"}, "unknown budget 'nosuch'; choose one of: demo"),
        ({"budget": {"episodes": 0}}, "budget.episodes=0 is not a whole number"),
        ({"method.clip": 0.1}, "method is an object here: what method.clip would set is said where it is built"),
        ({"prior": [ToyTask()]}, "task 'reach' has two roles"),
        ({"task": "stak"}, "unknown task 'stak'; choose one of: fashion_mnist"),
        ({"method": "sft", "method.iteration": 1}, "did you mean: method.iterations"),
        ({"policy": ToyTask()}, "policy= gives ToyTask"),
        ({"decode": {"temprature": 1}}, "did you mean: decode.temperature"),
        ({"sequence": [ToyTask()]}, "a task beside a sequence"),
        ({"prior": ToyTask("mirror")}, "prior is a list; write prior=[...]"),
        ({"polcy": ToyTask()}, "polcy=ToyTask(...): objects are given as policy, task"),
    ],
    ids=str,
)
def test_bad_input(given, words):
    with pytest.raises(UserError) as caught:
        rf.run(**made() | given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_mappings_are_keys(monkeypatch):
    found = []
    monkeypatch.setattr(Arguments, "call", lambda self, _: found.append(self) or 0)
    optimiser = {"method.optimiser": {"warmup_steps": 3}}
    assert rf.check(policy={"lora": {"rank": 2, "alpha": 4}}, decode={"temperature": 0.5}, **optimiser)
    (made,) = found
    assert made.plain["policy"]["lora"] == {"rank": 2, "alpha": 4} and made.plain["decode"]["temperature"] == 0.5
    assert made.plain["method"]["optimiser"]["warmup_steps"] == 3 and made.plain["method"]["optimiser"]["learning_rate"]


def test_an_object_says_what_it_was_built_with():
    class Mine(GRPO):
        def __init__(self, *, strength, data, **options):
            super().__init__(optimiser=Optimiser(learning_rate=1.0), groups=1, group_size=2, **options)

    numbers = np.arange(3)
    said = described(Mine(strength=Path("a"), data=[numbers, ToyTask("mirror"), len], iterations=2))
    assert said["_target_"].endswith("Mine") and said["strength"] == "a" and said["options"] == {"iterations": 2}
    assert said["data"][1:] == [{"_target_": "toy.ToyTask", "name": "mirror"}, "builtins.len"]
    assert said["data"][0] != described(numbers + 1) and said["data"][0] == described(numbers.copy())
    assert described(ToyTask()) == {"_target_": "toy.ToyTask"}


# ---- tables


def test_tables_of_shipped_runs(monkeypatch):
    runs = rf.load_runs(ROOT / "results" / "three-seeds")
    assert len(runs.runs) == 6 and set(runs.success.method) == {"base", "sft", "grpo"}
    (mean,) = runs.forgetting.query("method == 'sft' and decode == 'sampled' and task == 'prior mean'").forgetting
    assert round(mean, 3) == 0.010 and runs.forgetting.runs.max() == 3, "as the README says"
    assert list(runs.episodes.columns[:6]) == ["run", "method", "penalty", "policy", "new_task", "run_seed"]
    assert len(runs.measures) == sum(len(run.rows("divergence")) for run in runs.runs)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="need pandas: pip install pandas"):
        _ = runs.train
    with pytest.raises(UserError, match="nowhere does not exist"):
        rf.load_runs("nowhere")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for sweep in ("a", "b"):
        with RunFolder.create(tmp_path / sweep / "run", config={}) as folder:
            folder.append("train", {"iteration": 1})
    assert set(rf.load_runs([tmp_path / "a", tmp_path / "b"]).train.run) == {f"{tmp_path}/a/run", f"{tmp_path}/b/run"}


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, robot_forgetting as rf; assert 'run' in dir(rf) and not hasattr(rf, 'nosuch'); "
    code += "assert not {'torch', 'numpy', 'omegaconf', 'hydra', 'pandas', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- keys and folders


@pytest.mark.parametrize(
    "value",
    [1, -2.5, 1e-7, True, None, "text", "true", "7", "1e-4", "a b", "it's", "a\\", "a,b", "${x}", "", [1, "a", None],
     {"a": [1, {"b": "c d"}]}, "/data/x-y_z.1"],
    ids=repr,
)  # fmt: skip
def test_values_reach_hydra_as_they_are(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (parsed,) = OverridesParser.create().parse_overrides([f"key={written(value)}"])
    assert parsed.value() == value and not parsed.is_sweep_override()


def test_names_of_folders_are_short_and_tell_runs_apart():
    names = {group: [path.stem for path in CONFIGS.glob(f"{group}/*.yaml")] for group in ("task", "policy", "budget")}
    names["task"].append("an_own_task_" + 100 * "x")
    found = []
    for task in names["task"]:
        for policy, budget in zip(names["policy"], names["budget"] * 3, strict=False):
            for prior in ([], names["task"][:5], names["task"][1:6]):
                for seed in (0, 4_000_000_000):
                    words = [(0, "evaluate"), (0, task), (3, policy), (2, budget), (4, "prior" + ",".join(prior))]
                    words.append((1, "learning_rate1e-4"))
                    found.append(run_folder(Path("runs"), words, seed, [word for _, word in words]).name)
    assert len(set(found)) == len(found) and max(map(len, found)) <= MOST
    assert all(name.isascii() and "/" not in name for name in found)


def test_a_folder_with_a_long_name_goes_on(tmp_path):
    words = [(0, "task" * 15), (0, "sft"), (4, "prior" + "_other" * 9)]
    short = run_folder(tmp_path, words, 1)
    assert re.fullmatch(r"(task)+-sft-seed1-[0-9a-f]{8}", short.name)
    assert run_folder(tmp_path, words, 2).name.rpartition("-")[2] == short.name.rpartition("-")[2], "the same settings"
    long = tmp_path / f"{'task' * 15}-sft-prior{'_other' * 9}-seed1"
    long.mkdir()
    assert run_folder(tmp_path, words, 1) == long


BRIDGE = ["seed=1", "method=grpo", "budget=simpler", "policy=openvla-nano-bridge", "task=widowx_carrot_on_plate",
          "prior=[widowx_spoon_on_towel,widowx_stack_cube]", "held_out=[]"]  # fmt: skip


@pytest.mark.parametrize("sweep, more", [("bridge", []), ("bridge-long", ["budget.rl_iterations=40"])])
def test_shipped_runs_are_where_the_same_command_would_write_them(sweep, more):
    assert Arguments("run", [*BRIDGE, *more, f"sweep={sweep}"]).value("run_dir").name in [
        path.name for path in (ROOT / "results" / sweep).iterdir()
    ]
