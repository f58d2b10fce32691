"""Drift by layer on the page: the records' numbers, a figure, and its part in the law of forgetting."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_runs import make_run
from test_report import Tags

from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.metrics.pareto import quadratic_fit
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report import write_report
from robot_forgetting.report.layer_section import _line
from robot_forgetting.report.page import read_tables
from robot_forgetting.report.words import too_few

BLOCKS = 4
RUNS = {("sft", 0): 0.10, ("sft", 1): 0.12, ("sft", 2): 0.17, ("grpo", 0): 0.02}


def drift_rows(iteration: int, depth: float) -> list[dict]:
    """Made-up rows: a loss of CKNNA of depth x layer, weights that move by depth / 10 in every block."""
    rows = []
    head = {"stage": 1, "iteration": iteration, "unit": "1", "standard_error": None}
    for layer in range(BLOCKS + 1):
        similar = {"cknna_intersection": 1 - depth * layer, "cknna_union": 1 - depth * layer / 2}
        similar |= {"cka_debiased": 1 - depth * layer / 3, "activation_l2_relative": depth * layer}
        for name, value in similar.items():
            where = {"task": "hellaswag", "role": TEXT, "states": TEXT, "measure": name, "n": 200, "layer": layer}
            rows.append({**head, **where, "value": value})
    for layer in (*range(BLOCKS + 1), None):
        value = 0.0 if layer == 0 else depth / 10 if layer else depth / 11
        where = {"task": None, "role": None, "states": WEIGHTS, "measure": "weight_l2_relative", "n": None}
        rows.append({**head, **where, "layer": layer, "value": value})
    return rows


def make(root, runs=RUNS, iterations=(5, 10)):
    for (method, seed), depth in runs.items():
        folder = make_run(root / f"{method}{seed}", method=method, seed=seed, n=12, evaluate_every=5)
        with (folder / "divergence.jsonl").open("a") as file:
            for iteration in iterations:
                for row in drift_rows(iteration, depth * iteration / 10):
                    file.write(json.dumps(row) + "\n")
    return root


def written(root) -> tuple[str, dict]:
    path = write_report([root], root / "report.html")
    return path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(make(tmp_path_factory.mktemp("runs")))


def test_layers_are_means_of_final_policies(page):
    _, report = page
    found = {(row["method"], row["measure"], row["layer"]): row for row in report["layers"]}
    assert len(found) == len(report["layers"]) == 2 * 5 * (BLOCKS + 2)
    row = found["sft", "cknna_intersection", 3]
    assert (row["value"], row["least"], row["largest"]) == pytest.approx((1 - 0.39, 1 - 0.51, 1 - 0.3))
    assert (row["runs"], row["n"], row["texts"]) == (3, 200, "hellaswag")
    assert found["sft", "cknna_intersection", None]["value"] == pytest.approx(1 - 0.13 * 2.5)  # blocks 1 to 4
    assert found["grpo", "activation_l2_relative", None]["value"] == pytest.approx(0.05)
    assert found["grpo", "weight_l2_relative", None]["value"] == pytest.approx(0.02 / 11)  # all weights, as recorded
    assert found["grpo", "weight_l2_relative", 0]["value"] == 0


def test_other_tables_do_not_mix_them_in(page):
    _, report = page
    assert {row["states"] for row in report["divergence"]} == {"base", "fine_tuned", "demonstrations"}


def test_they_are_predictors_of_forgetting(page):
    _, report = page
    rows = {(row["predictor"], row["inputs"]): row for row in report["predictors"]}
    for measure, inputs in (("cknna_intersection", "text"), ("cka_debiased", "text"), ("weight_l2_relative", "")):
        row = rows[measure, inputs]
        points = [point for point in report["checkpoints"] if point["forgetting"] is not None]
        key = next(key for key in points[0]["divergence"] if key.startswith(f"{measure}|"))
        fit = quadratic_fit([p["divergence"][key] for p in points], [p["forgetting"] for p in points])
        assert (row["r2"], row["n"], row["runs"]) == (pytest.approx(fit.r2), 8, 4)
    (last,) = [p for p in report["checkpoints"] if (p["run"], p["iteration"]) == ("sft1", 10)]
    assert last["divergence"]["cknna_intersection|1|text|text"] == pytest.approx(1 - 0.12 * 2.5)
    assert last["divergence"]["weight_l2_relative|1||weights"] == pytest.approx(0.12 / 11)


def test_the_page_shows_them(page):
    html, _ = page
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids))
    assert html.count("Drift by layer</h3>") == 1 and 'aria-label="CKNNA and change of weights by layer"' in html
    table = html[html.index("Drift of the model as a whole") :].split("</table>")[0]
    sft = table[table.index("sft") :].split("</tr>")[0]
    assert "0.675" in sft and "[0.575, 0.750]" in sft and "0.0118" in sft  # 1 - 0.13 x 2.5; 0.13 / 11
    assert "200 texts of hellaswag" in table
    predictors = html[html.index("How much of the variation") :].split("</table>")[0]
    assert "CKNNA (mask as published)</th><td>held-out text</td>" in predictors
    assert "change of weights</th><td></td><td>weights</td>" in predictors
    assert html.count("Too few for a law: 8 checkpoints of 4 runs at most, where 10 of 3 are the least") == 1
    assert "a CKNNA of 0.94 for grpo, 0.56 for sft" in html


def test_a_line_of_several_settings_covers_all_runs(tmp_path):
    make(tmp_path)
    for seed, rate in enumerate((1, 2, 3)):
        config = tmp_path / f"sft{seed}" / "config.yaml"
        config.write_text(config.read_text().replace("1.0e-05", f"{rate}.0e-05"))
    html, report = written(tmp_path)
    mine = [row for row in report["layers"] if (row["measure"], row["layer"]) == ("cknna_intersection", 2)]
    assert sorted(row["value"] for row in mine if row["method"] == "sft") == pytest.approx([0.66, 0.76, 0.8])
    lines = _line([row for row in report["layers"] if (row["measure"], row["method"]) == ("cknna_intersection", "sft")
                   and row["layer"] is not None])  # fmt: skip
    assert lines[0] == list(range(BLOCKS + 1))
    assert np.array(lines[1:])[:, 2].tolist() == pytest.approx([1 - 0.26, 0.66, 0.8])
    assert html.count("Drift by layer</h3>") == 1


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        ([], ""),
        ([(9, 3), (10, 3)], ""),
        ([(40, 2), (9, 9)], "40 checkpoints of 2 runs at most"),
        ([(5, 1)], "5 checkpoints of 1 run at most"),
    ],
)
def test_fits_over_few_points_are_named_as_such(fits, said):
    text = too_few([{"n": n, "runs": runs} for n, runs in fits])
    assert said in text and bool(said) == bool(text)


def test_without_such_rows_there_is_nothing(tmp_path):
    make_run(tmp_path / "a", n=6)
    html, report = written(tmp_path)
    assert report["layers"] == [] and "Drift by layer" not in html and "CKNNA" not in html


def test_a_missing_value_is_left_out(tmp_path):
    make(tmp_path, {("sft", 0): 0.1})
    file = tmp_path / "sft0" / "divergence.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if (row.get("layer"), row["states"]) == (2, WEIGHTS):
            row["value"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = read_tables([tmp_path])
    layers = [row["layer"] for row in report["layers"] if row["measure"] == "weight_l2_relative"]
    assert layers == [0, 1, 3, 4, None]


def test_too_few_checkpoints_have_no_law_and_one_line_says_so(tmp_path):
    make(tmp_path, {("sft", 0): 0.1, ("grpo", 0): 0.02}, iterations=(10,))
    for folder in tmp_path.iterdir():
        file = folder / "episodes.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["iteration"] != 5))
    html, report = written(tmp_path)
    assert html.count("No law of forgetting over distance: too few points for a fit: 2, needs 4.") == 1
    assert "How much of the variation" not in html
    assert {row["r2"] for row in report["predictors"]} == {None}
    assert {row["predictor"] for row in report["predictors"]} >= {"forward_kl", "cknna_union", "weight_l2_relative"}
    assert RunFolder(tmp_path / "sft0").finished
