"""One ManiSkill3 environment in one process: reset, step and picture, without the per-step overhead of ``env.step``.

Building and resetting are ManiSkill's own. A step lets the robot's ``Controller`` set the drive targets, runs the
physics, and takes the picture directly. Success is always the environment's own ``evaluate``.
"""

from __future__ import annotations

import numpy as np
import torch

from robot_forgetting.contracts import kind_of
from robot_forgetting.errors import UserError, blamed, described, fault
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.tasks.simulator.conventions import Boundary
from robot_forgetting.tasks.simulator.environment import SimulationSpec, cameras_of, make_environment, photo_of
from robot_forgetting.tasks.simulator.pictures import Camera
from robot_forgetting.tasks.simulator.robots import find_robot

STILL = 0.01  # metres; a commanded step under it is no motion
COMMAND = "x, y, z, three rotations, gripper"


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
        self._boundary = Boundary(robot, spec.rotation, spec.gripper)
        self._bind()
        for actor in self.env._hidden_objects:
            actor.hide_visual()
        evaluated(self.env, 1)  # a task without "success", or an expert that raises, is not worth an episode
        if self.expert is not None:
            self.expert_command()

    def _bind(self) -> None:
        """Takes hold of robot and cameras, which an environment that builds itself anew for every episode replaces."""
        self._sensors = self.env._sensors
        self._controller = load_object(find_robot(self.spec.robot).controller)(self.env)
        self._cameras = cameras_of(self.env, self.spec, Camera)
        self._shown = photo_of(self.env) if self.spec.overlay else None

    def reset(self, seed: int, options: dict | None = None) -> dict:
        """Starts the episode that ``seed`` (and ``options``, ManiSkill's) fixes and returns its first observation."""
        self._start(seed, options)
        return self.observe()

    def _start(self, seed: int, options: dict | None = None) -> None:
        renew_physics(self.env)
        self.env.reset(seed=seed, options=options or {})
        if self.env._sensors is not self._sensors:
            self._bind()
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
        (flags,) = evaluated(env, 1)
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


def evaluated(env, count: int) -> list[dict]:
    """The flags of ``count`` environments, among which there must be "success"."""
    found = env.evaluate()
    if not isinstance(found, dict):
        raise fault(env, "evaluate", f"gives {kind_of(found)}; return a dict of flags with a 'success', bool [{count}]")
    flags = flags_of(found, count)
    if "success" not in flags[0]:
        given = kind_of(found["success"]) + " as 'success'" if "success" in found else "no 'success'"
        others = ", ".join(found) or "nothing"
        raise fault(env, "evaluate", f"gives {given} (it gives {others}); a task needs it, a bool tensor [{count}]")
    return flags


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
    success = flags["success"]
    done = flags.get("fail", False) or steps >= spec.max_steps or (success and spec.ends_on_success)
    return float(success and done), success, done


def _plain(flag) -> bool | int:
    """A flag as a plain value: numbers that are not truth values (an episode's configuration) stay numbers."""
    return int(flag) if flag.dtype in (torch.int32, torch.int64) else bool(flag)


def blank(spec: SimulationSpec) -> dict:
    """The observation of an episode that ended in a crash."""
    return {"image": np.zeros((spec.image_size, spec.image_size, 3), np.uint8), "instruction": spec.instruction}


def guarded(simulations: list[Simulation], spec: SimulationSpec, slot: int, action) -> dict:
    """Runs one slot's work; an exception there ends that episode only, and the slot gets a fresh environment."""
    try:
        return action(simulations[slot])
    except CommandError as error:  # refused before anything moved: the environment is sound
        return {"observation": blank(spec), "done": True, "error": str(error)}
    except Exception as error:
        simulations[slot] = Simulation(spec)
        return {"observation": blank(spec), "done": True, "error": blamed(error) or described(error)}
