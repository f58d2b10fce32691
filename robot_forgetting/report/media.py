"""Before/after videos for the page: the same initial state under the base policy and each fine-tuned one."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from robot_forgetting.records.summary import succeeded
from robot_forgetting.report.runs import BASE, Group, Run

BUDGET_BYTES = 10_000_000  # of mp4 per page; base64 makes it a third more
NAME = re.compile(
    r"(?P<task>.+)-seed(?P<seed>\d+)-(?P<who>.+?)(_stage(?P<stage>\d{1,4}))?-(?P<outcome>success|failure)\.mp4"
)


def recorded(run: Run) -> list[dict]:
    """Videos of a run: those its episodes name, then others in its folder whose names say what they show."""
    found: dict[Path, dict] = {}
    for row in run.episodes:
        path = run.folder.file(row["video"]) if row.get("video") else None
        if path is not None:
            keys = ("task", "role", "seed", "stage", "iteration", "decode")
            found[path] = {key: row.get(key) for key in keys} | {"success": succeeded(row), "path": path}
    roles = {task: role for role, tasks in run.tasks.items() for task in tasks}
    for path in sorted(run.folder.videos.glob("*.mp4")) if run.folder.videos.is_dir() else []:
        match, path = NAME.fullmatch(path.name), run.folder.file(f"videos/{path.name}")
        if match and path is not None and path not in found:
            stage = 0 if match["who"] == BASE else int(match["stage"] or 1)
            found[path] = {
                "task": match["task"],
                "role": roles.get(match["task"], ""),
                "seed": int(match["seed"]),
                "stage": stage,
                "iteration": run.ends.get(stage, run.final or (0, 0))[1],
                "decode": "sampled",
                "success": match["outcome"] == "success",
                "path": path,
            }
    return list(found.values())


def comparisons(groups: Sequence[Group]) -> list[dict]:
    """Per task one initial state, the first that the most policies were recorded on, so not picked by its outcome.

    Rows {"task", "role", "seed", "instruction", "videos": [{"who", "run", "success", "path"}]}, base first.
    """
    videos: dict[str, dict[str, dict[int, dict]]] = {}  # task -> who -> seed -> video
    roles, instructions = {}, {}
    for group in groups:
        for run in group.runs:
            instructions |= run.state.get("instructions") or {}
            for video in recorded(run):
                if video["stage"] and (video["stage"], video["iteration"]) != run.final:
                    continue
                who = group.variant if video["stage"] else BASE
                roles.setdefault(video["task"], video["role"])
                # The first run of a method, the first decode (sampled) stays.
                videos.setdefault(video["task"], {}).setdefault(who, {}).setdefault(
                    video["seed"], {**video, "run": run.id}
                )
    rows = []
    order = {"new": 0, "prior": 1, "held_out": 2}
    for task, by_who in sorted(videos.items(), key=lambda item: order.get(roles[item[0]], 3)):
        seeds = sorted({seed for found in by_who.values() for seed in found})
        seed = max(seeds, key=lambda seed: (sum(seed in found for found in by_who.values()), -seed))
        shown = [{"who": who, **found[seed]} for who, found in by_who.items() if seed in found]
        shown.sort(key=lambda video: video["who"] != BASE)
        rows.append(
            {
                "task": task,
                "role": roles[task],
                "seed": seed,
                "instruction": instructions.get(task),
                "videos": [{key: video[key] for key in ("who", "run", "success", "path")} for video in shown],
            }
        )
    return rows


class Embedder:
    """Files as data URIs until the page's budget is spent; ``left_out`` counts the rest."""

    def __init__(self, budget: int = BUDGET_BYTES):
        self.left = budget
        self.left_out = 0

    def uri(self, path: Path) -> str | None:
        size = path.stat().st_size
        if size > self.left:
            self.left_out += 1
            return None
        self.left -= size
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
