"""The page of a controlled study: numbers true to the run folders, and a clear line where one cannot be had."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fake_runs import make_run as make_robot_run
from fake_study import METHODS, fail_run, forgetting, make_run, make_study
from test_report import Tags

from robot_forgetting import studies
from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import find_runs
from robot_forgetting.report import figures
from robot_forgetting.report.page import read_tables, rows_of
from robot_forgetting.studies.digits import study_figures, study_words
from robot_forgetting.studies.digits.study_extras import Theorem, theorem_rows
from robot_forgetting.studies.digits.study_law import verdict
from robot_forgetting.studies.digits.study_matched import common_level, level_rows, matched_rows
from robot_forgetting.studies.digits.study_page import SECTIONS
from robot_forgetting.studies.digits.study_provenance import command
from robot_forgetting.studies.digits.study_runs import Study, load_study
from robot_forgetting.studies.digits.study_sections import StudyPart


def tables_of(folder):
    study = load_study(find_runs([folder]))
    return study, rows_of(study, SECTIONS)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_study(
        tmp_path_factory.mktemp("runs") / "study",
        methods=("grpo", "sft_1", "reinforce_1_0", "simpo", "sft_teacher"),
        checkpoints=2,
        noise=0.02,
    )
    fail_run(folder, "grpo", 0.01)
    path = studies.write_report([folder], tmp_path_factory.mktemp("out"))
    return path, path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_page_is_self_contained_and_its_tags_close(page):
    _, html, _ = page
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids))
    assert all(address.startswith(("#", "http://www.w3.org")) for address in tags.addresses), tags.addresses
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.S))
    assert not re.search(r"\b(nan|inf|None|undefined)\b", text), re.search(r".{40}\b(nan|inf|None)\b.{40}", text)


@pytest.mark.parametrize(
    "name", ["fronts", "law", "law_all", "predictors", "two_by_two", "similarity", "teacher", "dynamics", "precision"]
)
def test_figures_are_files_and_in_the_page(page, name):
    path, html, _ = page
    assert f"figures/{name}.svg" in html
    svg = (path.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert "<text" in svg and "currentColor" not in svg and "var(--" not in svg and "dc:date" not in svg
    caption = re.search(rf"<figcaption>([^<]*) <span class=\"path\">figures/{name}.svg", html).group(1)
    assert re.search(r"n = \d+|at least \d+", caption) and "seed" in caption
    pdf = (path.parent / "figures" / f"{name}.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf


def test_report_json_carries_the_tables_of_the_design(page):
    _, _, report = page
    row = next(r for r in report["predictors"] if (r["predictor"], r["inputs"]) == ("forward_kl", "new"))
    assert {"predictor", "inputs", "r2", "low", "high", "n", "left_out_r2"} <= set(row)
    assert row["low"] <= row["r2"] <= row["high"] and row["n"] == 2 * 3 * 2  # of the paper's five, two are there
    assert row["paper"]["r2"] == 0.96 and row["replication"]["r2"] == 0.94
    assert {r["method"] for r in report["fronts"]} == {"grpo", "sft_1", "reinforce_1_0", "simpo", "sft_teacher"}
    assert {"success", "divergence", "checkpoints", "matched", "two_by_two", "dynamics", "theorem"} <= set(report)
    (left,) = report["left_out"]
    assert "diverged: the loss is not finite" in left["why"]


def test_page_says_what_diverged_and_how_to_do_it_again(page):
    _, html, report = page
    assert "grpo-lr1.00e-02-constant-epochs1-seed0</span>: diverged" in html
    assert report["command"].startswith("robot-forgetting reproduce parity_mnist 'reproduce.methods=[")
    assert f"<code>{report['command']}</code>".replace("'", "&#39;") in html
    assert "One seed" in html


def test_numbers_are_those_of_the_run_folders(tmp_path):
    folder = make_run(tmp_path, "grpo", 1e-4, checkpoints=2, noise=0.0)
    rows = json.loads((folder / "summary.json").read_text())
    study = load_study(find_runs([tmp_path]))
    base = next(r["rate"] for r in rows["success"] if (r["stage"], r["role"]) == (0, "prior"))
    last = next(r["rate"] for r in rows["success"] if (r["iteration"], r["role"]) == (200, "prior"))
    kl = next(
        r["value"]
        for r in rows["divergence"]
        if (r["iteration"], r["measure"], r["role"]) == (200, "forward_kl", "new")
    )
    point = study.points[-1]
    assert point["final"] and point["forgetting"] == pytest.approx(base - last)
    assert point["predictors"]["forward_kl|new"] == kl
    assert base - last == pytest.approx(forgetting(kl), abs=2e-4)  # accuracies are rounded to 1e-4


def test_law_is_found_again(tmp_path):
    make_study(tmp_path, methods=("grpo", "sft_1", "sft_oracle"), noise=0.0, extras=False)
    study, tables = tables_of(tmp_path)
    row = next(r for r in tables["predictors"] if (r["predictor"], r["inputs"]) == ("forward_kl", "new"))
    assert row["coefficients"] == pytest.approx([0, 0.12, -0.008], abs=1e-3)
    assert row["r2"] > 0.9999 and row["paper_verdict"] == "higher"
    lines = study_words.disagreements(study.laws["paper"])
    assert (
        "Forward KL on new-task inputs: 1.00 [1.00, 1.00] here, 0.96 in the paper, 0.94 in the replication; our "
        in lines[0]
    )
    assert {r["held_out"] for r in tables["leave_one_method_out"]} == {"grpo", "sft_1", "sft_oracle"}
    assert [(r["from"], r["to"]) for r in tables["transfer"]] == [("SFT", "RL"), ("RL", "SFT")]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((0.9, 0.8, 0.95), 0.8, "agrees"),
        ((0.9, 0.8, 0.95), 0.79, "higher"),
        ((0.9, 0.8, 0.95), 0.96, "lower"),
        ((0.9, None, None), 0.5, "open"),
        ((None, None, None), 0.5, "open"),
        ((0.9, 0.8, 0.95), None, ""),
    ],
)
def test_verdict(ours, theirs, expected):
    row = dict(zip(("r2", "low", "high"), ours, strict=True))
    assert verdict(row, {"r2": theirs, "error": None}) == expected


def hand_made(**curves) -> Study:
    """A study with one run per method from (new, prior, KL) points; the base is at (0.8, 0.9)."""
    shared = {"seed": 0, "final": False, "base_new": 0.8, "base_prior": 0.9, "setting": ""}
    points = [
        {**shared, "run": f"{name}-run", "method": name, "iteration": i, "new": new, "prior": prior}
        | {"forgetting": 0.9 - prior, "predictors": {"forward_kl|new": kl, "cka|prior": 1 - kl / 10}}
        for name, curve in curves.items()
        for i, (new, prior, kl) in enumerate(curve)
    ]
    return Study("parity_mnist", points=points)


def test_matched_success_by_hand():
    study = hand_made(
        grpo=[(0.85, 0.80, 0.2), (0.95, 0.70, 1.0)],
        sft_1=[(0.90, 0.60, 3.0), (0.909, 0.58, 3.5), (0.97, 0.40, 6.0)],
        simpo=[(0.82, 0.7, 1.0)],
    )
    assert common_level(study, ["grpo", "sft_1"]) == 0.95
    assert common_level(study, ["grpo", "simpo"]) == 0.82
    assert common_level(study, ["grpo", "ppo"]) is None
    grpo, sft, simpo = matched_rows(study, ["grpo", "sft_1", "simpo"], 0.90)
    assert grpo["prior"] == pytest.approx(0.75) and grpo["forward_kl"] == pytest.approx(0.6)
    assert sft["prior"] == pytest.approx(0.60) and sft["forward_kl"] == pytest.approx(3.0)
    assert sft["near"] == 2 and sft["similarity"]["cka|prior"]["mean"] == pytest.approx(1 - 0.325)
    assert grpo["low"] is None and "3 runs" in grpo["note"]
    assert simpo["prior"] is None and simpo["note"] == "reaches 82.0 % only"
    levels = {(row["method"], row["level"]): row["prior"] for row in level_rows(study, ["grpo", "sft_1"])}
    assert levels[("grpo", 0.95)] == pytest.approx(0.70) and ("grpo", 0.96) not in levels


def test_matched_interval_over_equal_runs_has_no_width():
    study = hand_made(grpo=[(0.85, 0.80, 0.2), (0.95, 0.70, 1.0)])
    study.points = [{**point, "run": f"run{i}"} for i in range(4) for point in study.points]
    (row,) = matched_rows(study, ["grpo"], 0.90)
    assert (row["low"], row["high"]) == pytest.approx((0.75, 0.75))
    assert (row["kl_low"], row["kl_high"]) == pytest.approx((0.6, 0.6))


def test_theorem_says_who_arrives(tmp_path):
    make_study(tmp_path, methods=("grpo",))
    found = {row["process"]: row["arrives"] for row in theorem_rows(load_study(find_runs([tmp_path])))}
    assert found["expectation_maximisation"] and found["natural_policy_gradient"] and found["sft_oracle"]
    assert not found["policy_gradient_plain"] and not found["sft_one_label"]


def test_what_cannot_be_used_is_named(tmp_path):
    make_study(tmp_path / "study", methods=("grpo", "sft_1"), extras=False)
    make_run(tmp_path / "copy", "grpo", 1e-4)
    make_run(tmp_path / "study", "sft_oracle", 1e-4, broken=True)
    make_run(tmp_path / "other", "sft_oracle", 1e-3, config={"batch_size": 32})
    make_robot_run(tmp_path / "robot", n=4)
    fail_run(tmp_path / "study", "grpo", 0.1, diverged=False)
    study, tables = tables_of(tmp_path)
    why = {row["run"]: row["why"] for row in study.left_out}
    assert why["grpo-lr1.00e-04-constant-epochs1-seed0"].startswith("the same run as")
    assert why["sft_oracle-lr1.00e-04-constant-epochs1-seed0"] == "no finite policy at 1 checkpoint (step 300)"
    assert why["grpo-lr1.00e-01-constant-epochs1-seed0"] == "the loss is not finite at iteration 12"
    notes = " ".join(study.notes)
    assert "1 run folder is of no study and left out: robot" in notes
    assert "1 run with other settings (batch_size: 64, now 32) left out: sft_oracle-lr1.00e-03" in notes
    assert len(study.points) == 2 * 3 * 3 + 2
    assert all(np.isfinite(point["forgetting"]) for point in tables["checkpoints"])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: make_run(folder, "grpo", 1e-4, checkpoints=1), "No fit: too few points for a fit: 1, needs 4"),
        (lambda folder: make_run(folder, "grpo", 1e-4, checkpoints=4), "no interval: 1 run, needs 3"),
        (lambda folder: fail_run(folder, "grpo", 1e-4), "No fit: no finished run of the sweep"),
    ],
)
def test_too_few_runs_leave_a_line_in_place_of_a_number(tmp_path, make, line):
    make(tmp_path / "study")
    html = studies.write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert line in html
    assert "Needs runs of" in html and "The theorem was not checked" in html


def test_missing_predictor_is_said(tmp_path):
    for rate in (1e-5, 1e-4, 1e-3):
        file = make_run(tmp_path, "grpo", rate) / "summary.json"
        summary = json.loads(file.read_text())
        summary["divergence"] = [row for row in summary["divergence"] if row["measure"] != "forward_kl"]
        file.write_text(json.dumps(summary))
    study, tables = tables_of(tmp_path)
    assert not any(row["predictor"] == "forward_kl" for row in tables["predictors"])
    assert tables["leave_one_method_out"] == [] and tables["residuals"] == []
    lines = study_words.headline(tables, study)
    assert "There is no fit of forgetting on forward KL: forward KL was not recorded." in lines


def test_measured_at_the_end_only_is_no_failure(tmp_path):
    for rate in (1e-5, 1e-4, 1e-3):
        for method in ("grpo", "sft_1"):
            file = make_run(tmp_path, method, rate) / "summary.json"
            summary = json.loads(file.read_text())
            summary["divergence"] = [
                row for row in summary["divergence"] if row["measure"] != "weight_l1" or row["iteration"] == 300
            ]
            file.write_text(json.dumps(summary))
    row = next(r for r in tables_of(tmp_path)[1]["predictors"] if r["predictor"] == "weight_l1")
    assert row["n"] == 6 and row["note"] == "measured at 6 checkpoints only"


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="holds no run folder"):
        studies.write_report([tmp_path], tmp_path / "r.html")
    make_robot_run(tmp_path / "robot", n=4)
    with pytest.raises(UserError, match="run of a study; run `robot-forgetting reproduce"):
        load_study(find_runs([tmp_path]))


GRID = {"rates": [float(f"{r:.6g}") for r in np.geomspace(3e-6, 1e-3, 15)], "schedules": ["constant", "cosine"]}


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({}, {}, ""),
        ({}, {"seed": [3]}, " seed=3"),
        ({"batch_size": 32}, {}, " reproduce.batch_size=32"),
        ({}, {"learning_rate": [1e-4]}, " 'reproduce.rates=[0.0001]'"),
        (
            {"checkpoints": 5, "probe": {"images": 1000, "similarity": 300}},
            {
                "learning_rate": [float(f"{r:.6g}") for r in np.geomspace(3e-6, 1e-3, 6)],
                "schedule": ["constant"],
                "epochs": [1],
            },
            " quick=true",
        ),
    ],
)
def test_command_says_what_differs_from_the_shipped_configuration(config, asked, expected):
    study = Study("parity_mnist", config={"study": "parity_mnist", **config})
    full = {"method": ["grpo", "grpo_kl", "sft_1", "sft_2", "sft_oracle"], "learning_rate": GRID["rates"]}
    full |= {"schedule": GRID["schedules"], "epochs": [1, 2], "seed": [0]} | asked
    rows = [{}]
    for key, values in full.items():
        rows = [{**row, key: value} for row in rows for value in values]
    study.asked = rows
    assert command(study) == "robot-forgetting reproduce parity_mnist" + expected


def test_robot_runs_get_the_law_too(tmp_path):
    for method in ("sft", "reinforce"):
        for seed in range(3):
            make_robot_run(tmp_path / f"{method}{seed}", method=method, seed=seed, n=20, evaluate_every=2)
    rows = read_tables([tmp_path])["predictors"]
    of = {r["states"]: r for r in rows if (r["predictor"], r["inputs"]) == ("forward_kl", "new")}
    every, last = of["base"], of["demonstrations"]  # measured at every checkpoint, and at the last one only
    assert (every["unit"], every["n"], every["runs"], every["over"]) == ("nats/token", 30, 6, "seeds and runs")
    assert every["low"] <= every["r2"] <= every["high"] and every["left_out_r2"] < every["r2"]
    assert last["n"] == 6 and last["left_out_r2"] is None
    assert last["note"] == "cannot leave reinforce out: too few points for a fit: 3, needs 4"


def test_robot_page_says_why_there_is_no_law(tmp_path):
    make_robot_run(tmp_path / "a", n=6, iterations=2, evaluate_every=2)
    html = studies.write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.search(r"No law of forgetting over distance: too few points for a fit: \d, needs 4", html)


def test_styles_are_distinct_and_cover_the_methods():
    assert set(study_figures.STYLES) == set(METHODS)
    looks = [(colour, marker) for colour, marker, _ in study_figures.STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert len({marker for _, marker in looks}) == len(looks)  # told apart in grey, too


def test_same_rows_give_the_same_files():
    rows = [{"process": "sft_oracle", "iteration": i, "distance": 10.0**-i} for i in range(5)]
    made = []
    for _ in range(2):
        with figures.drawing():
            figure = Theorem().figure(StudyPart("", (), {}, None, study=Study("parity_mnist", theorem=rows)))
            made.append((figures.svg(figure, "theorem", "t"), figures.pdf(figure)))
    assert made[0] == made[1]
    assert figures.on_paper(made[0][0]).count("<svg") == 1
