"""Whole runs on the toy tasks: however interrupted, they end with the same summary; their numbers follow from rows."""

from __future__ import annotations

import io
import types

import numpy as np
import pytest
from rich.console import Console
from toy import ToyPolicy, ToyTask
from toy_runs import BUDGET, rows, run, same, summary

from robot_forgetting.engine import episode_rows, experiment, films
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.errors import UserError
from robot_forgetting.machine import doctor, progress
from robot_forgetting.methods.kl import KL
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.records import video
from robot_forgetting.records.checkpoints import latest_checkpoint, load_weights
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report import write_report
from robot_forgetting.rollout import Episode, EpisodeKey
from robot_forgetting.scored import ScoredTask
from robot_forgetting.task import Task

pytestmark = pytest.mark.usefixtures("no_renderer")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "render_backend", dict)
        return run(tmp_path_factory.mktemp("sweep") / "whole")


# ---- restarts


def stop_before_append(number: int, how) -> None:
    """Ends the process, or raises, in place of the ``number``-th write of rows."""
    append, calls = RunFolder.append, []

    def stopping(self, table, *new):
        calls.append(table)
        if len(calls) == number:
            how()
        append(self, table, *new)

    RunFolder.append = stopping


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("every", [2, 13])
def test_interrupted_again_and_again(tmp_path, monkeypatch, undisturbed, every):
    """Ctrl-C before every second (13th) write: between evaluated episodes, training iterations, divergences."""
    restarts = 0
    while restarts < 100:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "append", RunFolder.append)
            stop_before_append(every, interrupt)
            try:
                folder = run(tmp_path / "parts")
                break
            except KeyboardInterrupt:
                restarts += 1
                assert RunFolder(tmp_path / "parts").status == "interrupted"
    assert restarts >= 60 // every
    assert folder.run["restarts"] == restarts
    same(folder, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed):
    files = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*.jsonl")}
    before = summary(undisturbed)
    assert run(undisturbed.path).status == "finished"
    assert summary(undisturbed) == before
    assert files == {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*.jsonl")}


def test_another_base_policy_does_not_continue_a_run(tmp_path):
    """The weights under a policy's name may have been trained again since the run began."""
    run(tmp_path / "run")
    with pytest.raises(UserError, match="began with another base policy .* choose another run_dir"):
        run(tmp_path / "run", policy=ToyPolicy(seed=2))
    run(tmp_path / "run")


def test_a_failed_start_can_be_corrected(tmp_path, monkeypatch, undisturbed):
    """Nothing was recorded: another configuration, and even another policy, may use the folder."""

    def fails(*_, **__):
        raise UserError("no such statistics")
        yield

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no such statistics"):
        patch.setattr(episode_rows, "evaluate", fails)
        run(tmp_path / "run", policy=ToyPolicy(seed=2), config={"method": "grpo", "wrong": True})
    assert RunFolder(tmp_path / "run").status == "failed"
    folder = run(tmp_path / "run")
    assert folder.config() == {"method": "grpo"} and folder.run["restarts"] == 0
    same(folder, undisturbed)


def test_demonstrations_are_missed_before_anything_is_measured(tmp_path):
    class Untaught(ToyTask):
        demonstrations = Task.demonstrations

    with pytest.raises(UserError, match="task 'reach' has no demonstrations; give it an expert, or use a method"):
        run(tmp_path / "run", "sft", task=Untaught())
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", task=Untaught())


# ---- numbers


def test_records(undisturbed):
    header = undisturbed.run
    assert header["roles"] == {"new": ["reach"], "prior": ["mirror"], "held_out": []}
    assert (header["verb"], header["method"], header["penalty"], header["iterations"]) == ("run", "grpo", None, 4)
    assert set(header["timings"]) == {"preflight", "evaluate_base", "train", "evaluate_final", "divergence", "videos"}
    assert header["peak_memory_bytes"] > 10**6 and header["versions"]["torch"] and header["hardware"]["cores"]
    episodes = undisturbed.episodes()
    counts = {}
    for row in episodes:
        key = (row["stage"], row["iteration"], row["task"], row["decode"])
        counts.setdefault(key, []).append(row["seed"])
        assert row["episode"] == row["seed"] - 1_000_000 and row["split"] == "test" and row["source"] is None
        assert row["trained_on"] == (["reach"] if row["stage"] else [])
        assert row["temperature"] == (1.0 if row["decode"] == "sampled" else 0.0)
        assert row["role"] == {"reach": "new", "mirror": "prior"}[row["task"]]
    full, few = set(range(10**6, 10**6 + 6)), set(range(10**6, 10**6 + 3))
    expected = {(1, 2, task, "sampled"): few for task in ("reach", "mirror")}
    for stage, iteration in ((0, 0), (1, 4)):
        for task in ("reach", "mirror"):
            expected |= {(stage, iteration, task, "sampled"): full, (stage, iteration, task, "greedy"): few}
    assert {key: set(seeds) for key, seeds in counts.items()} == expected
    assert all(len(set(seeds)) == len(seeds) for seeds in counts.values())


def test_summary_by_hand(undisturbed):
    found, episodes = summary(undisturbed), undisturbed.episodes()
    assert len(found["success"]) == 10 and len(found["forgetting"]) == 6

    def outcomes(line, stage, iteration):
        keys = ("task", "role", "decode")
        return {
            row["seed"]: row["success"]
            for row in episodes
            if (row["stage"], row["iteration"]) == (stage, iteration) and all(row[k] == line[k] for k in keys)
        }

    for line in found["success"]:
        won = list(outcomes(line, line["stage"], line["iteration"]).values())
        low, high = wilson(sum(won), len(won))
        assert (line["n"], line["successes"], line["rate"]) == (len(won), sum(won), sum(won) / len(won))
        assert (line["low"], line["high"]) == (low, high)
    for line in found["forgetting"]:
        base, after = outcomes(line, 0, 0), outcomes(line, 1, line["iteration"])
        common = sorted(set(base) & set(after))
        first, second = np.mean([base[s] for s in common]), np.mean([after[s] for s in common])
        assert line["n"] == len(common) == (3 if line["iteration"] == 2 or line["decode"] == "greedy" else 6)
        assert (line["base"], line["fine_tuned"]) == pytest.approx((first, second))
        assert line["forgetting"] == pytest.approx(first - second)
        assert line["retention"] == (pytest.approx(second / first) if first else None)
    assert found["errors"] == []


def test_divergence_rows(undisturbed):
    table = undisturbed.rows("divergence")
    places = {(row["iteration"], row["task"], row["states"]) for row in table}
    final = {(4, task, states) for task in ("reach", "mirror") for states in ("base", "fine_tuned", "demonstrations")}
    assert places == final | {(2, "reach", "base")}
    assert len(table) == 6 * len(places)
    assert all(row["n"] <= 12 and row["episodes"] <= 3 for row in table)
    at_end = {(r["task"], r["states"], r["measure"], r["unit"]): r["value"] for r in table if r["iteration"] == 4}
    assert all(value > 0 for key, value in at_end.items() if key[0] == "reach" and key[1] == "base")


def test_an_errored_episode_is_a_failure_and_listed(tmp_path):
    folder = run(tmp_path / "run", task=ToyTask(crashes={1_000_001: 1}))
    found = summary(folder)
    listed = {(row["stage"], row["iteration"], row["decode"]) for row in found["errors"]}
    assert {row["seed"] for row in found["errors"]} == {1_000_001}
    assert listed == {(0, 0, "sampled"), (0, 0, "greedy"), (1, 2, "sampled"), (1, 4, "sampled"), (1, 4, "greedy")}
    assert next(line for line in found["success"] if line["task"] == "reach")["n"] == 6


# ---- what can go wrong, and the rest


def test_conventions_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="disagree on image_size: 4 against 8"):
        run(tmp_path / "run", task=ToyTask(image_size=8))
    assert not (tmp_path / "run").exists()


def test_an_error_is_recorded(tmp_path):
    class Broken(KL):
        def __call__(self, policy, batch):
            raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError):
        run(tmp_path / "run", penalty=Broken(coefficient=1.0))
    folder = RunFolder(tmp_path / "run")
    assert folder.status == "failed" and folder.run["error"] == "RuntimeError: no such thing"


def test_videos_before_and_after(tmp_path):
    folder = run(tmp_path / "run", budget={"videos": 2})
    seeds, fine_tuned = [1_600_000, 1_600_001], ToyPolicy(seed=1)
    load_weights(fine_tuned, latest_checkpoint(folder))
    expected = {}
    for who, policy in (("base", ToyPolicy(seed=1)), ("grpo", fine_tuned)):
        for task in (ToyTask(), ToyTask("mirror")):
            for episode in evaluate(policy, task, seeds, temperature=1.0, num_envs=2):
                name = video.video_name(task.name, episode.key.seed, who, episode.success)
                expected[name] = episode.steps + 1
    assert {path.name: video.count_frames(path) for path in folder.videos.iterdir()} == expected
    kept = {path: path.stat().st_mtime_ns for path in folder.videos.iterdir()}
    (folder.path / "summary.json").unlink()  # as if killed in the last moment
    some = next(iter(kept))
    some.unlink()
    run(tmp_path / "run", budget={"videos": 2})
    assert {path.name for path in folder.videos.iterdir()} == set(expected)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != some)


def test_a_video_says_what_the_policy_was_told_at_each_step(tmp_path, monkeypatch):
    told, captions = ["open the drawer", "open the drawer", "put the apple in"], []
    episode = Episode(EpisodeKey(3), observations=[{"instruction": said} for said in told], commands=[np.zeros(7)] * 2)
    episode.frames = [np.zeros((4, 4, 3), np.uint8)] * 3
    monkeypatch.setattr(films, "evaluate", lambda *rest, **named: [episode])
    monkeypatch.setattr(films, "write_episode", lambda path, frames, said, *rest: captions.append(said))
    assert films.record(None, ToyTask(), [3], tmp_path, "base", 1.0, 1) == [episode]
    assert captions == [told]


def test_progress_bars_within_each_other(tmp_path, monkeypatch, undisturbed):
    """In a terminal: an interim evaluation shows its bar while the training's is still there."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(progress, "_console", Console(force_terminal=True, file=screen, width=100))
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=screen))
    same(run(tmp_path / "whole"), undisturbed)
    assert "train whole" in screen.getvalue() and "mirror (sampled)" in screen.getvalue()


@pytest.mark.parametrize("task, option", [({"render": "stock"}, "stock"), ({}, "low_poly")])
def test_the_record_names_how_the_task_is_drawn(tmp_path, task, option):
    with experiment.open_run(tmp_path / "run", {"render": "low_poly", "task": task}, {"seed": 0}) as folder:
        assert folder.run["render"]["option"] == option


def test_without_greedy_episodes(tmp_path):
    folder = run(tmp_path / "run", "sft", budget={"greedy_episodes": 0, "interim_points": 0})
    assert {(row["stage"], row["decode"]) for row in folder.episodes()} == {(0, "sampled"), (1, "sampled")}
    assert {row["decode"] for row in summary(folder)["success"]} == {"sampled"}


def test_a_budget_of_nothing_switches_off(tmp_path, undisturbed):
    """Every number that may be 0: that part is not measured, nothing else changes, and the page can be written."""
    for key in [key for key in BUDGET if key != "episodes"]:
        folder = run(tmp_path / "alone" / key, budget={key: 0})
        assert folder.finished
        off = {"divergence_episodes", "divergence_states"}
        assert bool(folder.rows("divergence")) == (key not in off)
        if key in off:
            assert folder.rows("train") and rows(folder, "episodes") == rows(undisturbed, "episodes")
            write_report([folder.path], tmp_path / f"{key}.html")
        (folder.path / "run.json").unlink()  # so that the next one measures for itself


@pytest.mark.parametrize("interim", [0, 2])
def test_a_benchmark_at_interim_points(tmp_path, interim):
    class Benchmark(ToyTask, ScoredTask):
        def size(self):
            return 5

        def score(self, policy, seeds):
            yield from (Episode(EpisodeKey(seed), success=True) for seed in seeds)

        def chance(self, seeds):
            return 0.5

    folder = run(tmp_path / "run", prior=[Benchmark("bench")], budget={"interim_episodes": interim})
    found = [row["iteration"] for row in folder.episodes() if row["task"] == "bench"]
    assert sorted(found) == [0] * 5 + [2] * interim + [4] * 5


def test_states_where_every_episode_breaks_off(tmp_path):
    broken = dict.fromkeys(range(1_500_000, 1_500_003), 0)
    folder = run(tmp_path / "run", task=ToyTask(crashes=broken))
    assert {(row["task"], row["states"]) for row in folder.rows("divergence") if row["task"] == "reach"} == {
        ("reach", "demonstrations")
    }
