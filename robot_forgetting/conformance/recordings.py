"""Recorded episodes of the original simulator, replayed: the same success, hand, object and picture at every step?

A recording is `<task>_<what>.npz` with `action` [T, 7], `tcp` and `src` [T + 1, 7] (position and quaternion in the
world), flags per step, `image_steps`, and beside it `<same name>_t<NN>.png` after NN steps, area-averaged to 320 pixels
width. Its initial state is the configuration of the task's evaluation grid that `ep<id>` in its name gives, or
`obj_init_xy` and the orientation or station in its name. A picture `<task>_<what>_t00.png` alone is compared too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robot_forgetting.conformance.check_table import Table, expect
from robot_forgetting.errors import UserError
from robot_forgetting.task import Task

TCP_MEDIAN_MM = 0.5
PICTURE_MEAN = 1.0  # of 255, mean over a recording's stored pictures
FLAGS = (
    *("is_src_obj_grasped", "consecutive_grasp", "src_on_target", "moved_correct_obj", "moved_wrong_obj"),  # WidowX
    *("is_grasped", "lifted_object", "lifted_object_significantly"),  # Google robot
)


@dataclass(frozen=True)
class Replay:
    """How one recording was reproduced; millimetres, grey values of 255, shares of the steps."""

    name: str
    success: tuple[bool, bool]  # recorded, ours; after the last step
    tcp: np.ndarray  # [T + 1]; empty where only a picture was recorded
    source: np.ndarray  # [T + 1]
    pictures: dict[int, float]  # step -> mean absolute difference
    flags: dict[str, float]  # flag -> share of steps on which both agree

    def __str__(self) -> str:
        pictures = ", ".join(f"{value:.2f}" for value in self.pictures.values())
        if not len(self.tcp):
            return f"only a picture; it differs by {pictures} of 255"
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
            name = file.stem.removeprefix(f"{task.name}_")
            table.check(name, lambda file=file: _judged(player.replay(file), allowed(task)))
    finally:
        player.close()


def allowed(task: Task) -> float:
    """Mean difference of pictures that the task's card declares, of 255."""
    return getattr(task, "recorded_pictures", PICTURE_MEAN)


def _judged(replay: Replay, pictures: float) -> str:
    for wrong in complaints(replay, pictures):
        expect(False, f"{wrong}: {replay}")
    return str(replay)


def complaints(replay: Replay, pictures: float = PICTURE_MEAN) -> list[str]:
    """What is out of tolerance; ``pictures``: how much they may differ on average, of 255."""
    found = []
    if replay.success[0] != replay.success[1]:
        found.append("another outcome than recorded")
    if len(replay.tcp) and np.median(replay.tcp) >= TCP_MEDIAN_MM:
        found.append(f"the hand is off by a median of {np.median(replay.tcp):.2f} mm ({TCP_MEDIAN_MM} are allowed)")
    mean = np.mean(list(replay.pictures.values())) if replay.pictures else 0.0
    if mean >= pictures:
        found.append(f"pictures differ by {mean:.2f} of 255 on average ({pictures} is allowed)")
    return found


def recordings_of(task: Task, folder: str | Path) -> list[Path]:
    """The task's recordings in a folder, by name (pictures without one last); ``UserError`` where there are none."""
    folder, prefix = Path(folder), getattr(task, "recorded_as", f"{task.name}_")
    if not folder.is_dir():
        raise UserError(f"recordings={folder} is not a folder")
    found = sorted(folder.glob(f"{prefix}*.npz"))
    pictures = sorted(folder.glob(f"{prefix}*_t00.png"))
    found += [file for file in pictures if not file.with_name(file.name.replace("_t00.png", ".npz")).is_file()]
    if not found:
        raise UserError(f"{folder} holds no recording of task '{task.name}' ({prefix}....npz)")
    return found


class Player:
    """Replays recordings in one simulation of a task, drawn in the camera's own size."""

    def __init__(self, task: Task):
        from robot_forgetting.tasks.simulator.simulation import Simulation

        spec = getattr(task, "spec", None)
        if spec is None or "size" not in spec.camera:
            raise UserError(f"task '{task.name}' is no robot task with a recorded camera; recordings= cannot check it")
        arguments = {**spec.env_arguments, **getattr(task, "recorded_with", {})}
        self.simulation = Simulation(
            replace(spec, rotation=None, gripper=None, full_pictures=True, max_steps=10**6, env_arguments=arguments)
        )
        camera = self.simulation._cameras["image"]
        width, height = spec.camera["size"]
        camera.resize((320, round(320 * height / width)))

    def close(self) -> None:
        self.simulation.close()

    def replay(self, file: Path) -> Replay:
        """Runs a recording's commands from its initial state."""
        if file.suffix == ".png":
            name = file.name.removesuffix("_t00.png")
            nothing = np.zeros(0)
            return Replay(name, (True, True), nothing, nothing, {0: self._start(name, {}, file)[1]}, {})
        with np.load(file, allow_pickle=False) as opened:
            recorded = {key: opened[key] for key in opened.files}
        simulation, env = self.simulation, self.simulation.env
        image = self._start(file.stem, recorded, file.with_name(f"{file.stem}_t00.png"))[0]
        tcp, source, flags, pictures = [], [], [], {}

        def note(step: int, image: np.ndarray | None) -> None:
            tcp.append(_millimetres(env.agent.robot.links_map[TCP[simulation.spec.robot]], recorded["tcp"][step]))
            source.append(_millimetres(env.objs[env.source_obj_name], recorded["src"][step]))
            if step in recorded["image_steps"]:
                pictures[step] = _difference(image, file.with_name(f"{file.stem}_t{step:02d}.png"))

        note(0, image)
        cameras = simulation._cameras
        for step, command in enumerate(recorded["action"], 1):
            simulation._cameras = cameras if step in recorded["image_steps"] else {}  # drawing is what takes time
            observation, _, _, _, seen = simulation.step(command)
            flags.append(seen)
            note(step, observation.get("image"))
        simulation._cameras = cameras
        agree = {
            name: float(np.mean([bool(seen[name]) for seen in flags] == recorded[name]))
            for name in ("success", *FLAGS)
            if name in recorded and name in flags[-1]
        }
        outcome = bool(recorded["success"][-1]), bool(flags[-1]["success"])
        return Replay(file.stem, outcome, np.array(tcp), np.array(source), pictures, agree)

    def _start(self, name: str, recorded: dict, picture: Path) -> tuple[np.ndarray, float]:
        """Resets to a recording's initial state; its first picture, and by how much it differs from the stored one.

        The robot's colouring is not recorded: of those that an environment has, the one that fits best is taken.
        """
        options = {}
        if configuration := re.search(r"_ep(\d+)", name):
            options["episode_id"] = int(configuration.group(1))
        if "obj_init_xy" in recorded:
            options["place"] = recorded["obj_init_xy"]
        choices = dict(getattr(self.simulation.env, "recorded_choices", {}))
        colours = choices.pop("colours", [None])
        for key, names in choices.items():
            for choice in names:
                if re.search(rf"_{choice}(\d*_|$)", name):
                    options[key] = choice
        tried = []
        for colour in colours:
            chosen = options if colour is None else {**options, "colours": colour}
            image = self.simulation.reset(0, chosen)["image"]
            tried.append((_difference(image, picture) if picture.is_file() else 0.0, len(tried), chosen))
        difference, _, chosen = min(tried, key=lambda one: one[:2])
        return self.simulation.reset(0, chosen)["image"], difference


GOOGLE = "robot_forgetting.tasks.google_robot.google_robot_tasks.GOOGLE_ROBOT"
# robot -> link of the tool centre point
TCP = {"widowx": "ee_gripper_link", "widowx_maniskill3": "ee_gripper_link", GOOGLE: "link_gripper_tcp"}


def _millimetres(thing, pose: np.ndarray) -> float:
    """Distance of an actor or link from a recorded pose [7]."""
    return float(np.linalg.norm(thing.pose.p[0].numpy() - pose[:3]) * 1000)


def _difference(image: np.ndarray, file: Path) -> float:
    """Mean absolute difference from a stored picture, of 255; a larger one is area-averaged first."""
    import imageio.v3 as imageio

    from robot_forgetting.tasks.simulator.pictures import area_average

    if not file.is_file():
        raise UserError(f"the recording's picture {file} is missing")
    stored = imageio.imread(file)[..., :3]
    if stored.shape[0] > image.shape[0]:
        stored = area_average(stored, image.shape[1::-1])
    expect(stored.shape == image.shape, f"{file} has shape {stored.shape}, ours {image.shape}")
    return float(np.abs(stored.astype(float) - image.astype(float)).mean())
