"""Modules have moved; what users wrote and what runs have recorded goes on."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.moved import MOVED, current
from robot_forgetting.records.config_file import differing_keys
from robot_forgetting.records.run_folder import RunFolder

RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_of_today(old):
    module = importlib.import_module(f"robot_forgetting.{old}")
    if MOVED[old] is not None:
        assert module is importlib.import_module(f"robot_forgetting.{MOVED[old]}")


def test_every_name_in_the_shipped_records_can_be_loaded():
    texts = [file.read_text() for file in RESULTS.rglob("config.yaml")]
    named = {name for text in texts for name in re.findall(r": (robot_forgetting\.\S+)", text)}
    assert named
    for name in named:
        assert load_object(name) is load_object(current(name))


def test_an_old_record_is_continued_under_the_new_names(tmp_path):
    old = {"task": {"_target_": "robot_forgetting.robot.task.ManiSkillTask", "expert": "my.expert"}}
    new = {"task": {"_target_": "robot_forgetting.tasks.simulator.maniskill_task.ManiSkillTask", "expert": "my.expert"}}
    assert not differing_keys(old, new)
    with RunFolder.create(tmp_path / "run", config=old) as folder:
        assert folder.config() == new
    with RunFolder.create(tmp_path / "run", config=new):
        pass
    assert current("robot_forgetting.train.Optimiser") == "robot_forgetting.method.Optimiser"
    assert current("robot_forgetting.nothing.Here") == "robot_forgetting.nothing.Here"
    assert current("my.robot.task.Own") == "my.robot.task.Own"
