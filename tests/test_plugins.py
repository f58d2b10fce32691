"""A fault in a plug-in is one line that names its file and line, exit code 2; a fault of ours stays one of ours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import faulty
import pytest

from robot_forgetting.cli import command_line as cli
from robot_forgetting.errors import PluginError, blamed, caller, fault, told
from robot_forgetting.methods.sft import SFT

pytestmark = pytest.mark.usefixtures("no_renderer")
YAML = {
    "policy/mine": "_target_: faulty.policy\nfault: sound\n",
    "task/mine": "_target_: faulty.FaultyTask\nfault: ''\n",
    "method/mine": "_target_: faulty.Faulty\nfault: ''\n",
    "method/short": "_target_: faulty.ShortSignature\n",
    "penalty/mine": "_target_: faulty.FaultyPenalty\nfault: ''\n",
    **{f"{group}/none_at_all": "_target_: faulty.NoPart\n" for group in ("policy", "task", "method", "penalty")},
}
RUN = ["policy=mine", "task=mine", "method=mine", "prior=[]", "held_out=[]", "budget=tiny", "budget.episodes=2",
       "budget.videos=0", "num_envs=2", "processes=1", "device=cpu"]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a yaml for each plug-in."""
    for name, text in YAML.items():
        file = tmp_path / "my_configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(verb: str, *changes: str) -> int:
    given = {change.partition("=")[0] for change in changes}
    usual = [text for text in RUN if text.partition("=")[0] not in given]
    return cli.main([verb, f"hydra.searchpath=[file://{Path.cwd() / 'my_configs'}]", *usual, *changes])


def measured() -> bool:
    """Whether an episode had been evaluated."""
    return any(file.read_text() for file in Path.cwd().glob("runs/*/*/episodes.jsonl"))


AT_ONCE = {  # before anything is measured
    "method.fault=constructor": "in __init__: RuntimeError: not today",
    "method.fault='no iterations'": "Faulty.iterations is None; set self.iterations",
    "method.fault=iterations": "Faulty.iterations is 2.0; set self.iterations",
    "method.fault='no optimiser'": "Faulty.optimiser is None; take `optimiser` as an argument",
    "method.fault=vector": r"Faulty.loss\(\) gives a tensor of shape \[2\]; reduce it to a scalar",
    "method.fault=float": r"Faulty.loss\(\) gives a float; return a torch scalar",
    "method.fault=detached": r"Faulty.loss\(\) gives a tensor that carries no gradient",
    "method.fault='no loss'": r"Faulty.loss\(\) gives None; return a torch scalar",
    "method.fault=whole": r"Faulty.loss\(\) gives int64 \[\]; return a float tensor",
    "method.fault=typo": "in loss: NameError: name 'polcy' is not defined",
    "method.fault=attribute": "in loss: AttributeError: 'OpenVLAPolicy' object has no attribute 'logprob'",
    "method=short": r"ShortSignature.loss\(\) takes \(self, policy\); it is called as loss\(self, policy, batch\)",
    "method=none_at_all": "method= gives NoPart .*, which is no robot_forgetting.method.Method; derive",
    "penalty=none_at_all": "penalty= gives NoPart .*, which is no robot_forgetting.method.Penalty; derive",
    "task=none_at_all": "task= gives NoPart .*, which is no robot_forgetting.task.Task; derive",
    "policy=none_at_all": "policy= gives NoPart .*, which is no robot_forgetting.policy.Policy; derive",
    "penalty=mine penalty.fault=vector": r"FaultyPenalty.__call__\(\) gives a tensor of shape \[2\]",
    "penalty=mine penalty.fault='None'": r"FaultyPenalty.__call__\(\) gives None",
    "penalty=mine penalty.fault=float": r"FaultyPenalty.__call__\(\) gives a float",
    "penalty=mine penalty.fault=raises": "in __call__: NameError: name 'kl' is not defined",
    "task.fault=instruction": "FaultyTask.instruction is 5; tell the policy what to do",
    "task.fault=make_env": "in make_env: FileNotFoundError: no mesh.glb",
    "task.fault=raises": "in wait: LookupError: the arm is gone",
    "task.fault='None'": r"FaultyEnv.wait\(\) lists None; list Transition objects",
    "task.fault=reward": r"FaultyEnv.wait\(\) gives a reward that is a str; give a plain number",
    "task.fault='reward tensor'": r"FaultyEnv.wait\(\) gives a reward that is float32 \[\]",
    "task.fault=success": r"FaultyEnv.wait\(\) gives a `success` that is an int; give a bool",
    "task.fault='no image'": r"FaultyEnv.wait\(\) gives observations without 'image', only instruction",
    "task.fault='float image'": r"gives an image that is float64 \[32, 32, 3\]; convention\(\) promises uint8",
    "task.fault='instruction bytes'": "gives an instruction that is a bytes; give a text",
    "task.fault='always crashes'": "task 'toy': the environment crashes at every start .*: the gripper is missing",
    "policy.fault=raises": "in act: ValueError: no such picture",
    "policy.fault=tuple": r"FaultyPolicy.act\(\) gives a tuple; return an Action",
    "policy.fault='float tokens'": r"FaultyPolicy.act\(\) gives tokens float32 \[2, 7\]; give int64 \[2, T\]",
    "policy.fault='one row'": r"FaultyPolicy.act\(\) gives tokens int64 \[1, 7\]; give int64 \[2, T\]",
    "policy.fault='flat mask'": r"FaultyPolicy.act\(\) gives a mask bool \[2\]; give bool \[2, 7\]",
    "policy.fault='no log_prob'": r"FaultyPolicy.act\(\) gives log_prob None; give \[2, 7\]",
    "policy.fault='one command'": r"FaultyPolicy.decode\(\) gives float32 \[1, 7\]; give 2 commands",
    "policy.fault='None'": r"FaultyPolicy.decode\(\) gives None; give 2 commands",
}
IN_TRAINING = {  # what only the real data can show
    "method.fault=begin": "in begin: KeyError: 'past'",
    "method.fault='collect raises'": "in collect: ZeroDivisionError: division by zero and a second line",
    "method.fault='None'": r"Faulty.collect\(\) gives None; return a list of Batch",
    "method.fault='one batch'": r"Faulty.collect\(\) gives a Batch; return a list of Batch",
    "method.fault='a number'": r"Faulty.collect\(\) lists an int; list Batch objects",
    "method.fault=empty": r"Faulty.collect\(\) lists an empty batch",
    "method.fault=short": r"gives a batch of 8 tokens rows, but advantage 3; all columns need equal lengths",
    "method.fault='float tokens'": r"Faulty.collect\(\) gives tokens float32 \[8, 7\]; give int64 \[8, T\]",
    "method.fault=late": "in loss: ZeroDivisionError",
    "method.fault=child processes=2": "in loss: ZeroDivisionError: in another process",
    "task.fault=expert": "in demonstrations: IndexError: no waypoint",
}


@pytest.mark.parametrize("change, words", [*AT_ONCE.items(), *IN_TRAINING.items()])
def test_one_line_with_file_and_line(folder, capsys, change, words):
    changes = re.findall(r"""[^\s']+(?:'[^']*')?""", change)
    assert command("run", *changes) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and re.search(words, said), said
    assert "always" in change or re.search(r"faulty\.py, line \d+", said), said
    assert measured() is (change in IN_TRAINING)


@pytest.mark.parametrize("own", ["method=mine method.fault=vector", "method=sft penalty=mine penalty.fault='None'"])
def test_a_loss_is_tried_on_questions_too(folder, capsys, own):
    changes = re.findall(r"""[^\s']+(?:'[^']*')?""", own)
    assert command("run", "policy=qwen-nano", "task=skill_over", *changes) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"faulty\.py, line \d+: Faulty.*\(\) gives", said) and not measured(), said


def test_the_line_is_the_one_that_raised(folder, capsys):
    assert command("run", "method.fault=typo") == 2
    number = int(re.search(r"line (\d+), in loss", capsys.readouterr().err)[1])
    assert "polcy" in Path(faulty.__file__).read_text().splitlines()[number - 1]


def test_sound_plugins_pass(folder, capsys):
    assert command("run", "penalty=mine", "policy.fault=''") == 0, capsys.readouterr().err
    assert measured()


def test_an_error_of_ours_stays_ours(folder, capsys):
    """Also where a plug-in had called us, whose line is named beside."""
    assert command("run", "method.fault=ours") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: \w+Error at policy.py:\d+: ", said), said
    assert re.search(r"\(called from .*faulty.py, line \d+, in collect\)", said), said


def test_debug_shows_the_traceback_of_another_process(folder, capsys):
    assert command("run", "method.fault=child", "processes=2", "debug=true") == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and 'raise ZeroDivisionError("in another process")' in said


# ---- whose frame it is


def caught(function) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_frames():
    import json

    mine = caught(lambda: json.loads("{"))
    assert blamed(mine).startswith("tests/test_plugins.py, line ") and "JSONDecodeError" in blamed(mine)
    ours = caught(lambda: SFT.collect(None, None, None, 0))
    assert blamed(ours) is None and "test_plugins.py" in caller(ours)
    assert told(ours)[0] is RuntimeError and "(called from tests/test_plugins.py" in told(ours)[1]
    assert told(mine)[0] is PluginError and "Traceback" in told(mine)[2]


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("x = 1\ndef loss(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert re.search(r"broken_plugin.py, line 2: SyntaxError", blamed(caught(lambda: __import__("broken_plugin"))))


def test_a_wrong_value_of_ours_is_a_bug():
    sft = SFT(iterations=1, steps_per_iteration=1, batch_size=1, demonstrations=1, optimiser=None)
    assert isinstance(fault(sft, "loss", "gives None"), TypeError)
    line = inspect.getsourcelines(faulty.Faulty.loss)[1]
    assert f"faulty.py, line {line}: Faulty.loss() gives" in str(fault(faulty.Faulty(), "loss", "gives None"))
    inherited = str(fault(faulty.FaultyTask(), "seeds", "gives None"))
    assert f"line {inspect.getsourcelines(faulty.FaultyTask)[1]}: FaultyTask.seeds()" in inherited
