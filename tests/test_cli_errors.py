"""Errors of the command line that misled, or came after an hour: one line each, before anything is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import complaint

from robot_forgetting.api.arguments import Arguments, _declared
from robot_forgetting.cli import command_line as cli
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import ConventionSpec

SEARCH = "hydra.searchpath=[file://mine]"


pytestmark = pytest.mark.usefixtures("nothing_built")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["seed=0", "seed=1"], "'seed' is given twice: seed=0 and seed=1"),
        (["method=sft", "+method.labels=null", "++method.labels=1"], "'method.labels' is given twice"),
        (["=1"], "'=1' names no key"),
        (["+=1"], "'+=1' names no key"),
        (["~"], "'~' names no key"),
        (["++x"], "'++x' is not of the form key=value (for example task=x)"),
        (["seed="], "seed= is not a whole number"),
        (["task="], "unknown task ''"),
        (["method=[sft]"], "'method=[sft]': write method=NAME"),
        (["method=null"], "'method=null': write method=NAME"),
        (["method={a: 1}"], "'method={a: 1}': write method=NAME"),
        (["~method"], "run needs a method: give method=NAME"),
        (["~task"], "run needs a task: give task=NAME"),
        (["~seed"], "'seed' cannot be left out"),
        (["~budget"], "'budget' cannot be left out"),
        (["~penalty"], "'penalty' cannot be left out"),
        (["--multirun", "method=glob(nosuch*)"], "'method=glob(nosuch*)' lists nothing to sweep over"),
        (["--multirun", "seed=range(3,3)"], "'seed=range(3,3)' lists nothing to sweep over"),
        (["--config-dir", ".", SEARCH], "'hydra.searchpath' is given twice"),
        (["~nosuch"], "'nosuch' does not exist"),
        (["seed=${foo}"], "seed refers to ${foo}, which there is not"),
        (["prior=[1]"], "prior[0]=1 is not a text"),
        (["sweep=7"], """sweep=7 is not a text; as a text it is written '"7"'"""),
        (["prior=[[a]]"], "prior[0]=['a'] is not a text"),
        (["prior=null"], "prior=None is not a list"),
        (["+logger=x"], "nothing reads 'logger' (+logger=x); a setting of a method, task or policy is +method.logger"),
        (["++logger.name=x"], "nothing reads 'logger'"),
        (["method.optimiser=3"], "method.optimiser=3 is not a mapping of learning_rate"),
    ],
)
def test_arguments(capsys, arguments, words):
    assert words in complaint(capsys, "run", *arguments)


FAULTY = {
    "list": b"- a\n",
    "empty": b"",
    "comment": b"# nothing\n",
    "text": b"just words\n",
    "number": b"3\n",
    "binary": bytes(range(256)),
    "latin": "# übergross\nname: ä\n".encode("latin-1"),
    "zeros": b"a: \x00\n",
    "untargeted": b"count: 3\n",
    "broken": b"a: [1\n",
    "lost": b"_target_: nowhere.Thing\n",
    "three": b"_target_: 3\n",
    "refers": b"_target_: robot_forgetting.tasks.text.skills.Skill\nname: a\nskill: ${nokey}\n",
}


@pytest.mark.parametrize("group", ["task", "method", "policy", "penalty", "prior"])
@pytest.mark.parametrize("name", sorted(FAULTY))
def test_a_yaml_of_a_users_own_that_is_none(capsys, tmp_path, monkeypatch, group, name):
    monkeypatch.chdir(tmp_path)
    folder = Path("mine") / ("task" if group == "prior" else group)
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_bytes(FAULTY[name])
    said = complaint(capsys, "run", SEARCH, f"prior=[{name}]" if group == "prior" else f"{group}={name}")
    assert name in said and "Error" not in said.replace("ModuleNotFoundError", "")
    assert cli.main(["list", SEARCH]) == 0, "the list shows the others all the same"
    assert name in capsys.readouterr().out


def test_an_added_key_that_a_users_own_yaml_reads(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/task").mkdir(parents=True)
    target = "_target_: robot_forgetting.tasks.text.skills.Skill"
    Path("mine/task/own.yaml").write_text(f"{target}\nname: own\nskill: sort\nitems: ${{length}}\n")
    assert cli.main(["list", "keys", SEARCH, "task=own", "+length=7"]) == 0
    assert "task.items=7\n" in capsys.readouterr().out


@pytest.fixture
def points(monkeypatch):
    """The configurations of a sweep's points, in place of running them."""
    found = []
    monkeypatch.setattr(Arguments, "call", lambda self, _: found.append(self.plain))
    return found


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder of a user's own configurations."""
    monkeypatch.chdir(tmp_path)
    for group, text in {
        "task": "_target_: robot_forgetting.tasks.text.skills.Skill\nname: own\nskill: sort\nitems: ${length}\n",
        "method": "defaults: [sft]\n",
        "experiment": "# @package _global_\ndefaults: [{override /method: grpo}]\nseed: 7\n",
    }.items():
        Path("mine", group).mkdir(parents=True)
        Path("mine", group, "own.yaml").write_text(text)
    return Path("mine")


@pytest.mark.parametrize("named", [[SEARCH], ["--config-dir", "mine"], ["--config-dir=mine"]])
def test_a_folder_of_ones_own_serves_everywhere(capsys, mine, points, named):
    assert cli.main(["run", *named, "prior=[own]", "held_out=[]", "+length=7"]) == 0, "a prior task reads it"
    assert cli.main(["run", *named, "+experiment=own", "held_out=[]"]) == 0, "a group that is not ours"
    assert points[-1]["seed"] == 7 and "groups" in points[-1]["method"]
    assert cli.main(["run", *named, "-m", "method=glob(ow*),sft", "held_out=[]"]) == 2
    assert cli.main(["run", *named, "-m", "method=glob(ow*)", "seed=3,4"]) == 0
    assert [point["seed"] for point in points[-2:]] == [3, 4]
    capsys.readouterr()
    points.clear()
    assert "unknown key 'nokey'; choose" in complaint(capsys, "run", *named, "method=own", "nokey=3")
    assert "nothing was run: " in complaint(capsys, "run", *named, "-m", "method=own", "seed=1,-1") and points == []


# ---- sweeps


def test_an_interpolation_in_a_sweep_is_one(points):
    assert cli.main(["run", "--multirun", "seed=0,1", "sweep=mine", "policy.name=${sweep}"]) == 0
    assert [point["policy"]["name"] for point in points] == ["mine", "mine"]


def test_a_sweep_over_everything_that_hydra_writes(points):
    command = ["run", "-m", "method=sft,grpo", "seed=range(0,2)", "decode.temperature=choice(0.5,1)", "held_out=[]"]
    assert cli.main(command) == 0
    found = [(point["method"]["_target_"][-3:], point["seed"], point["decode"]["temperature"]) for point in points]
    assert found == [(m, s, t) for m in ("SFT", "RPO") for s in (0, 1) for t in (0.5, 1)]
    points.clear()
    assert cli.main(["run", "-m", "prior=[pick_cube],[]", "budget=glob(t*)"]) == 0
    assert [point["prior"] for point in points] == [["pick_cube"], ["pick_cube"], [], []]


def test_a_key_of_the_method_that_is_swept_to(points):
    """Hydra's own sweep applies the key to the default method, which lacks it."""
    assert cli.main(["run", "--multirun", "method=grpo,reinforce", "method.group_size=8"]) == 0
    assert [point["method"]["group_size"] for point in points] == [8, 8]


@pytest.mark.parametrize(
    "sweep, words",
    [
        (["method=grpo,sft", "method.groups=8"], "[method=sft method.groups=8] unknown key 'method.groups'"),
        (["method=grpo", "seed=0,1,-1"], "[method=grpo seed=-1] seed=-1 is not a whole number"),
        (["method=grpo", "method.clip=0.2,3"], "[method=grpo method.clip=3] method.clip=3 is not a number"),
        (["seed=0,1", "run_dir=x"], "[seed=1 run_dir=x] an earlier point has this one's folder, x; leave run_dir out"),
        (["device=cpu,auto"], "[device=auto] an earlier point has this one's folder, runs/default/stack_cube-sft"),
        (["method=sft,nosuch"], "[method=nosuch] unknown method 'nosuch'"),
    ],
)
def test_a_sweep_is_refused_before_its_first_point(capsys, points, sweep, words):
    said = complaint(capsys, "run", "--multirun", *sweep)
    assert "error: nothing was run: " + words in said and points == []


# ---- what is compared before anything is fetched


@pytest.mark.parametrize(
    "policy, task",
    [("mlp", "pick_cube"), ("qwen-nano", "pick_cube"), ("qwen2.5-7b-instruct", "stack_cube"),
     ("openvla-7b", "skill_over"), ("openvla-nano-new", "skill_over"), ("qwen-nano-new", "pick_cube"),
     ("mlp", "skill_over")],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["evaluate", "run", "record"])
def test_conventions_are_compared_before_the_policy_is_built(capsys, monkeypatch, verb, policy, task):
    def build(self, group, node, name):
        assert group != "policy"
        return __import__("hydra").utils.instantiate(node, _convert_="all")

    monkeypatch.setattr(Arguments, "_build", build)
    said = complaint(capsys, verb, f"policy={policy}", f"task={task}", "prior=[]", "held_out=[]")
    assert "disagree on" in said and "choose a matching pair" in said


def test_a_subclass_with_a_convention_of_its_own_declares_nothing():
    class Mine(MLPPolicy):
        def convention(self):
            return ConventionSpec(action_mode="mine")

    class Said(Mine):
        declares = ConventionSpec(action_mode="mine")

    assert _declared(Mine) is None and _declared(Said) == Said.declares and _declared(MLPPolicy) == MLPPolicy.declares
    assert _declared(lambda: None) is None


# ---- scripts


@pytest.mark.parametrize("how", ["stdin", "worker"])
def test_a_script_that_workers_cannot_read_again(tmp_path, how):
    script = "from robot_forgetting.cli import main; import sys; sys.exit(main(['evaluate', 'task=pick_cube']))"
    if how == "stdin":
        done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=tmp_path)
        words = "<stdin> cannot be read twice; write it into a file"
    else:  # what a spawned process does: it imports the script that has started its parent
        spawned = "import multiprocessing; multiprocessing.current_process()._inheriting = True; " + script
        done = subprocess.run([sys.executable, "-c", spawned], capture_output=True, text=True, cwd=tmp_path)
        words = "put the call below `if __name__ == '__main__':`"
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_script_without_a_guard(tmp_path):
    """The worker says what is wrong; the program that waits for it gives no advice of its own about memory."""
    script = tmp_path / "script.py"
    script.write_text("import sys, robot_forgetting.cli as c; sys.exit(c.main(['evaluate', 'task=pick_cube']))")
    given = [sys.executable, script]
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    said = done.stderr.splitlines()  # of two workers too
    assert done.returncode == 2 and "Traceback" not in done.stderr and "num_envs" not in done.stderr
    assert any("put the call below `if __name__ == '__main__':`" in line for line in said), said
    assert "error: a simulator process died (exit code 2); see what it has said" in said
