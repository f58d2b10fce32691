"""The README's snippets are run exactly as printed, and its commands are read by the command line."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from robot_forgetting.cli import command_line as cli
from robot_forgetting.machine import vulkan
from robot_forgetting.tasks.simulator import workers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```$", README, re.M | re.S))
SEARCH = "hydra.searchpath=[file://my_configs]"
needs_vulkan = pytest.mark.skipif(not vulkan.physical_devices(), reason="no Vulkan device; `make setup` installs one")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with the README's files; commands run in it."""
    for name, text in SNIPPETS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    workers.POOL.close()  # workers keep the module path of the moment at which they were started
    yield tmp_path
    workers.POOL.close()
    for name in ("my_method", "put_on_plate"):
        sys.modules.pop(name, None)


def test_snippets_are_as_short_as_promised():
    lengths = {name: len(text.splitlines()) for name, text in SNIPPETS.items()}
    assert len(lengths) == 5
    assert lengths["my_method.py"] <= 30 and lengths["put_on_plate.py"] <= 80


@pytest.mark.parametrize(
    "file, policy",
    [("README.md", "openvla-nano"), ("docs/vision_towers.md", "openvla-nano"),
     ("robot_forgetting/weights/openvla-nano/README.md", "openvla-nano"),
     ("configs/policy/openvla-nano.yaml", "openvla-nano"), ("configs/policy/openvla-nano-new.yaml", "openvla-nano"),
     ("robot_forgetting/weights/openvla-nano-bridge/README.md", "openvla-nano-bridge"),
     ("robot_forgetting/weights/openvla-nano-google/README.md", "openvla-nano-google"),
     ("README.md", "qwen-nano"), ("docs/language_models.md", "qwen-nano"),
     ("configs/policy/qwen-nano.yaml", "qwen-nano"), ("configs/policy/qwen-nano-new.yaml", "qwen-nano"),
     ("robot_forgetting/weights/qwen-nano/README.md", "qwen-nano")],
)  # fmt: skip
def test_the_size_of_the_small_policy_is_the_measured_one(file, policy):
    with safe_open(ROOT / f"robot_forgetting/weights/{policy}/model.safetensors", "pt") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    assert f"{count / 1e6:.2f} million parameters" in (ROOT / file).read_text(encoding="utf-8")


def test_the_template_is_the_one_shown():
    assert (ROOT / "envs" / "_template.py").read_text(encoding="utf-8") == SNIPPETS["put_on_plate.py"]


def test_own_method(folder, capsys):
    assert cli.main(["check", SEARCH, "method=clone_successes"]) == 0
    assert "all 12 checks passed" in capsys.readouterr().out
    assert cli.main(["list", SEARCH]) == 0
    assert "Filtered behaviour cloning" in capsys.readouterr().out


@needs_vulkan
def test_own_task(folder, capsys):
    assert cli.main(["check", SEARCH, "task=put_on_plate", "processes=1", "output=states.png"]) == 0
    out = capsys.readouterr().out
    assert "20 of 20 succeed" in out and "FAIL" not in out and (folder / "states.png").is_file()


@needs_vulkan
def test_own_method_and_task_in_a_run(folder):
    """A task without an expert, too few steps to succeed: every part of a run must cope."""
    command = ["run", SEARCH, "method=clone_successes", "task=poke_cube", "task.max_steps=4", "prior=[]", "held_out=[]"]
    command += [
        "policy=openvla-nano-new",
        "budget=tiny",
        "episodes=1",
        "method.episodes=2",
        "num_envs=2",
        "processes=1",
    ]
    assert cli.main(command) == 0
    (run,) = (folder / "runs" / "default").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert {row["stage"] for row in summary["success"]} == {0, 1}
    assert len((run / "train.jsonl").read_text().splitlines()) == 2


def commands() -> list[str]:
    """Whatever the README tells the reader to type after `robot-forgetting`."""
    found = re.findall(r"^ {4}robot-forgetting (.*)$|^\| `robot-forgetting (.*?)`", README, re.M)
    return sorted({(first or second).replace(r"\|", "|") for first, second in found})


@pytest.mark.parametrize("command", commands())
def test_commands_can_be_read(folder, capsys, command):
    verb, *rest = shlex.split(command)
    if verb in ("doctor", "list"):
        assert verb in cli.VERBS and not rest
        return
    rest = [argument for argument in rest if argument != "--multirun" and not argument.startswith("runs/")]
    # Of a sweep, its first point: `--cfg` shows one configuration.
    rest = [re.sub(r"^([\w.]+=[^\[,]*),.*", r"\1", argument) for argument in rest]
    if verb == "assets":  # takes no configuration; its arguments are tried in test_assets_command.py
        assert rest[0] in ("bridge", "google_robot")
        return
    assert cli.main([verb, "--cfg", "job", *rest]) == 0
    assert "policy:" in capsys.readouterr().out


def test_results_can_be_filled_in():
    assert README.index("<!-- results:start -->") < README.index("<!-- results:end -->")
