"""Tries everything that needs a GPU, in at most twelve minutes, without a network: `python scripts/gpu_check.py`.

Needs this project installed, and nothing else: small policies that come with it, and OpenVLA-7B at full size with
random weights. Every step is written to gpu_check.json as soon as it ends; a step that fails, hangs or takes its
process along is a FAIL in the table and does not stop the others; what the steps say besides is in gpu_check.log.
`--dry` runs the same steps at nano size on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_steps import MARK

STEPS = Path(__file__).resolve().with_name("gpu_steps.py")
SECONDS = 720
# Group: the most that it may take. Each runs in a process of its own, since a CUDA error poisons the one it occurs in.
GROUPS = {"machine": 90, "nano": 260, "openvla_7b": 400, "simulator": 240}


def run_group(name: str, arguments: list[str], seconds: float, log: Path) -> Iterator[dict]:
    """The rows of a group's steps as they end; a process that dies or hangs is the FAIL of the step it was at.

    log: what the process says besides
    """
    command = [sys.executable, str(STEPS), name, "--seconds", str(seconds), *arguments]
    at, until = "start", time.monotonic() + seconds + 30
    # Its own session, so that a step's children end with it.
    with log.open("ab") as said:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, cwd=STEPS.parent.parent, start_new_session=True
        )
    try:
        for line in lines(child.stdout, until):
            row = json.loads(line)
            if "start" in row:
                at = row["start"]
            else:
                at = None
                yield {"group": name, **row}
        code = child.wait(timeout=max(1.0, until - time.monotonic()))
        if code and at is not None:
            yield {"group": name, "name": at, "state": "FAIL", "error": f"the process ended with code {code}"}
    except (TimeoutError, subprocess.TimeoutExpired):
        yield {"group": name, "name": at or "end", "state": "FAIL", "error": f"not done after {seconds:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def lines(pipe, until: float) -> Iterator[str]:
    """What follows ``MARK``; TimeoutError once ``until`` has passed."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(pipe.fileno(), 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                yield text[len(MARK) :]


def shown(row: dict) -> str:
    """A line of the table."""
    detail = row["error"] or ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in (row.get("numbers") or {}).items()
    )
    return f"{row['state']:4}  {row['group']:10}  {row['name']:44}  {row.get('seconds', 0):7.1f} s  {detail}"


@dataclasses.dataclass(frozen=True)
class Options:
    dry: bool
    device: str
    output: Path
    groups: list[str]
    seconds: float


def check(options: Options) -> int:
    """Runs the groups; 0 where nothing failed, 1 otherwise."""
    started, rows, log = time.monotonic(), [], options.output.with_suffix(".log")
    log.unlink(missing_ok=True)
    for name in options.groups:
        left = options.seconds - (time.monotonic() - started)
        arguments = ["--device", options.device, *(["--dry"] if options.dry else [])]
        for row in run_group(name, arguments, max(1.0, min(GROUPS[name], left)), log):
            rows.append(row)
            print(shown(row), flush=True)
            part = options.output.with_suffix(".part")
            part.write_text(json.dumps({"dry": options.dry, "device": options.device, "steps": rows}, indent=1) + "\n")
            part.replace(options.output)
    counts = {state: sum(row["state"] == state for row in rows) for state in ("PASS", "FAIL", "SKIP")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"{said}, in {time.monotonic() - started:.0f} s; {options.output}, {log}")
    return 1 if counts["FAIL"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="nano sizes on a CPU")
    parser.add_argument("--device", default=None, help="cuda:0; with --dry: cpu")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    given = parser.parse_args(arguments)
    device = given.device or ("cpu" if given.dry else "cuda:0")
    groups = given.groups.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser.error(f"unknown groups: {', '.join(unknown)}; choose among {', '.join(GROUPS)}")
    return check(Options(given.dry, device, given.output, groups, given.seconds))


if __name__ == "__main__":
    sys.exit(main())
