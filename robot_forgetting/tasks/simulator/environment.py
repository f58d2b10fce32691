"""A ManiSkill environment from plain values: what a worker must know to build one, and what it refuses to build."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, TypedDict

import numpy as np

from robot_forgetting.errors import UserError, blamed, by_library, described
from robot_forgetting.machine.user_modules import PLACES, hidden, import_module
from robot_forgetting.ranges import Pixels, Plain, Range, Steps, check_fields
from robot_forgetting.tasks.simulator.pictures import Overlay, read_photo
from robot_forgetting.tasks.simulator.robots import find_robot

VIDEO_PIXELS = 256


Metres = Annotated[float, Range(-100, 100)]


class View(TypedDict, total=False):
    """Where the camera stands; or the size and the intrinsic matrix of the robot's own, see ``SimulationSpec``."""

    eye: tuple[Metres, Metres, Metres]
    target: tuple[Metres, Metres, Metres]
    fov: Annotated[float, Range(0.01, 3.1)]
    size: tuple[Pixels, Pixels]
    intrinsic: list[Annotated[float, Range(0, 100_000)]]
    sensor: str


@dataclass(frozen=True)
class SimulationSpec:
    """What a worker needs to build an environment; plain values only.

    env_id: the environment's registered id; env_arguments: its own
    image_size: pixels a side of the policy's square picture
    camera: {"eye": [x, y, z], "target": [x, y, z], "fov": radians} in metres; or {"size": [width, height],
        "intrinsic": [fx, fy, cx, cy]} in pixels: the robot's own camera, its picture squeezed into a square.
        "sensor": the name of one of the environment's cameras, default the first; one that is given alone stays where
        the environment put it (a wrist camera)
    render: "low_poly" (the Panda as collision meshes, minimal shader) or "stock" (ManiSkill's meshes, default shader);
        demonstrations and evaluation share it
    modules: imported first, so that their environments are registered
    expert: "package.module.function" that maps the unwrapped environment to a 7-D command, or None
    video: whether there is a larger picture, too
    robot: a name in ``robots.ROBOTS``, or the dotted path of a ``Robot``
    overlay: whether the background is a photo (ManiSkill's digital twins)
    full_pictures: draw the camera's own size and average it down, as the original does, in place of drawing small
    ends_on_success: else the episode runs to its time limit and the last step's success counts
    rotation, gripper: what a policy's commands mean, see ``conventions.Boundary``; None: what the robot takes
    """

    env_id: str
    instruction: str
    max_steps: Steps = 60
    image_size: Pixels = 64
    camera: View = field(default_factory=dict)
    render: str = "low_poly"
    modules: tuple[str, ...] = ()
    env_arguments: dict[str, Plain] = field(default_factory=dict)
    expert: str | None = None
    video: bool = False
    robot: str = "panda"
    overlay: bool = False
    full_pictures: bool = False
    ends_on_success: bool = True
    rotation: str | None = None
    gripper: str | None = None

    def check(self) -> None:
        """``UserError`` for a value outside its range, and unless the camera is wholly described."""
        check_fields(self)
        given = self.camera.keys() - {"sensor"}
        if given not in ({"eye", "target", "fov"}, {"size", "intrinsic"}, set()):
            raise UserError(
                f"camera has {', '.join(sorted(given))}; give eye, target and fov, or size and intrinsic, or nothing "
                "but the name of a sensor"
            )
        if self.full_pictures and "size" not in self.camera:
            raise UserError("full_pictures needs camera.size, the original's; leave full_pictures out")


def make_environment(spec: SimulationSpec, num_envs: int = 1, backend: str = "physx_cpu"):
    """ManiSkill's environment, without gymnasium's wrappers.

    It makes no observations of its own: pictures are taken from its cameras, and what else it would tell (and ask its
    flags for, which a subclass may have replaced) is not used.
    """
    if spec.render not in ("low_poly", "stock"):
        raise UserError(f"unknown render option '{spec.render}'; choose one of: low_poly, stock")
    import gymnasium
    import mani_skill.envs  # registers the stock environments
    from mani_skill.utils import download_asset
    from mani_skill.utils.registration import REGISTERED_ENVS

    mani_skill.logger.setLevel(logging.ERROR)  # its warnings (no CUDA renderer, default poses) need no action

    from robot_forgetting.machine import shaders
    from robot_forgetting.tasks.simulator import low_poly

    shaders.install()
    if spec.render == "low_poly":
        low_poly.install()
    elif low_poly.installed() and spec.robot == "panda":
        raise UserError("this process already draws low_poly and cannot draw stock too; start another one for it")
    for module in (*spec.modules, *spec.env_id.split(":")[:-1]):  # "my_module:MyTask-v1" is gymnasium's own way
        try:
            import_module(module)
        except Exception as error:  # a user's module may fail in any way while it is imported
            raise UserError(
                f"cannot import '{module}' ({blamed(error) or described(error)}); {hidden(module) or PLACES}"
            ) from error
    robot = find_robot(spec.robot)
    download_asset.prompt_yes_no = no_download
    known = REGISTERED_ENVS.get(spec.env_id.rpartition(":")[2])
    modes = ["none"] if known is None else known.cls.SUPPORTED_OBS_MODES
    shader = "minimal" if spec.render == "low_poly" else "default"
    drawn = tuple(spec.camera["size"]) if spec.full_pictures else (spec.image_size, spec.image_size)
    sensors = {**camera_settings(spec.camera, drawn), "shader_pack": shader}
    video = {**camera_settings(spec.camera, (VIDEO_PIXELS, VIDEO_PIXELS)), "shader_pack": shader}
    try:
        env = gymnasium.make(
            spec.env_id,
            obs_mode="none" if "none" in modes else modes[0],  # digital twins insist on one
            control_mode=robot.control_mode,
            num_envs=num_envs,
            sim_backend=backend,
            render_backend=drawn_by(),
            reward_mode="none",
            render_mode="rgb_array" if spec.video else None,
            sensor_configs={spec.camera["sensor"]: sensors} if "sensor" in spec.camera else sensors,
            human_render_camera_configs=video,
            **spec.env_arguments,
        ).unwrapped
    except gymnasium.error.Error as error:  # unknown name, namespace or version; malformed id
        raise UserError(
            f"unknown ManiSkill environment '{spec.env_id}' ({str(error).rstrip('.')}); one of your own is registered "
            "by a module that task.modules names: `modules: [my_env]`"
        ) from error
    except Exception as error:
        if isinstance(error, UserError) or num_envs > 1 or not by_library(error):  # of a batch its size may be wrong
            raise
        raise _refused(spec, error) from error
    check_robot(env, spec)
    return env


def drawn_by() -> str:
    """ManiSkill's name of what draws: "gpu" where a CUDA device can, else "cpu", which is Vulkan's own choice.

    Left alone, ManiSkill insists on any CUDA device, also on one without a Vulkan driver (a container without the
    graphics capability), although lavapipe would draw.
    """
    import sapien

    try:
        return "gpu" if sapien.Device("cuda").can_render() else "cpu"
    except RuntimeError:  # no CUDA device
        return "cpu"


def _refused(spec: SimulationSpec, error: Exception) -> UserError:
    """What to say where ManiSkill itself refused to build an environment."""
    text = str(error)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        given = ", ".join(sorted(spec.env_arguments))
        return UserError(f"environment '{spec.env_id}' does not take all of: {given} ({error})")
    sensor = spec.camera.get("sensor")
    if sensor and f"{sensor} is not a valid attribute" in text:
        return UserError(f"environment '{spec.env_id}' has no camera '{sensor}'; leave camera.sensor out")
    return UserError(
        f"ManiSkill cannot build environment '{spec.env_id}' for robot={spec.robot}: {described(error)} (a robot task "
        "needs one arm with a gripper that this robot's controller moves, and its assets)"
    )


def no_download(message: str) -> bool:
    """In the place of ManiSkill's question whether to download: a worker has nobody to ask."""
    said = " ".join(message.partition("Would you like")[0].split())
    raise UserError(f"{said} Download with: python -m mani_skill.utils.download_asset NAME")


def check_robot(env, spec: SimulationSpec) -> None:
    """``UserError`` unless the environment has one robot, which is drawn in the style of its surroundings."""
    robots = env.robot_uids if isinstance(env.robot_uids, tuple | list) else [env.robot_uids]
    if env.agent is None or len(robots) != 1:
        count = 0 if env.agent is None else len(robots)
        raise UserError(f"environment '{spec.env_id}' has {count} robots; a robot task has one arm with a gripper")
    usable = spec.robot == "panda" and "gripper" in env.agent.controller.controllers  # else its controller says more
    if usable and spec.render == "low_poly" and not getattr(env.agent, "low_poly", False):
        raise UserError(
            f"render=low_poly covers the robot 'panda', but environment '{spec.env_id}' has '{env.agent.uid}', whose "
            "stock meshes would stand among plain shapes; use render=stock, or `env_arguments: {robot_uids: panda}`"
        )


def chosen_sensor(env, spec: SimulationSpec):
    """ManiSkill's camera that the policy looks through."""
    names = list(env._sensors)
    if not names:
        raise UserError(f"environment '{spec.env_id}' has no camera; give its class `_default_sensor_configs`")
    return env._sensors[spec.camera.get("sensor", names[0])]


def cameras_of(env, spec: SimulationSpec, kind: type) -> dict:
    """The policy's camera and, where asked for, the one for videos, each of a ``kind`` of ``pictures``, with the photo
    that ManiSkill would lay under it."""
    seen = {"image": (chosen_sensor(env, spec), spec.image_size)}
    if spec.video:
        seen["frame"] = next(iter(env._human_render_cameras.values())), VIDEO_PIXELS
    return {
        key: kind(sensor, (pixels, pixels), overlay_of(env, sensor) if spec.overlay else None)
        for key, (sensor, pixels) in seen.items()
    }


def seen_through(env, spec: SimulationSpec) -> str:
    """'base_camera (of base_camera, hand_camera; camera.sensor chooses)'."""
    names = list(env._sensors)
    chosen = spec.camera.get("sensor", names[0])
    return chosen if len(names) == 1 else f"{chosen} (of {', '.join(names)}; camera.sensor chooses)"


def photo_of(env) -> str:
    """The background's file; an environment may have another one for each episode."""
    return next(iter(env.rgb_overlay_paths.values()))


def overlay_of(env, sensor) -> Overlay:
    """The environment's photo in the size of one of its cameras, and what it does not hide."""
    photo = read_photo(photo_of(env), (sensor.config.width, sensor.config.height))
    return Overlay(photo, env._segmentation_ids_to_keep.tolist())


def camera_settings(camera: dict, size: tuple[int, int]) -> dict:
    """ManiSkill's camera arguments for a picture of ``size`` (width, height); see ``SimulationSpec.camera``."""
    settings = {"width": size[0], "height": size[1]}
    if "eye" not in camera and "intrinsic" not in camera:
        return settings
    if "intrinsic" not in camera:
        from mani_skill.utils import sapien_utils

        return {**settings, "pose": sapien_utils.look_at(camera["eye"], camera["target"]), "fov": camera["fov"]}
    across, down = (pixels / own for pixels, own in zip(size, camera["size"], strict=True))
    fx, fy, cx, cy = camera["intrinsic"]
    matrix = [[fx * across, 0, cx * across], [0, fy * down, cy * down], [0, 0, 1]]
    return {**settings, "intrinsic": np.array(matrix)}
