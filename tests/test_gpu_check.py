"""scripts/gpu_check.py: its steps at nano size, and what becomes of a step that fails, hangs or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_steps
import pytest

SCRIPT = Path(gpu_check.__file__)


def test_every_step_passes_at_nano_size(tmp_path):
    output = tmp_path / "check.json"
    done = subprocess.run([sys.executable, SCRIPT, "--dry", "--output", output], capture_output=True, text=True)
    steps = json.loads(output.read_text())["steps"]
    assert done.returncode == 0, [step for step in steps if step["state"] == "FAIL"]
    assert {step["group"] for step in steps} == set(gpu_check.GROUPS)
    assert len(done.stdout.splitlines()) == len(steps) + 1 and "0 FAIL" in done.stdout
    assert {step["state"] for step in steps if step["group"] != "simulator"} == {"PASS"}


def broken(steps: gpu_steps.Steps, end: str) -> None:
    """A group with a wrong number, a right one, and an end that is not its own."""

    def wrong() -> dict:
        raise AssertionError("2 nats apart")

    steps("wrong", wrong)
    steps("right", lambda: {"seconds": 1.5})
    steps("last", lambda: os._exit(3) if end == "dies" else time.sleep(60))


@pytest.mark.parametrize("end, said", [("dies", "code 3"), ("hangs", "not done after")])
def test_a_step_that_ends_its_process_is_recorded_and_ends_nothing_else(tmp_path, monkeypatch, capsys, end, said):
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path[:0] = {[str(SCRIPT.parent), str(Path(__file__).parent)]!r}\n"
        f"import gpu_steps, test_gpu_check; test_gpu_check.broken(gpu_steps.Steps(True, 'cpu', 1e12), {end!r})\n"
    )
    monkeypatch.setattr(gpu_check, "STEPS", child)
    rows, start = [], time.monotonic()
    seconds = -28.0 if end == "hangs" else 60.0  # a hanging group gets 30 seconds more than it was given
    for row in gpu_check.run_group("nano", [], seconds, tmp_path / "log"):
        rows.append(row)
    assert [(row["name"], row["state"]) for row in rows] in (
        [("wrong", "FAIL"), ("right", "PASS"), ("last", "FAIL")],
        [("start", "FAIL")],  # a slow machine: not even started
    )
    assert said in rows[-1]["error"] and time.monotonic() - start < 55


def test_unknown_groups_are_named(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--groups", "nano,other"])
    assert end.value.code == 2 and "unknown groups: other" in capsys.readouterr().err
