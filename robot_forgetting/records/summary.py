"""The summary of a run folder, computed from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from robot_forgetting.metrics.statistics import paired_difference, retention, wilson
from robot_forgetting.records.matrix import matrix, metrics_of
from robot_forgetting.records.run_folder import SCHEMA_VERSION, RunFolder

ROLES = ("new", "prior", "held_out")
DECODES = ("sampled", "greedy")
PLACE = ("stage", "iteration", "task", "role", "decode")  # of a group of episodes
SCORED = "scored"  # "decode" of benchmarks with a protocol of their own, which stands in for either


def summarise(folder: RunFolder) -> dict:
    """summary.json: success with Wilson intervals, forgetting on paired seeds, divergence, and what a sequence's tasks
    come to after each stage. Pure function of the rows and of the roles in run.json.

    An errored episode counts as a failure and is listed under ``errors``.
    """
    episodes = folder.episodes()
    success = success_table(episodes)
    return {
        "schema_version": SCHEMA_VERSION,
        "success": success,
        "no_signal": no_signal(outcomes(episodes), folder.run.get("chance") or {}),
        "cut": cut_table(episodes),
        "forgetting": forgetting_table(episodes),
        "divergence": latest(
            folder.rows("divergence"), ("stage", "iteration", "task", "states", "measure", "unit", "layer")
        ),
        "errors": [
            {key: row.get(key) for key in ("stage", "iteration", "task", "decode", "episode", "seed", "error")}
            for row in episodes
            if row.get("error")
        ],
        **_of_sequence(folder.run, success),
    }


def _of_sequence(run: Mapping, success: list[dict]) -> dict:
    """``matrix``, and of several stages ``sequence``; nothing of what is no training."""
    stages, roles = len(run.get("sequence") or []), run.get("roles") or {}
    if not stages or not roles.get("new"):
        return {}
    R = matrix(success, roles, stages)
    return {"matrix": R} | ({"sequence": metrics_of(R)} if stages > 1 else {})


def latest(rows: Iterable[Mapping], keys: tuple[str, ...]) -> list[dict]:
    """Rows without repetition of ``keys``: of two, the later one counts (an iteration that was repeated)."""
    return list({tuple(row.get(key) for key in keys): dict(row) for row in rows}.values())


def succeeded(row: Mapping) -> bool:
    return bool(row.get("success")) and not row.get("error")


def outcomes(episodes: Iterable[Mapping]) -> dict[tuple, dict[int, bool]]:
    """(stage, iteration, task, role, decode) -> {seed: success}, in the order base to final, new to held-out."""
    return _grouped(episodes, succeeded)


def _grouped(episodes: Iterable[Mapping], value: Callable[[Mapping], Any]) -> dict[tuple, dict[int, Any]]:
    groups: dict[tuple, dict[int, Any]] = {}
    for row in episodes:
        key = (row["stage"], row.get("iteration", 0), row["task"], row.get("role", "new"), row.get("decode", "sampled"))
        groups.setdefault(key, {})[row["seed"]] = value(row)
    return dict(sorted(groups.items(), key=lambda item: _order(*item[0])))


def _order(stage: int, iteration: int, task: str, role: str, decode: str) -> tuple:
    def place(names: tuple[str, ...], name: str) -> int:
        return names.index(name) if name in names else len(names)

    return stage, iteration, place(DECODES, decode), place(ROLES, role), task


def no_signal(groups: Mapping[tuple, Mapping[int, bool]], chance: Mapping[str, float]) -> list[dict]:
    """Tasks on which the base policy cannot be told from guessing: its Wilson interval includes the rate of chance.

    Whatever happens to such a success rate says nothing about forgetting; means over tasks leave it out.
    """
    rows = []
    for (stage, _, task, role, decode), seeds in groups.items():
        if stage == 0 and task in chance and seeds:
            n = len(seeds)
            low, high = wilson(sum(seeds.values()), n)
            if low - 1e-9 <= chance[task] <= high + 1e-9:
                row = {"task": task, "role": role, "decode": decode, "n": n, "rate": sum(seeds.values()) / n}
                rows.append(row | {"low": low, "high": high, "chance": chance[task]})
    return rows


MOST_CUT = 0.05  # share of prompts of which the policy did not read all, above which a rate says little


def cut_table(episodes: Iterable[Mapping]) -> list[dict]:
    """Groups in which prompts were longer than the policy's context, or answers stopped by their length, with n."""
    table = []
    for key, seeds in _grouped(episodes, lambda row: row.get("flags") or {}).items():
        cut = [sum(bool(flags.get(name)) for flags in seeds.values()) for name in ("prompt_cut", "answer_cut")]
        if any(cut):
            head = dict(zip(PLACE, key, strict=True))
            table.append({**head, "n": len(seeds), "prompts_cut": cut[0], "answers_cut": cut[1]})
    return table


def mostly_cut(episodes: Iterable[Mapping]) -> list[dict]:
    """The rows of ``cut_table`` of the base policy in which more than ``MOST_CUT`` of the prompts were cut."""
    return [row for row in cut_table(episodes) if row["stage"] == 0 and row["prompts_cut"] > MOST_CUT * row["n"]]


def success_table(episodes: Iterable[Mapping]) -> list[dict]:
    """Success per stage, iteration, task and decode with its Wilson interval and n."""
    table = []
    for place, seeds in outcomes(episodes).items():
        successes, n = sum(seeds.values()), len(seeds)
        low, high = wilson(successes, n)
        row = {"n": n, "successes": successes, "rate": successes / n, "low": low, "high": high}
        table.append({**dict(zip(PLACE, place, strict=True)), **row})
    return table


def forgetting_table(episodes: Iterable[Mapping]) -> list[dict]:
    """Base minus fine-tuned success per task on the seeds both were tried on; negative where a task was learned.

    lost, gained: seeds on which only the base, only the fine-tuned policy succeeds. low, high: see
    ``metrics.statistics.paired_difference``. A task without a common seed has no row.
    """
    groups = outcomes(episodes)
    # A task's role is no part of what is paired: what was new is a prior task in later stages.
    bases = {(task, decode): seeds for (stage, _, task, _, decode), seeds in groups.items() if stage == 0}
    table = []
    for place, seeds in groups.items():
        head = dict(zip(PLACE, place, strict=True))
        base = bases.get((head["task"], head["decode"]), {})
        common = sorted(set(base) & set(seeds))
        if head["stage"] == 0 or not common:
            continue
        pair = paired_difference([base[seed] for seed in common], [seeds[seed] for seed in common])
        table.append(
            {
                **head,
                "n": pair.n,
                "base": pair.first,
                "fine_tuned": pair.second,
                "forgetting": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "lost": pair.only_first,
                "gained": pair.only_second,
                "retention": retention(pair.first, pair.second),
            }
        )
    return table
