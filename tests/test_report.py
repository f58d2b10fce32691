"""The page: self-contained, true to the records, and never at a loss for a part that is missing."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_runs import make_run

from robot_forgetting.cli import main
from robot_forgetting.errors import UserError
from robot_forgetting.metrics.statistics import crossed_mean, paired_difference, wilson
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report import write_report
from robot_forgetting.report.page import read_tables
from robot_forgetting.report.reading import reading
from robot_forgetting.report.runs import BASE
from robot_forgetting.report.tables import PRIOR_MEAN

FEW = 20  # episodes per task


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """SFT with videos, REINFORCE, and three shipped seeds of each of two methods."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "stack_cube-sft-seed0", method="sft", n=FEW, videos=True)
    make_run(folder / "stack_cube-reinforce-seed0", method="reinforce", n=FEW)
    for method in ("sft", "reinforce"):
        for seed in range(3):
            make_run(
                folder / f"shipped-{method}-{seed}",
                method=method,
                seed=seed,
                n=FEW,
                evaluate_every=5,
                shipped="the results table",
            )
    return folder


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory):
    path = write_report([demo], tmp_path_factory.mktemp("out") / "report.html")
    return path.read_text(encoding="utf-8"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


class Tags(HTMLParser):
    """Checks that tags close in order, and collects ids and addresses."""

    VOID = {"meta", "br", "wbr", "img", "link", "input", "line", "circle", "path", "use", "rect", "source"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href"):
                self.addresses.append(value)

    handle_startendtag = lambda self, tag, attrs: (self.handle_starttag(tag, attrs), self.handle_endtag(tag))  # noqa: E731

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(page):
    html, _ = page
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert all(address.startswith(("data:video/mp4;base64,", "#")) for address in tags.addresses)
    assert {address[1:] for address in tags.addresses if address.startswith("#")} <= set(tags.ids)
    for address in re.findall(r"https?://[^\"'\s<)]+", html):
        assert address.startswith(("http://www.w3.org/", "https://www.w3.org/"))  # names of SVG, not addresses
    assert len(html) < 15e6
    assert "<text" in html  # letters in figures are letters
    assert html.count("<video") == 10  # five tasks before and after


def test_success_of_one_run_is_its_episodes(demo, page):
    _, report = page
    episodes = RunFolder(demo / "stack_cube-sft-seed0").episodes()
    for row in report["success"]:
        if row["shipped"] or row["variant"] != "sft" or row["task"] == "prior mean":
            continue
        mine = [
            e["success"]
            for e in episodes
            if (e["task"], e["decode"], e["stage"], e["iteration"]) == (row["task"], row["decode"], 1, 10)
        ]
        assert (row["n"], row["rate"]) == (len(mine), pytest.approx(np.mean(mine)))
        assert (row["low"], row["high"]) == pytest.approx(wilson(sum(mine), len(mine)))


def test_forgetting_of_one_run_is_paired(demo, page):
    _, report = page
    summary = RunFolder(demo / "stack_cube-sft-seed0").summary()
    final = {(r["task"], r["decode"]): r for r in summary["forgetting"] if r["iteration"] == 10}
    rows = [r for r in report["forgetting"] if not r["shipped"] and r["variant"] == "sft" and r["task"] != "prior mean"]
    assert {row["task"] for row in rows} == {"pick_cube", "push_cube", "pull_cube", "place_sphere"}
    for row in rows:
        expected = final[row["task"], row["decode"]]
        for key in ("n", "base", "fine_tuned", "forgetting", "low", "high", "retention"):
            assert row[key] == pytest.approx(expected[key]), key


def test_three_seeds_are_averaged_over_runs_and_states(demo, page):
    _, report = page
    (row,) = (
        r
        for r in report["forgetting"]
        if (bool(r["shipped"]), r["variant"], r["task"], r["decode"]) == (True, "reinforce", "pick_cube", "sampled")
    )
    matrix, singles = [], []
    for seed in range(3):
        outcomes = {0: {}, 1: {}}
        for e in RunFolder(demo / f"shipped-reinforce-{seed}").episodes():
            if (e["task"], e["decode"]) == ("pick_cube", "sampled") and e["iteration"] in (0, 10):
                outcomes[e["stage"]][e["seed"]] = e["success"]
        pair = paired_difference(list(outcomes[0].values()), list(outcomes[1].values()))
        singles.append((pair.difference, pair.low, pair.high))
        matrix.append([outcomes[0][s] - outcomes[1][s] for s in sorted(outcomes[0])])
    assert (row["forgetting"], row["low"], row["high"]) == pytest.approx(crossed_mean([np.array(matrix)], singles))
    assert (row["runs"], row["n"], len(row["per_run"])) == (3, 3 * FEW, 3)


def test_shipped_numbers_are_marked_and_never_mixed_in(page):
    html, report = page
    for table in ("success", "forgetting", "divergence", "checkpoints", "fronts", "matched", "predictors", "curves"):
        assert {row["shipped"] for row in report[table]} == {None, "the results table"}, table
    assert "source: the results table" in html
    assert "shipped results" in html
    measured = [row for row in report["success"] if row["shipped"] is None]
    assert {row["runs"] for row in measured} == {1}


def test_tables_of_the_design_are_there(page):
    _, report = page
    assert report["schema_version"] == 1
    best = next(r for r in report["predictors"] if r["predictor"] == "forward_kl" and r["shipped"])
    assert {"predictor", "inputs", "r2", "low", "high", "n"} <= set(best)
    assert 0 <= best["low"] <= best["r2"] <= best["high"] <= 1
    left_out = [row for row in report["leave_one_method_out"] if row["shipped"]]
    assert {row["held_out"] for row in left_out} == {"sft", "reinforce"}
    for row in left_out:
        assert (row["predictor"], row["inputs"], row["tested_on"]) == ("forward_kl", "new", [row["held_out"]])
        if row["states"] == "base":
            assert row["r2"] is not None and row["n"] > 0, row
        else:  # the fine-tuned policy's own states: one checkpoint a run
            assert row["r2"] is None and row["note"].endswith("too few points for a fit: 3, needs 4"), row
    assert all(row["front"] for row in report["fronts"])
    assert {row["over"] for row in report["matched"] if row["level"]} == {
        "initial states only",
        "initial states and runs",
    }
    for row in report["matched"]:
        assert row["level"] is None or row["low"] <= row["difference"] <= row["high"]


def test_reading_claims_no_more_than_the_intervals(page):
    html, report = page
    lead = " ".join(re.findall(r'<p class="lead">(.*?)</p>', html, re.S))
    for row in report["forgetting"]:
        if row["shipped"] is None and row["task"] == "prior mean" and row["decode"] == "sampled":
            after = lead[lead.index(f"After {row['variant']} ") :].split("After ")[1]
            assert ("It forgot" in after) == (row["low"] > 0)
            assert ("cannot be told from none" in after) == (row["low"] <= 0 <= row["high"])
    assert "does not cover other training seeds" in lead


def test_the_lead_names_what_only_the_greedy_decode_lost_and_a_training_that_went_down(tmp_path):
    folder = make_run(tmp_path / "a", method="grpo", n=30, iterations=8)

    def rewrite(table: str, change) -> None:
        rows = [json.loads(line) for line in (folder / table).read_text().splitlines()]
        (folder / table).write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))

    def outcome(row: dict) -> dict:  # one prior task is lost at the greedy decode, nothing else is
        lost = (row["stage"], row["task"], row["decode"]) == (1, "pick_cube", "greedy") and row["episode"] < 12
        return {"success": not lost, "error": None}

    def rollouts(row: dict) -> dict:
        return {"rollout_success": 0.45 - 0.2 * row["iteration"] / 8, "episodes": 400} if "episodes" in row else {}

    rewrite("episodes.jsonl", outcome)
    rewrite("train.jsonl", rollouts)
    html = write_report([tmp_path], tmp_path / "r.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    lead = " ".join(re.findall(r'<p class="lead">(.*?)</p>', html, re.S))
    assert "+7], cannot be told from none. Of 9 further comparisons (tasks, their mean, decodes) 2 show" in lead
    assert re.search(r"2 show forgetting: pick_cube \(greedy\) 40 points \[\+\d+, \+\d+\], prior mean \(greedy\)", lead)
    assert "by chance one in 40 would. Rollout success fell during training, from 41 % in the first quarter" in lead


@pytest.mark.parametrize(
    ("first", "last", "episodes", "said"),
    [(0.45, 0.25, 400, True), (0.45, 0.25, 8, False), (0.45, 0.44, 400, False), (0.25, 0.45, 400, False),
     (0.45, 0.25, None, True)],
)  # fmt: skip
def test_a_training_that_fell_is_more_than_noise(first, last, episodes, said):
    names = {"variant": "grpo", "method": "grpo", "task": "t", "role": "new", "decode": "greedy"}
    success = [{**names, "rate": 0.5, "n": 9, "runs": 2, "low": 0.2, "high": 0.8}]
    curves = [
        {"variant": "grpo", "run": run, "iteration": i, "success": rate, "episodes": episodes}
        for run, end in (("a", last), ("b", 0.46))
        for i, rate in enumerate([first, 0.45, 0.45, end])
    ]
    text = " ".join(reading("p", "t", success, [], [], None, curves)).replace("\N{NO-BREAK SPACE}", " ")
    assert ("In 1 of 2 runs rollout success fell during training, from 45 % in the first" in text) == said
    assert "After grpo (2 runs) it solved the new task in 50 %" in text  # though there is no sampled decode


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"divergence": False}, ["No divergence was recorded.", "No videos were recorded."]),
        ({"status": "failed", "error": "no <Vulkan>", "reached": 4}, ["is failed (no &lt;Vulkan&gt;)", "iteration 4"]),
        ({"status": "running", "reached": 0}, ["is interrupted: no fine-tuned policy evaluated yet"]),
        ({"status": "interrupted", "reached": 3}, ["is interrupted: evaluated up to iteration 3"]),
        ({"method": None, "verb": "evaluate"}, ["The policy openvla-nano in a solved"]),
        ({"penalty": "kl_forward"}, ["sft + kl_forward"]),
    ],
)
def test_missing_parts_are_shown_as_such(tmp_path, options, texts):
    make_run(tmp_path / "a", n=6, **options)
    html = write_report([tmp_path / "a"], tmp_path / "r.html").read_text()
    for text in texts:
        assert text in html


def test_run_that_only_began(tmp_path):
    RunFolder.create(tmp_path / "a", config={}, run={"verb": "run", "policy": "p", "method": "sft"}).close()
    html = write_report([tmp_path / "a"], tmp_path).read_text()
    assert (tmp_path / "report.json").is_file()
    assert "Nothing was evaluated yet" in html
    assert "No evaluated episodes yet." in html


def test_settings_that_differ_make_rows_of_their_own(tmp_path):
    for rate in (1e-5, 3e-5):
        path = make_run(tmp_path / f"lr{rate}", n=6)
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("1.0e-05", str(rate)))
    variants = {row["variant"] for row in read_tables([tmp_path])["success"]}
    assert variants == {"base", "sft (learning_rate=1e-05)", "sft (learning_rate=3e-05)"}


def test_what_a_budget_gave_a_method_is_said_once(tmp_path):
    for rate, budget in ((1, "{rate: 1}"), (3, "{rate: 3, videos: 2}")):
        path = make_run(tmp_path / f"lr{rate}", n=6)
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("1.0e-05", str(rate)) + f"budget: {budget}\n")
    variants = {row["variant"] for row in read_tables([tmp_path])["success"]}
    said = {"sft (budget.videos=none, learning_rate=1)", "sft (budget.videos=2, learning_rate=3)"}
    assert variants == {"base"} | said


def test_a_key_that_a_run_did_not_have_yet_has_its_default(tmp_path):
    for name, lines in {"old": "", "new": "simulation: cpu\n", "gpu": "simulation: gpu\n"}.items():
        path = make_run(tmp_path / name, n=6)
        with open(path / "config.yaml", "a") as file:
            file.write(lines)
    rows = read_tables([tmp_path])["success"]
    runs = {row["variant"]: row["runs"] for row in rows if row["variant"] != "base"}
    assert runs == {"sft (simulation=cpu)": 2, "sft (simulation=gpu)": 1}


def test_a_sweep_is_compared_by_its_fronts(tmp_path, monkeypatch):
    """Nine settings in pairs would be 36 comparisons, the 90 of a published sweep 4,005."""
    for index in range(9):
        path = make_run(tmp_path / f"run{index}", method=("sft", "grpo")[index % 2], n=4, evaluate_every=10)
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace("1.0e-05", f"{index + 1}.0e-05"))
    report = read_tables([tmp_path])
    assert report["matched"] == []
    assert {row["method"]: row["checkpoints"] for row in report["fronts"]} == {"sft": 5, "grpo": 4}


def test_runs_that_differ_in_a_fourth_setting_are_not_pooled(tmp_path):
    for name, values in {"x": (1, 1, 1, 1), "y": (1, 1, 1, 2), "z": (2, 2, 2, 1)}.items():
        path = make_run(tmp_path / name, n=6)
        with open(path / "config.yaml", "a") as file:
            file.write(f"extra: {json.dumps(dict(zip('abcd', values, strict=True)))}\n")
    rows = read_tables([tmp_path])["success"]
    same = "sft (extra.a=1, extra.b=1, extra.c=1, ...)"
    variants = {row["variant"] for row in rows}
    assert variants == {"base", same, f"{same} #2", "sft (extra.a=2, extra.b=2, extra.c=2, ...)"}
    assert {row["runs"] for row in rows} == {1}


def test_nothing_is_pooled_over_temperatures(tmp_path):
    """Neither base rows, nor fronts, nor matched comparisons: each temperature has a section of its own."""
    folders = [make_run(tmp_path / name, method=name, n=6) for name in ("sft", "grpo")]
    state = json.loads((folders[1] / "run.json").read_text())
    (folders[1] / "run.json").write_text(json.dumps(state | {"decode": {"temperature": 0.7}}))
    tables = read_tables(folders)
    policies = ["openvla-nano", "openvla-nano at temperature 0.7"]
    for name, method in (("success", "variant"), ("checkpoints", "method"), ("fronts", "method")):
        assert sorted({row["policy"] for row in tables[name]}) == policies, name
        found = {row[method] for row in tables[name] if row["policy"] == policies[1]} - {"base"}
        assert found == {"grpo"}, name
    base = [row for row in tables["success"] if (row["variant"], row["task"]) == ("base", "stack_cube")]
    assert [row["n"] for row in base if row["decode"] == "sampled"] == [6, 6]
    assert tables["matched"] == []


def test_base_episodes_are_pooled_by_fingerprint(tmp_path):
    for name, mark, n in (("a", "aaaaaaaaaaaa", 6), ("b", "bbbbbbbbbbbb", 8), ("c", "bbbbbbbbbbbb", 10)):
        path = make_run(tmp_path / name, n=n, seed=ord(name))
        state = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(state | {"fingerprint": mark}))
    path = write_report([tmp_path], tmp_path / "r.html")
    rows = json.loads(path.with_suffix(".json").read_text())["success"]
    found = {
        row["variant"]: row["n"]
        for row in rows
        if row["method"] == "base" and (row["task"], row["decode"]) == ("pick_cube", "sampled")
    }
    assert found == {"base (fingerprint aaaaaaaa)": 6, "base (fingerprint bbbbbbbb)": 10}
    assert "the base policy openvla-nano (fingerprint aaaaaaaa) solved" in path.read_text()


@pytest.mark.parametrize(("temperature", "text"), [(1, "temperature 1.0, as in rollouts)"), (0.5, "temperature 0.5)")])
def test_temperature_of_evaluation_is_that_of_rollouts_only_at_1(tmp_path, temperature, text):
    path = make_run(tmp_path / "a", n=6)
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(state | {"decode": {"temperature": temperature}}))
    assert f"Decode: sampled ({text}" in write_report([path], tmp_path / "r.html").read_text()


def test_the_page_of_a_folder_named_from_here_is_the_same(tmp_path, monkeypatch):
    """Videos too, which `run` records and no episode names."""
    folder = make_run(tmp_path / "sft", n=FEW, videos=True)
    rows = [json.loads(row) | {"video": None} for row in (folder / "episodes.jsonl").read_text().splitlines()]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    whole, here = (write_report([one], tmp_path / "r.html").read_text() for one in (folder, Path("sft")))
    assert whole.count("<video") == here.count("<video") > 0


def test_too_many_videos_are_left_out_and_said_so(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("robot_forgetting.report.media.BUDGET_BYTES", 30_000)
    monkeypatch.setattr("robot_forgetting.report.media.Embedder.__init__.__defaults__", (30_000,))
    html = write_report([demo / "stack_cube-sft-seed0"], tmp_path / "r.html").read_text()
    assert 0 < html.count("<video") < 10
    assert "left out to keep the page small" in html


def test_crashed_episodes_are_listed_as_failures(page):
    html, report = page
    assert any(row["error"] == "the simulation returned not-a-number poses" for row in report["errors"])
    assert "crashed episodes, counted as failures" in html


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="no run folder given"):
        write_report([])
    with pytest.raises(UserError, match="holds no run folder"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path / "nothing"], tmp_path / "r.html")


def test_same_records_give_the_same_tables_with_and_without_a_page(demo, page):
    assert read_tables(str(demo)) == page[1]


def test_intervals_have_their_name(page):
    _, report = page
    for row in report["success"]:
        mean = row["task"] == "prior mean"
        one = "Wilson limits of each task, squared and added (MOVER)" if mean else "Wilson"
        assert row["interval"] == (one if row["runs"] == 1 else "t over runs and initial states")


def test_quadratic_fit_is_put_into_words_only_over_enough(page):
    html, report = page
    lead = " ".join(re.findall(r'<p class="lead">(.*?)</p>', html, re.S))
    assert "of the variation in forgetting" not in lead  # two runs
    row = {"r2": 0.5, "low": None, "high": None, "n": 10, "runs": 3}
    rows = [r for r in report["success"] if r["shipped"]]
    assert "R² = 0.50" in reading("p", "t", rows, [], [], row)[-1]
    for few in ({"n": 9}, {"runs": 2}):
        assert "R²" not in " ".join(reading("p", "t", rows, [], [], row | few))


def test_a_large_sweep_is_put_into_words_by_method():
    """Nine settings of one method and the base: ranges, by hand; with eight each setting has its sentence."""

    def row(variant: str, task: str, **values) -> dict:
        method, role = variant.partition(" ")[0], "prior" if task == PRIOR_MEAN else "new"
        shared = {"decode": "sampled", "n": 10, "runs": 1, "low": 0.0, "high": 1.0}
        return {**shared, "variant": variant, "method": method, "task": task, "role": role, **values}

    settings = [f"sft (rate={index})" for index in range(9)]
    success = [row(BASE, "t", rate=0.3), row(BASE, PRIOR_MEAN, rate=1.0)]
    success += [row(name, "t", rate=0.5 + 0.05 * index) for index, name in enumerate(settings)]
    forgetting = [row(name, PRIOR_MEAN, forgetting=0.1 * index) for index, name in enumerate(settings)]
    text = " ".join(reading("p", "t", success, forgetting, [], None)).replace("\N{NO-BREAK SPACE}", " ")
    assert text.count("Brackets hold 95 % intervals.") == 1
    assert text.endswith(
        "After sft (9 settings) it solved the new task in 50 to 90 % and had forgotten 0 to 80 points of the prior "
        "tasks' mean."
    )
    assert text.count("After") == 1 and text.count("Before fine-tuning") == 1
    few = reading("p", "t", [one for one in success if "=8" not in one["variant"]], [], [], None)
    assert sum(sentence.startswith("After sft (rate=") for sentence in few) == 8


def test_matched_comparison_where_the_runs_bases_differ(tmp_path):
    folders = [make_run(tmp_path / method, method=method, n=10, divergence=False) for method in ("sft", "reinforce")]
    file = folders[0] / "episodes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:  # this run's base policy solves 8 of 10, the other's fewer: levels between are not common
        if (row["stage"], row["task"]) == (0, "stack_cube"):
            row["success"] = row["episode"] < 8
        elif row["task"] == "stack_cube":
            row["success"] = row["episode"] < 9
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in read_tables([tmp_path])["matched"]:
        assert row["level"] is None or row["level"] > 0.8


def test_a_section_of_ones_own_as_the_document_prints_it(demo, tmp_path, monkeypatch):
    document = (Path(__file__).resolve().parents[1] / "docs" / "plug_ins.md").read_text(encoding="utf-8")
    (tmp_path / "my_steps.py").write_text(re.search(r"```python my_steps.py\n(.*?)```", document, re.S).group(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = str(demo / "stack_cube-sft-seed0")
    assert main(["report", run, "sections=[success,my_steps.Steps]", "output=page.html"]) == 0
    html, tables = Path("page.html").read_text(), json.loads(Path("page.json").read_text())
    sys.modules.pop("my_steps")
    won = [row for row in RunFolder(run).episodes() if row["stage"] and row["success"] and row["task"] == "pick_cube"]
    (row,) = (row for row in tables["steps"] if row["task"] == "pick_cube")
    assert (row["n"], row["mean_steps"]) == (len(won), pytest.approx(np.mean([one["steps"] for one in won])))
    assert re.findall(r"<h3[^>]*>(.*?)</h3>", html) == ["Success", "How long success takes"]
    assert 'aria-label="How long success takes"' in html and "mean steps</th>" in html
    assert tables["forgetting"] and "Provenance" not in html


@pytest.mark.parametrize(
    ("section", "said"),
    [("suces", "unknown section 'suces'"), ("my_sections.Gone", "cannot import 'my_sections.Gone'"),
     ("my_sections.Other", "is no subclass of"), ("my_sections.Bad", "my_sections.py, line 5, in rows: ")],
)  # fmt: skip
def test_a_wrong_section_is_one_line(demo, tmp_path, monkeypatch, capsys, section, said):
    lines = ["from robot_forgetting.report.section import Section", "class Other: ...", "class Bad(Section):"]
    lines += ["    name = title = 'bad'", "    def rows(self, runs): return runs.missing"]
    (tmp_path / "my_sections.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["report", str(demo / "stack_cube-sft-seed0"), f"sections=[{section}]"]) == 2
    error = capsys.readouterr().err
    sys.modules.pop("my_sections", None)
    assert said in error and error.count("\n") == 1, error
