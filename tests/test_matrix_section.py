"""A sequence of tasks on the page: R with intervals, its curves and metrics, true to the records."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_runs import make_run, make_sequence
from test_report import Tags

from robot_forgetting.metrics.sequence import sequence_metrics
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report.page import read_tables, write_report

TASKS = ["stack_cube", "lift_peg", "poke_cube"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        make_sequence(folder / f"sft{seed}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    path = write_report([runs], runs / "report.html")
    return path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_matrix_is_what_the_episodes_say(runs):
    rows = read_tables([runs / "sft0"])["matrix"]
    assert len(rows) == 2 * 4 * 5  # decodes, stages with the base, tasks
    episodes = RunFolder(runs / "sft0").episodes()
    for row in rows:
        keys = ("stage", "task", "decode")
        won = [one["success"] for one in episodes if all(one[key] == row[key] for key in keys)]
        assert (row["n"], row["rate"]) == (40, pytest.approx(np.mean(won)))
        assert (row["low"], row["high"]) == pytest.approx(wilson(sum(won), len(won)))
        assert row["learned"] == (TASKS[row["stage"] - 1] if row["stage"] else None)
    roles = {row["task"]: row["role"] for row in rows}  # whatever a task was called in a stage
    assert roles == dict.fromkeys(TASKS, "new") | {"pick_cube": "prior", "place_sphere": "held_out"}


def test_runs_are_averaged_and_their_metrics_too(runs, page):
    _, report = page
    single = [read_tables([runs / f"sft{seed}"]) for seed in (0, 1)]
    for row, *own in zip(report["matrix"], *(tables["matrix"] for tables in single), strict=True):
        assert row["rate"] == pytest.approx(np.mean([one["rate"] for one in own]))
        assert (row["runs"], row["n"]) == (2, 80) and row["low"] <= row["rate"] <= row["high"]
    cells = {(row["stage"], row["task"]): row["rate"] for row in single[0]["matrix"] if row["decode"] == "sampled"}
    R = [[cells[stage, task] for task in TASKS] for stage in range(4)]
    found = {row["metric"]: row["value"] for row in single[0]["sequence"] if row["decode"] == "sampled"}
    expected = {name: value for name, value in sequence_metrics(R[0], R[1:]).items() if isinstance(value, float)}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    bwt = next(row for row in report["sequence"] if (row["metric"], row["decode"]) == ("bwt", "sampled"))
    assert bwt["runs"] == 2 and bwt["least"] <= bwt["value"] <= bwt["largest"]


def test_the_page_shows_it(page):
    html, report = page
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids))
    assert 'id="s0-matrix">After every stage' in html
    assert html.count('class="heat own"') == 2 * 3  # each stage's own task, at two decodes
    assert "mean of R[T,j] - R[j,j], j &lt; T (GEM)" in html
    assert {row["task"] for row in report["forgetting"]} == {"pick_cube", "place_sphere"}
    assert [(row["stage"], row["iteration"]) for row in report["curves"][:12]] == [
        (stage, i) for stage in (1, 2, 3) for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_stage_that_is_not_done_is_left_out(tmp_path, evaluated):
    folder = make_sequence(tmp_path / "sft", n=4)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"status": "failed", "stage": 3}))
    if not evaluated:  # it was stopped before anything of stage 3 was
        rows = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
        (folder / "episodes.jsonl").write_text("".join(row for row in rows if json.loads(row)["stage"] < 3))
    (folder / "summary.json").unlink()
    tables = read_tables([folder])
    assert {row["stage"] for row in tables["matrix"]} == {0, 1, 2} and tables["sequence"] == []


def test_one_task_has_no_matrix(tmp_path):
    path = write_report([make_run(tmp_path / "a", n=4)], tmp_path / "r.html")
    assert json.loads(path.with_suffix(".json").read_text())["matrix"] == []
    assert "After every stage" not in path.read_text()
