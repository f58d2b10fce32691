"""Names of modules from before they had rooms of their own, which users' yaml files, imports and records still say.

``import robot_forgetting.robot.expert`` gives the module of today, and ``current`` the name of today.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec

PACKAGE = "robot_forgetting"
# Old name -> today's; None: a package of which nothing but these modules is left.
MOVED = {
    "train": "engine.train",
    "conformance.toy": "conformance.toy_task",
    "policies.causal_lm_vllm": "policies.causal_lm.vllm_sampler",
    "policies.qwen_nano": "policies.causal_lm.qwen_nano",
    "reproduce": None,
    "reproduce.base": "studies.digits.base_policy",
    "reproduce.llm": "studies.llm",
    "reproduce.parity_mnist": "studies.digits.sweep",
    "robot": None,
    "robot.bridge": "tasks.widowx.bridge",
    "robot.expert": "tasks.simulator.expert",
    "robot.google_robot_cabinet": "tasks.google_robot.cabinet",
    "robot.google_robot_expert": "tasks.google_robot.google_robot_expert",
    "robot.google_robot_move_near": "tasks.google_robot.move_near",
    "robot.google_robot_scenes": "tasks.google_robot.scenes",
    "robot.google_robot_tasks": "tasks.google_robot.google_robot_tasks",
    "robot.grasp": "tasks.simulator.grasp",
    "robot.grid": "tasks.simulator.grid",
    "robot.robots": "tasks.simulator.robots",
    "robot.simpler": "tasks.widowx.simpler",
    "robot.task": "tasks.simulator.maniskill_task",
    "robot.widowx_expert": "tasks.widowx.widowx_expert",
    "tasks.lm_eval": "tasks.benchmarks.lm_eval",
    "tasks.math": "tasks.text.math",
    "tasks.parity_mnist": "tasks.digits.parity_mnist",
    "tasks.science": "tasks.text.science",
    "tasks.skills": "tasks.text.skills",
    "tasks.teacher": "tasks.text.teacher",
    "tasks.tool_use": "tasks.text.tool_use",
}


def current(dotted: str) -> str:
    """Today's name of what ``dotted`` names; any other text stays as it is."""
    if dotted == f"{PACKAGE}.train.Optimiser":
        return f"{PACKAGE}.method.Optimiser"
    module, _, name = dotted.removeprefix(f"{PACKAGE}.").rpartition(".")
    new = MOVED.get(module) if dotted.startswith(f"{PACKAGE}.") else None
    return dotted if new is None else f"{PACKAGE}.{new}.{name}"


class _Finder:  # not of importlib.abc's, which take ten milliseconds to import
    def find_spec(self, name, path=None, target=None):
        old = name.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(name, self, is_package=MOVED[old] is None) if name != old and old in MOVED else None

    def create_module(self, spec) -> None:
        return None  # the usual one

    def exec_module(self, module) -> None:
        new = MOVED[module.__name__.removeprefix(f"{PACKAGE}.")]
        if new is not None:
            sys.modules[module.__name__] = importlib.import_module(f"{PACKAGE}.{new}")


sys.meta_path.append(_Finder())
