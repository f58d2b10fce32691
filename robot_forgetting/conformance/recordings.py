"""Recorded episodes of the original simulator, replayed: the same success, hand, object and picture at every step?

A recording is `<task>_ep<id>_<what>.npz` with `action` [T, 7], `tcp` and `src` [T + 1, 7] (position and quaternion in
the world), flags per step, `image_steps`, and beside it `<same name>_t<NN>.png` after NN steps, area-averaged to 320
pixels width. The configuration `<id>` is of the task's evaluation grid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robot_forgetting.conformance.table import Table, expect
from robot_forgetting.errors import UserError
from robot_forgetting.task import Task

TCP_MEDIAN_MM = 0.5
PICTURE_MEAN = 1.0  # of 255, mean over a recording's stored pictures
FLAGS = ("is_src_obj_grasped", "consecutive_grasp", "src_on_target", "moved_correct_obj", "moved_wrong_obj")


@dataclass(frozen=True)
class Replay:
    """How one recording was reproduced; millimetres, grey values of 255, shares of the steps."""

    name: str
    success: tuple[bool, bool]  # recorded, ours; after the last step
    tcp: np.ndarray  # [T + 1]
    source: np.ndarray  # [T + 1]
    pictures: dict[int, float]  # step -> mean absolute difference
    flags: dict[str, float]  # flag -> share of steps on which both agree

    def __str__(self) -> str:
        pictures = ", ".join(f"{value:.2f}" for value in self.pictures.values())
        words = {True: "success", False: "failure"}
        same = words[self.success[0]] if self.success[0] == self.success[1] else "success DIFFERS"
        return (
            f"{same}; tcp mean {self.tcp.mean():.2f}, median {np.median(self.tcp):.2f}, max {self.tcp.max():.2f} mm; "
            f"object at the end {self.source[-1]:.2f} mm; pictures {pictures} of 255; "
            f"flags agree: {', '.join(f'{name} {share:.0%}' for name, share in self.flags.items())}"
        )


def check_recordings(table: Table, task: Task, folder: Path) -> None:
    """One row per recording of ``task`` in ``folder``; fails where it is out of tolerance."""
    files = recordings_of(task, folder)
    table.section(f"recordings of {task.name} in {folder}")
    player = Player(task)
    try:
        for file in files:
            table.check(file.stem.removeprefix(f"{task.name}_"), lambda file=file: _judged(player.replay(file)))
    finally:
        player.close()


def _judged(replay: Replay) -> str:
    for wrong in complaints(replay):
        expect(False, f"{wrong}: {replay}")
    return str(replay)


def complaints(replay: Replay) -> list[str]:
    """What is out of tolerance."""
    found = []
    if replay.success[0] != replay.success[1]:
        found.append("another outcome than recorded")
    if np.median(replay.tcp) >= TCP_MEDIAN_MM:
        found.append(f"the hand is off by a median of {np.median(replay.tcp):.2f} mm ({TCP_MEDIAN_MM} are allowed)")
    mean = np.mean(list(replay.pictures.values())) if replay.pictures else 0.0
    if mean >= PICTURE_MEAN:
        found.append(f"pictures differ by {mean:.2f} of 255 on average ({PICTURE_MEAN} is allowed)")
    return found


def recordings_of(task: Task, folder: str | Path) -> list[Path]:
    """The task's recordings in a folder, by name; ``UserError`` where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"recordings={folder} is not a folder")
    found = sorted(file for file in folder.glob(f"{task.name}_*.npz"))
    if not found:
        raise UserError(f"{folder} holds no recording of task '{task.name}' ({task.name}_ep00_....npz)")
    return found


class Player:
    """Replays recordings in one simulation of a task, drawn in the camera's own size."""

    def __init__(self, task: Task):
        from robot_forgetting.robot.simulation import Simulation

        spec = getattr(task, "spec", None)
        if spec is None or "size" not in spec.camera:
            raise UserError(f"task '{task.name}' is no robot task with a recorded camera; recordings= cannot check it")
        self.simulation = Simulation(replace(spec, rotation=None, gripper=None, full_pictures=True, max_steps=10**6))
        camera = self.simulation._cameras["image"]
        width, height = spec.camera["size"]
        camera.resize((320, round(320 * height / width)))

    def close(self) -> None:
        self.simulation.close()

    def replay(self, file: Path) -> Replay:
        """Runs a recording's commands from its configuration."""
        with np.load(file, allow_pickle=False) as opened:
            recorded = {key: opened[key] for key in opened.files}
        configuration = re.search(r"_ep(\d+)", file.stem)
        options = {"episode_id": int(configuration.group(1))} if configuration else {}
        simulation, env = self.simulation, self.simulation.env
        image = simulation.reset(0, options)["image"]
        tcp, source, flags, pictures = [], [], [], {}

        def note(step: int, image: np.ndarray) -> None:
            tcp.append(_millimetres(env.agent.robot.links_map[TCP[simulation.spec.robot]], recorded["tcp"][step]))
            source.append(_millimetres(env.objs[env.source_obj_name], recorded["src"][step]))
            if step in recorded["image_steps"]:
                pictures[step] = _difference(image, file.with_name(f"{file.stem}_t{step:02d}.png"))

        note(0, image)
        for step, command in enumerate(recorded["action"], 1):
            observation, _, _, _, seen = simulation.step(command)
            flags.append(seen)
            note(step, observation["image"])
        agree = {
            name: float(np.mean([bool(seen[name]) for seen in flags] == recorded[name]))
            for name in ("success", *FLAGS)
            if name in recorded and name in flags[-1]
        }
        outcome = bool(recorded["success"][-1]), bool(flags[-1]["success"])
        return Replay(file.stem, outcome, np.array(tcp), np.array(source), pictures, agree)


TCP = {"widowx": "ee_gripper_link", "widowx_maniskill3": "ee_gripper_link"}  # robot -> link of the tool centre point


def _millimetres(thing, pose: np.ndarray) -> float:
    """Distance of an actor or link from a recorded pose [7]."""
    return float(np.linalg.norm(thing.pose.p[0].numpy() - pose[:3]) * 1000)


def _difference(image: np.ndarray, file: Path) -> float:
    """Mean absolute difference from a stored picture, of 255."""
    import imageio.v3 as imageio

    if not file.is_file():
        raise UserError(f"the recording's picture {file} is missing")
    stored = imageio.imread(file)[..., :3]
    expect(stored.shape == image.shape, f"{file} has shape {stored.shape}, ours {image.shape}")
    return float(np.abs(stored.astype(float) - image.astype(float)).mean())
