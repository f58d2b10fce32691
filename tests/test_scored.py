"""Scored tasks in an experiment, with the toy policy: which items, which rows, what means leave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from toy import ToyPolicy, ToyTask
from toy_runs import run, sources

from robot_forgetting.engine.drift_rows import policy_states
from robot_forgetting.errors import UserError
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import no_signal
from robot_forgetting.report.page import read_tables, write_report
from robot_forgetting.rollout import Episode, EpisodeKey
from robot_forgetting.scored import ScoredTask, spread

START = 1_000_000


class Quiz(ScoredTask):
    """Items 0 .. size - 1; an item below ``known`` is answered, whatever the policy, once it is trained one fewer."""

    def __init__(
        self,
        name: str = "quiz",
        size: int = 20,
        known: int = 15,
        chance: float = 0.25,
        reason: str | None = None,
        cut: int = 0,
    ):
        self.name, self.count, self.known, self.level, self.reason, self.cut = name, size, known, chance, reason, cut
        self.asked: list[list[int]] = []

    def size(self) -> int:
        return self.count

    def chance(self, seeds) -> float:
        return self.level

    def left_out(self):
        return self.reason

    def settings(self) -> dict:
        return {"metric": "acc"}

    def convention(self) -> ConventionSpec:
        return ConventionSpec()

    def score(self, policy, seeds):
        self.asked.append(list(seeds))
        moved = any(not torch.equal(now, then) for now, then in zip(policy.parameters(), policy._kept, strict=True))
        for seed in seeds:
            success = seed - START < self.known - moved
            episode = Episode(EpisodeKey(seed), success=success, reward=float(success))
            episode.flags = {"acc": float(success)} | ({"prompt_cut": 7} if seed - START < self.cut else {})
            yield episode


@pytest.mark.parametrize("size", [1, 2, 5, 8, 100, 14042])
def test_every_beginning_is_spread_evenly(size):
    order = spread(size)
    assert sorted(order) == list(range(size))
    for count in {1, 2, size // 3, size // 2, size} - {0}:
        chosen = np.sort(order[:count])
        gaps = np.diff(np.concatenate([chosen, [size + chosen[0]]]))
        assert gaps.max() <= 4 * -(-size // count)


def test_spread_by_hand():
    assert spread(6).tolist() == [0, 4, 2, 1, 5, 3]  # 000 100 010 (110) 001 101 011 (111)


def test_items_are_chosen_within_the_limit():
    quiz = Quiz(size=6)
    assert quiz.chosen(3) == [START, START + 4, START + 2]
    assert quiz.evaluation_seeds(3, None) == quiz.chosen(3) and quiz.evaluation_seeds(None, None) == quiz.chosen(99)
    quiz.limit = 2
    assert quiz.chosen(3) == quiz.chosen(None) == [START, START + 4]
    assert quiz.items([START + 5, START + 6, START + 7]) == [5, 0, 4]
    with pytest.raises(UserError, match="at least 1"):
        quiz.evaluation_seeds(0, None)


@pytest.fixture
def finished(tmp_path, no_renderer):
    quizzes = [Quiz(), Quiz("guess", size=20, known=5), Quiz("code", reason="code runs code; allow it")]
    run(tmp_path / "first", prior=[ToyTask("mirror"), *quizzes])
    return tmp_path, quizzes


def test_rows_of_an_experiment(finished):
    path, (quiz, _, code) = finished
    folder = RunFolder(path / "first")
    state, last = folder.run, folder.run["iterations"]
    rows = [row for row in folder.episodes() if row["task"] == "quiz"]
    assert {row["decode"] for row in rows} == {"scored"} and {row["temperature"] for row in rows} == {None}
    base = {row["seed"]: row["success"] for row in rows if row["stage"] == 0}
    final = {row["seed"]: row["success"] for row in rows if (row["stage"], row["iteration"]) == (1, last)}
    assert set(base) == set(final) == set(range(START, START + 20))
    assert (sum(base.values()), sum(final.values())) == (15, 14)
    assert code.asked == []
    assert state["left_out"] == {"code": "code runs code; allow it"}
    assert state["roles"]["prior"] == ["mirror", "quiz", "guess"]
    assert state["chance"] == {"quiz": 0.25, "guess": 0.25}
    assert state["protocols"]["quiz"] == {"metric": "acc"}
    # Once before, once after and at each interim point, never twice for two decodes.
    interim = len({row["iteration"] for row in rows if row["stage"] == 1}) - 1
    assert len(quiz.asked) == 2 + interim
    forgetting = {row["task"]: row for row in folder.summary()["forgetting"] if row["iteration"] == last}
    assert (forgetting["quiz"]["lost"], forgetting["quiz"]["gained"]) == (1, 0)
    assert [row["task"] for row in folder.summary()["no_signal"]] == ["guess"]


def test_base_rows_are_reused_and_a_repeated_command_scores_nothing(finished):
    path, _ = finished
    again = [Quiz(), Quiz("guess", size=20, known=5)]
    second = run(path / "second", prior=[ToyTask("mirror"), *again])
    assert sources(second) == {"first"}
    asked = len(again[0].asked)
    run(path / "second", prior=[ToyTask("mirror"), *again])
    assert len(again[0].asked) == asked


def test_the_report_greys_out_what_carries_no_signal(finished):
    folder, _ = finished
    page = write_report([folder / "first"], folder / "report.html").read_text()
    assert "Greyed out: on guess (25" in page and 'class="silent"' in page
    tables = json.loads((folder / "report.json").read_text())
    rows = {(row["method"], row["task"]): row for row in tables["success"] if row["decode"] == "sampled"}
    base = {task: row for (method, task), row in rows.items() if method == "base"}
    assert base["guess"]["at_chance"] and not base["quiz"]["at_chance"]
    assert base["prior mean"]["rate"] == pytest.approx((base["mirror"]["rate"] + 0.75) / 2)
    final = next(row for row in tables["checkpoints"] if row["final"])
    mine = {task: row for (method, task), row in rows.items() if method != "base"}
    assert final["prior"] == pytest.approx((mine["mirror"]["rate"] + 14 / 20) / 2)
    means = [row for row in tables["forgetting"] if (row["task"], row["decode"]) == ("prior mean", "greedy")]
    assert means, "a benchmark stands beside the greedy decode too"


def test_the_report_greys_out_benchmarks_whose_prompts_were_cut(tmp_path, no_renderer):
    folder = run(tmp_path / "first", prior=[ToyTask("mirror"), Quiz("long", cut=2), Quiz("one_long", cut=1)])
    cut = {(row["task"], row["stage"]): row for row in folder.summary()["cut"]}
    assert set(cut) == {(task, stage) for task in ("long", "one_long") for stage in (0, 1)}
    assert (cut["long", 0]["prompts_cut"], cut["long", 0]["answers_cut"], cut["long", 0]["n"]) == (2, 0, 20)
    page = write_report([folder.path], tmp_path / "report.html").read_text()
    assert "Greyed out: prompts of long (2 of 20) are longer" in page and 'class="silent"' in page
    tables = json.loads((tmp_path / "report.json").read_text())
    greyed = {row["task"] for row in tables["success"] if row["at_chance"]}
    assert greyed == {"long"}


def test_all_silent_leaves_no_mean(tmp_path, no_renderer):
    quizzes = [Quiz("guess", known=5), Quiz("luck", known=4)]
    tables = read_tables([run(tmp_path / "run", prior=quizzes).path])
    assert {row["task"] for row in tables["success"]} == {"reach", "guess", "luck"}
    assert tables["checkpoints"] == []


@pytest.mark.parametrize(
    ("won", "n", "chance", "silent"),
    [(25, 100, 0.25, True), (33, 100, 0.25, True), (36, 100, 0.25, False), (0, 50, 0.0, True), (1, 50, 0.0, False)],
)
def test_no_signal_by_hand(won, n, chance, silent):
    """Wilson's 95 % interval: 33 of 100 [0.246, 0.427], 36 of 100 [0.273, 0.458], 1 of 50 [0.004, 0.105]."""
    outcomes = {(0, 0, "quiz", "prior", "scored"): {seed: seed < won for seed in range(n)}}
    assert bool(no_signal(outcomes, {"quiz": chance})) == silent
    assert no_signal(outcomes, {"other": chance}) == []


def test_a_benchmark_is_not_trained_on(tmp_path, no_renderer):
    with pytest.raises(UserError, match="'quiz' is a benchmark: nothing can be trained on it"):
        run(tmp_path / "run", task=Quiz(), prior=[])
    with pytest.raises(UserError, match="scored, not trained on or recorded"):
        Quiz().make_env(1)


def test_prompts_are_states_for_a_divergence():
    class Asking(Quiz):
        def prompts(self, seeds):
            return {"messages": [[{"role": "user", "content": str(item)}] for item in self.items(seeds)]}

    seeds = [START + 500_000 + index for index in range(4)]
    states = policy_states(ToyPolicy(), Asking(size=6), seeds, num_envs=1, limit=10)
    order = spread(6)
    assert [chat[0]["content"] for chat in states.obs["messages"]] == [str(order[(500_000 + i) % 6]) for i in range(4)]
