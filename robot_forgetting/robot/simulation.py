"""One ManiSkill3 environment in one process: reset, step and picture, without the per-step overhead of ``env.step``.

Building and resetting are ManiSkill's own. A step lets the robot's ``Controller`` set the drive targets, runs the
physics, and takes the picture directly. Success is always the environment's own ``evaluate``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.robot.conventions import Boundary
from robot_forgetting.robot.pictures import Camera, Overlay, read_photo
from robot_forgetting.robot.robots import find_robot
from robot_forgetting.user_modules import PLACES, hidden, import_module, load_object

VIDEO_PIXELS = 256
STILL = 0.01  # metres; a commanded step under it is no motion
COMMAND = "x, y, z, three rotations, gripper"


@dataclass(frozen=True)
class SimulationSpec:
    """What a worker needs to build an environment; plain values only.

    modules: imported first, so that their environments are registered
    camera: {"eye": [x, y, z], "target": [x, y, z], "fov": radians} in metres; or {"size": [width, height],
        "intrinsic": [fx, fy, cx, cy]} in pixels: the robot's own camera, its picture squeezed into a square
    render: "low_poly" (the Panda as collision meshes, minimal shader) or "stock" (ManiSkill's meshes, default shader)
    robot: a name in ``robots.ROBOTS``, or the dotted path of a ``Robot``
    overlay: whether the background is a photo (ManiSkill's digital twins)
    full_pictures: draw the camera's own size and average it down, as the original does, in place of drawing small
    ends_on_success: else the episode runs to its time limit and the last step's success counts
    rotation, gripper: what a policy's commands mean, see ``conventions.Boundary``; None: what the robot takes
    """

    env_id: str
    instruction: str
    max_steps: int
    image_size: int
    camera: dict
    render: str = "low_poly"
    modules: tuple[str, ...] = ()
    env_arguments: dict = field(default_factory=dict)
    expert: str | None = None  # "package.module.function"
    video: bool = False
    robot: str = "panda"
    overlay: bool = False
    full_pictures: bool = False
    ends_on_success: bool = True
    rotation: str | None = None
    gripper: str | None = None


def checked(command, where: str) -> np.ndarray:
    """A command as [7] float64; a ``CommandError``, which begins with ``where``, unless it is seven finite numbers."""
    try:
        values = np.asarray(command, dtype=np.float64)
    except (TypeError, ValueError):
        raise CommandError(f"{where} of {type(command).__name__}; give 7 numbers: {COMMAND}") from None
    if values.shape != (7,):
        raise CommandError(f"{where} of shape {list(values.shape)}; give 7 numbers: {COMMAND}")
    if not np.isfinite(values).all():
        shown = ", ".join(f"{value:.3g}" for value in values)
        raise CommandError(f"{where} that is not finite, [{shown}]; look at what computes it ({COMMAND})")
    return values


class CommandError(UserError):
    """A command that no robot could execute; the simulation is as it was before."""


class Simulation:
    """One environment slot.

    Commands are 7-vectors: x, y, z, three rotations, gripper, in the units of the robot. The Panda's are in [-1, 1]
    (times 0.1 m, times 0.1 rad, +1 opens), the WidowX's metres, radians of a rotation vector, +1 opens.
    """

    def __init__(self, spec: SimulationSpec):
        self.env = make_environment(spec)
        self.spec = spec
        self.expert = None if spec.expert is None else load_object(spec.expert)
        self.steps = 0
        robot = find_robot(spec.robot)
        self.env.reset(seed=0)
        self._controller = load_object(robot.controller)(self.env)
        self._boundary = Boundary(robot, spec.rotation, spec.gripper)
        self._cameras = {"image": self._camera(self.env._sensors, spec.image_size)}
        if spec.video:
            self._cameras["frame"] = self._camera(self.env._human_render_cameras, VIDEO_PIXELS)
        for actor in self.env._hidden_objects:
            actor.hide_visual()

    def _camera(self, sensors: dict, pixels: int) -> Camera:
        """The first of the environment's cameras, with the photo that ManiSkill would lay under it."""
        sensor = next(iter(sensors.values()))
        overlay = None
        if self.spec.overlay:
            self._shown, overlay = photo_of(self.env), overlay_of(self.env, sensor)
        return Camera(sensor, (pixels, pixels), overlay)

    def reset(self, seed: int, options: dict | None = None) -> dict:
        """Starts the episode that ``seed`` (and ``options``, ManiSkill's) fixes and returns its first observation."""
        self._start(seed, options)
        return self.observe()

    def _start(self, seed: int, options: dict | None = None) -> None:
        renew_physics(self.env)
        self.env.reset(seed=seed, options=options or {})
        for actor in self.env._hidden_objects:
            actor.hide_visual()
        if self.spec.overlay and photo_of(self.env) != self._shown:
            self._shown = photo_of(self.env)
            for camera in self._cameras.values():
                camera.change_photo(self._shown)
        self._controller.reset()
        self._boundary.reset()
        self.steps = 0

    def initial_state(self, seed: int) -> dict:
        """What another environment of the same id needs to start the episode of ``seed``; arrays have a row for it.

        state: ManiSkill's state dictionary
        buffers: the tensors that the task itself keeps of an episode (a goal that is no object, say)
        photo: the background's file, where there is one
        """
        self._start(seed)
        kept = {key: value for key, value in vars(self.env).items() if isinstance(value, torch.Tensor)}
        kept.pop("_elapsed_steps", None)  # ManiSkill's own
        buffers = {key: value.numpy().copy() for key, value in kept.items() if value.shape[:1] == (1,)}
        state = {kind: {key: row.numpy() for key, row in rows.items()} for kind, rows in state_of(self.env).items()}
        for rows in state.get("articulations", {}).values():  # PhysX tells a base's place 2e-8 m off where it was put,
            rows[:, :3] = rows[:, :3].round(6)  # which contacts would magnify
        photo = photo_of(self.env) if self.spec.overlay else None
        return {"state": state, "buffers": buffers, "instruction": self.instruction, "photo": photo}

    def observe(self) -> dict:
        """Pictures (uint8 [H, W, 3]) and the instruction; ``frame`` is the larger one for videos, where asked for."""
        self.env.scene.update_render()
        return {key: camera.take() for key, camera in self._cameras.items()} | {"instruction": self.instruction}

    @property
    def instruction(self) -> str:
        """The environment's, where it has one for the episode, or for this step of it; else the task's."""
        return getattr(self.env, "instruction", None) or self.spec.instruction

    def step(self, command: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Executes one command; returns observation, reward (1 on success), success, done, ManiSkill's flags."""
        command = checked(command, f"{self.spec.env_id} was given a command")
        controller = self._controller
        controller.apply(self._boundary.to_robot(command))
        env = self.env
        env._before_control_step()
        for _ in range(env._sim_steps_per_control):
            if controller.before_simulation_step is not None:
                controller.before_simulation_step()
            env._before_simulation_step()
            env.scene.step()
            env._after_simulation_step()
        env._after_control_step()
        env._elapsed_steps += 1
        self.steps += 1
        (flags,) = flags_of(env.evaluate(), 1)
        return self.observe(), *outcome(self.spec, self.steps, flags), flags

    def expert_command(self) -> np.ndarray:
        """The scripted expert's command for the current state, [7] float32 in [-1, 1]."""
        command = checked(self.expert(self.env), f"the expert {self.spec.expert} gave a command")
        return np.clip(self._boundary.to_policy(command).astype(np.float32), -1.0, 1.0)

    def idle(self, command: np.ndarray) -> bool:
        """Whether the expert that gave this command [7] has nothing left to do once the task has succeeded.

        A hand that must let go has done so when it opens. The Google robot succeeds with a closed one as well (a can
        held up, a fist on a drawer), so there the hand must have stopped, but for what noise it makes up for.
        """
        robot = find_robot(self.spec.robot)
        if robot.gripper == "+1 opens":
            return command[6] > 0
        return float(np.linalg.norm(command[:3])) * robot.metres_per_unit < STILL

    def close(self) -> None:
        self.env.close()


def make_environment(spec: SimulationSpec, num_envs: int = 1, backend: str = "physx_cpu", obs_mode: str | None = None):
    """ManiSkill's environment, without gymnasium's wrappers."""
    if spec.render not in ("low_poly", "stock"):
        raise UserError(f"unknown render option '{spec.render}'; choose one of: low_poly, stock")
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers the stock environments)

    mani_skill.logger.setLevel(logging.ERROR)  # its warnings (no CUDA renderer, default poses) need no action

    from robot_forgetting.robot import low_poly, shaders

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
                f"cannot import '{module}' ({type(error).__name__}: {error}); {hidden(module) or PLACES}"
            ) from error
    robot = find_robot(spec.robot)
    if obs_mode is None:
        obs_mode = "rgb+segmentation" if spec.overlay else "rgb"
    shader = "minimal" if spec.render == "low_poly" else "default"
    drawn = tuple(spec.camera["size"]) if spec.full_pictures else (spec.image_size, spec.image_size)
    video = {**camera_settings(spec.camera, (VIDEO_PIXELS, VIDEO_PIXELS)), "shader_pack": shader}
    try:
        return gymnasium.make(
            spec.env_id,
            obs_mode=obs_mode,
            control_mode=robot.control_mode,
            num_envs=num_envs,
            sim_backend=backend,
            render_backend=drawn_by(),
            reward_mode="none",
            render_mode="rgb_array" if spec.video else None,
            sensor_configs={**camera_settings(spec.camera, drawn), "shader_pack": shader},
            human_render_camera_configs=video,
            **spec.env_arguments,
        ).unwrapped
    except gymnasium.error.Error as error:  # unknown name, namespace or version; malformed id
        raise UserError(f"unknown ManiSkill environment '{spec.env_id}'; {error}") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        given = ", ".join(sorted(spec.env_arguments))
        raise UserError(f"environment '{spec.env_id}' does not take all of: {given} ({error})") from error


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


def photo_of(env) -> str:
    """The background's file; an environment may have another one for each episode."""
    return next(iter(env.rgb_overlay_paths.values()))


def overlay_of(env, sensor) -> Overlay:
    """The environment's photo in the size of one of its cameras, and what it does not hide."""
    photo = read_photo(photo_of(env), (sensor.config.width, sensor.config.height))
    return Overlay(photo, env._segmentation_ids_to_keep.tolist())


def state_of(env) -> dict[str, dict[str, torch.Tensor]]:
    """ManiSkill's state of actors and articulations, name -> [N, D]; controllers start anew with every episode."""
    return {kind: rows for kind, rows in env.get_state_dict().items() if kind != "controller"}


def renew_physics(env) -> None:
    """Moves everything into a new, empty PhysX scene (0.3 ms), and wakes it.

    A PhysX scene remembers earlier contacts in the order in which it solves new ones, and a body how long it has been
    at rest: without this, an episode would depend on those before it, by as much as contacts are chaotic.
    """
    import sapien

    scene = env.scene
    env._set_scene_config()  # SAPIEN's settings are the process's, and another environment's may stand there
    old, physics = scene.sub_scenes[0], sapien.physx.PhysxCpuSystem()
    physics.timestep = scene.px.timestep
    new = sapien.Scene([physics, old.render_system])
    entities = old.entities
    for entity in entities:
        old.remove_entity(entity)
    for entity in entities:
        new.add_entity(entity)
    for body in physics.rigid_dynamic_components:
        if not body.kinematic:
            body.wake_up()
    scene.px, scene.sub_scenes[0] = physics, new


def camera_settings(camera: dict, size: tuple[int, int]) -> dict:
    """ManiSkill's camera arguments for a picture of ``size`` (width, height); see ``SimulationSpec.camera``."""
    settings = {"width": size[0], "height": size[1]}
    if "intrinsic" not in camera:
        from mani_skill.utils import sapien_utils

        return {**settings, "pose": sapien_utils.look_at(camera["eye"], camera["target"]), "fov": camera["fov"]}
    across, down = (pixels / own for pixels, own in zip(size, camera["size"], strict=True))
    fx, fy, cx, cy = camera["intrinsic"]
    matrix = [[fx * across, 0, cx * across], [0, fy * down, cy * down], [0, 0, 1]]
    return {**settings, "intrinsic": np.array(matrix)}


def flags_of(found: dict, count: int) -> list[dict]:
    """What ``evaluate`` says of each of ``count`` environments, where it says one thing of each: [N] or [N, 1]."""
    shapes = {(count,), (count, 1)}
    columns = {
        key: value.reshape(-1).cpu()
        for key, value in found.items()
        if isinstance(value, torch.Tensor) and (value.shape in shapes or value.numel() == count == 1)
    }
    return [{key: _plain(column[index]) for key, column in columns.items()} for index in range(count)]


def outcome(spec: SimulationSpec, steps: int, flags: dict) -> tuple[float, bool, bool]:
    """Reward (1 on success), success and whether the episode is over, after ``steps`` steps."""
    success = flags.get("success", False)
    done = flags.get("fail", False) or steps >= spec.max_steps or (success and spec.ends_on_success)
    return float(success and done), success, done


def _plain(flag) -> bool | int:
    """A flag as a plain value: numbers that are not truth values (an episode's configuration) stay numbers."""
    return int(flag) if flag.dtype in (torch.int32, torch.int64) else bool(flag)
