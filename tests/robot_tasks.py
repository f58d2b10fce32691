"""The robot tasks of `configs/`, built as the command line builds them."""

from __future__ import annotations

from pathlib import Path

import hydra

from robot_forgetting import configs
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask

CONFIGS = Path(configs.__file__).parent
TASKS = sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml") if "[_maniskill," in path.read_text())


def configured(name: str, *overrides: str) -> ManiSkillTask:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"task={name}", *overrides])
    return hydra.utils.instantiate(config.task, _convert_="all")
