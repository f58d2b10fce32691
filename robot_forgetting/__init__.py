"""Measure what a fine-tuned robot policy or language model has forgotten, and why.

    import robot_forgetting as rf
    run = rf.run(policy="qwen-nano", task="skill_over", method="sft", budget="tiny")
    rf.load_runs("runs/default").forgetting

See docs/python.md. Nothing of it is imported before it is used.
"""

import importlib

from robot_forgetting import moved  # noqa: F401  (old names of modules)

__version__ = "0.1.0"

API = {
    "run": "api.calls",
    "evaluate": "api.calls",
    "record": "api.calls",
    "check": "api.calls",
    "load_runs": "api.frames",
    "read_tables": "report.page",
    "write_report": "studies",
}


def __getattr__(name: str):
    if name not in API:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{API[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *API]
