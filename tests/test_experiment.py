"""Whole runs on the toy tasks: however interrupted, they end with the same summary; their numbers follow from rows."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from toy import ToyPolicy, ToyTask

from robot_forgetting import doctor, experiment, progress, video
from robot_forgetting.errors import UserError
from robot_forgetting.evaluate import evaluate
from robot_forgetting.experiment import evaluate_command, fingerprint, record_command
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.sft import SFT
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.records import RunFolder
from robot_forgetting.train import Optimiser, latest_checkpoint, load_weights

BUDGET = {
    "episodes": 6, "greedy_episodes": 3, "interim_points": 1, "interim_episodes": 3, "divergence_episodes": 3,
    "divergence_states": 12, "videos": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_renderer(monkeypatch):
    """Looking for a Vulkan device takes seconds and the toy draws its own pictures."""
    monkeypatch.setattr(doctor, "render_backend", dict)


def run(path: Path, method: str = "grpo", *, policy=None, task=None, budget=(), penalty=None, **options) -> RunFolder:
    optimiser = Optimiser(learning_rate=0.05)
    if method == "grpo":
        made = GRPO(iterations=4, groups=6, group_size=4, optimiser=optimiser, minibatch_size=40, seed=0)
    else:
        made = SFT(iterations=4, steps_per_iteration=2, batch_size=8, demonstrations=5, optimiser=optimiser)
    arguments = {
        "policy": policy or ToyPolicy(seed=1), "task": task or ToyTask(), "method": made, "penalty": penalty,
        "prior": [ToyTask("mirror")], "held_out": [], "budget": BUDGET | dict(budget),
        "names": {"policy": "toy", "method": method, "penalty": "none"}, "config": {"method": method},
        "run_dir": path, "seed": 0, "temperature": 1.0, "episodes": None, "seed_start": None, "num_envs": 4,
        "processes": 1,
    }  # fmt: skip
    assert experiment.run(**arguments | options) == 0
    return RunFolder(path)


def summary(folder: RunFolder) -> dict:
    return json.loads((folder.path / "summary.json").read_text())


def rows(folder: RunFolder, table: str) -> list[str]:
    """Rows without durations, in a fixed order (episodes end in any order)."""
    return sorted(
        json.dumps({key: value for key, value in row.items() if "seconds" not in key}) for row in folder.rows(table)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "render_backend", dict)
        return run(tmp_path_factory.mktemp("sweep") / "whole")


def same(folder: RunFolder, expected: RunFolder) -> None:
    assert folder.status == "finished" and summary(folder) == summary(expected)
    for table in ("episodes", "train", "divergence"):
        assert rows(folder, table) == rows(expected, table)


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


@pytest.mark.parametrize("number", [1, 9, 20, 24, 35, 50])
def test_killed_and_continued(tmp_path, undisturbed, number):
    def doomed():
        stop_before_append(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=doomed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert RunFolder(tmp_path / "killed").status == "interrupted"
    same(run(tmp_path / "killed"), undisturbed)


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


# ---- numbers


def test_records(undisturbed):
    header = undisturbed.run
    assert header["roles"] == {"new": ["reach"], "prior": ["mirror"], "held_out": []}
    assert (header["verb"], header["method"], header["penalty"], header["iterations"]) == ("run", "grpo", None, 4)
    assert set(header["timings"]) == {"evaluate_base", "train", "evaluate_final", "divergence", "videos"}
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


# ---- base rows of a sibling


def sources(folder: RunFolder) -> set:
    return {row["source"] for row in folder.episodes() if row["stage"] == 0}


def test_base_rows_come_from_a_sibling(tmp_path, monkeypatch):
    first = run(tmp_path / "first")
    evaluated = []
    real = experiment.evaluate

    def listening(policy, task, seeds, **options):
        evaluated.append(list(seeds))
        return real(policy, task, seeds, **options)

    monkeypatch.setattr(experiment, "evaluate", listening)
    second = run(tmp_path / "second", "sft")
    assert sources(first) == {None} and sources(second) == {"first"}
    assert {row["source"] for row in second.episodes() if row["stage"] == 1} == {None}
    assert len(evaluated) == 2 + 4  # interim: two tasks; end: two tasks at two decodes; base: none
    base = [line for line in summary(second)["success"] if line["stage"] == 0]
    assert base == [line for line in summary(first)["success"] if line["stage"] == 0]
    third = run(tmp_path / "third", "sft")
    assert sources(third) == {"first"}  # where it was measured, not where it was found
    assert summary(third)["success"] == summary(second)["success"]


@pytest.mark.parametrize(
    "change",
    [{"policy": ToyPolicy(seed=2)}, {"temperature": 0.7}, {"task": ToyTask("reach", max_steps=5)},
     {"prior": [ToyTask("mirror"), ToyTask("reach_again")]}],
    ids=["policy", "temperature", "max_steps", "tasks"],
)  # fmt: skip
def test_base_rows_of_another_measurement_are_not_taken(tmp_path, monkeypatch, change):
    monkeypatch.setattr("toy.INSTRUCTIONS", ("reach", "mirror", "reach_again"))
    monkeypatch.setattr(ToyPolicy, "_states", _states_of_three)
    run(tmp_path / "first")
    assert sources(run(tmp_path / "second", **change)) == {None}


def _states_of_three(self, obs):
    images = np.asarray(obs["image"])
    state = images[:, 0, :, 0].argmax(1) * 4 + images[:, -1, :, 0].argmax(1)
    return torch.tensor([int(text == "mirror") for text in obs["instruction"]]), torch.from_numpy(state)


def test_only_missing_base_rows_are_measured(tmp_path):
    """A sibling with fewer episodes gives what it has; one with more gives what is needed and no more."""
    run(tmp_path / "few", budget={"episodes": 2, "greedy_episodes": 1})
    middle = run(tmp_path / "middle")
    assert sources(middle) == {None, "few"}
    run(tmp_path / "z_many", budget={"episodes": 9, "greedy_episodes": 9})
    alone = run(tmp_path / "elsewhere" / "alone")
    assert summary(middle)["success"] == summary(alone)["success"]
    last = run(tmp_path / "last", budget={"episodes": 4})
    assert [line["n"] for line in summary(last)["success"] if line["stage"] == 0] == [4, 4, 3, 3]


def test_fingerprint():
    tasks = [ToyTask(), ToyTask("mirror")]
    policy = ToyPolicy(seed=1)
    mark = fingerprint(policy, tasks)
    assert mark == fingerprint(ToyPolicy(seed=1), tasks) and len(mark) == 16
    assert mark != fingerprint(policy, tasks[:1]) and mark != fingerprint(policy, tasks[::-1])
    with torch.no_grad():
        policy.table[0, 3, 1, 0] += 1e-3
        policy.table[0, 3, 1, 1] -= 1e-3  # the sum stays
    assert mark != fingerprint(policy, tasks)


def test_fingerprint_does_not_depend_on_the_number_of_threads():
    class Big(ToyPolicy):
        def __init__(self):
            super().__init__()
            self.big = torch.nn.Parameter(torch.randn(700, 700, generator=torch.Generator().manual_seed(0)))

    threads, marks = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            marks.add(fingerprint(Big(), [ToyTask()]))
    finally:
        torch.set_num_threads(threads)
    assert len(marks) == 1


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


def evaluate_again(path: Path, **options) -> RunFolder:
    arguments = {
        "policy": ToyPolicy(seed=1), "task": ToyTask(), "run_dir": path, "checkpoint": None, "config": {}, "names": {},
        "seed": 0, "episodes": 5, "seed_start": 20, "temperature": 1.0, "num_envs": 3, "budget": BUDGET,
    }  # fmt: skip
    assert evaluate_command(**arguments | options) == 0
    return RunFolder(path)


def test_evaluate_command(tmp_path, undisturbed):
    base = evaluate_again(tmp_path / "base")
    assert {row["seed"] for row in base.episodes()} == set(range(20, 25)) and len(base.episodes()) == 10
    assert {row["split"] for row in base.episodes()} == {"train"} and base.finished
    assert [line["decode"] for line in summary(base)["success"]] == ["sampled", "greedy"]
    # A finished run's weights on its own test seeds give that run's rows again.
    tuned = evaluate_again(
        tmp_path / "tuned", checkpoint=str(undisturbed.path), episodes=6, seed_start=None, num_envs=4
    )
    expected = {
        row["seed"]: (row["success"], row["steps"])
        for row in undisturbed.episodes()
        if (row["stage"], row["task"], row["iteration"], row["decode"]) == (1, "reach", 4, "sampled")
    }
    found = {r["seed"]: (r["success"], r["steps"]) for r in tuned.episodes() if r["decode"] == "sampled"}
    assert found == expected


def test_evaluate_an_unfinished_run(tmp_path):
    with RunFolder.create(tmp_path / "empty", config={}):
        pass
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate_again(tmp_path / "out", checkpoint=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate_again(tmp_path / "out", checkpoint=str(tmp_path / "nowhere"))


def test_record_command(tmp_path, capfd):
    record_command(ToyPolicy(seed=1), ToyTask(crashes={1_000_001: 1}), None, tmp_path, 3, None, 1.0, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3 and names[0] == "reach-base-grid.mp4"
    assert names[1].startswith("reach-seed1000000-base-") and names[2].startswith("reach-seed1000002-base-")
    said = capfd.readouterr().err
    assert "seed 1000001: no video, RuntimeError: broke at step 1" in said and "of 2 succeeded" in said
    with pytest.raises(UserError, match="no episode could be recorded"):
        record_command(ToyPolicy(), ToyTask(crashes={1_000_000: 0}), None, tmp_path, 1, None, 1.0, 2)
