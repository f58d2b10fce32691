"""``simulation=gpu``: all slots of a task in one ManiSkill environment, whose physics and pictures are made on the GPU.

Two kinds of worker processes take part. One holds the batch. The others, the CPU path's, make initial states:
ManiSkill draws those of a batch with one generator, so that they would depend on the slot and on who else starts. In
their place a one-environment simulation is reset with the episode's seed, and its state put into the slot: an episode
starts as it does on the CPU. (Processes of their own, because PhysX on the GPU must be enabled before anything else of
PhysX is used in a process, and because an error of CUDA ruins the process it happens in.)

What follows the start is repeatable only as far as PhysX on the GPU is: no episode has a new scene of its own (compare
``simulation.renew_physics``), and one scene solves the contacts of all slots. Success, time limits and commands are
those of the CPU path; docs/gpu_simulation.md says how well inverse kinematics agrees.
"""

from __future__ import annotations

import numpy as np
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.machine.device import unusable_gpu
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.tasks.simulator.conventions import Boundary
from robot_forgetting.tasks.simulator.environment import SimulationSpec, cameras_of, make_environment, photo_of
from robot_forgetting.tasks.simulator.pictures import BatchedCamera
from robot_forgetting.tasks.simulator.robots import find_robot
from robot_forgetting.tasks.simulator.simulation import (
    CommandError,
    Simulation,
    checked,
    evaluated,
    guarded,
    outcome,
    renew_physics,
    state_of,
)

GPU, CPU = "physx_cuda", "physx_cpu"  # ManiSkill's names; the second holds one environment, for tests
ELSE = "use simulation=cpu, with processes= for more cores"


def require(name: str, spec: SimulationSpec) -> None:
    """``UserError`` where a task cannot be simulated on the GPU, or this machine has none that torch can use."""
    if find_robot(spec.robot).batched is None:
        raise UserError(f"robot '{spec.robot}' of task '{name}' has no controller for simulation=gpu; {ELSE}")
    if spec.full_pictures and spec.image_size > min(spec.camera.get("size", [spec.image_size])):
        raise UserError(
            f"task '{name}': simulation=gpu only averages full pictures down, and image_size={spec.image_size} is more "
            f"than the camera has; {ELSE}"
        )
    if reason := unusable_gpu():
        raise UserError(f"simulation=gpu, but torch cannot use the GPU: {reason}; {ELSE}")
    if not torch.cuda.is_available():
        raise UserError(f"simulation=gpu needs an NVIDIA GPU and its driver (nvidia-smi shows them); {ELSE}")


class BatchedSimulation:
    """``count`` slots in one ManiSkill environment; what the batch's worker holds.

    Commands are those of ``Simulation``. All slots move in every step; one without a command stays where it is and
    does with its gripper what it did before (at first: open), or ``Robot.gripper_still``. A slot's instruction is the
    one at its episode's start, unless the environment has ``instructions`` for the present step. An
    environment's method ``dress(slots)`` gives some slots the looks of their episodes, where a state does not.
    """

    def __init__(self, spec: SimulationSpec, count: int, backend: str):
        robot = find_robot(spec.robot)
        self.spec, self.count = spec, count
        self.env = make_environment(spec, count, backend)
        if backend == GPU and not self.env.backend.render_device.is_cuda():
            self.env.close()
            raise UserError(f"pictures cannot be drawn on the GPU (robot-forgetting doctor: Vulkan); {ELSE}")
        self._controller = load_object(robot.batched)(self.env)
        if self._controller.before_simulation_step is not None:
            self.env._before_simulation_step = self._controller.before_simulation_step
        self._boundaries = [Boundary(robot, spec.rotation, spec.gripper) for _ in range(count)]
        self._cameras = cameras_of(self.env, spec, BatchedCamera)
        self._seeds, self._steps, self._instructions = [0] * count, [0] * count, [spec.instruction] * count
        self._photos = [photo_of(self.env)] * count if spec.overlay else None
        self._still = robot.gripper_still
        self._idle = 1.0 if self._still is None else self._still
        self._grippers = np.full(count, self._idle, np.float32)
        self._stepped: dict[int, dict] = {}

    def step(self, commands: dict[int, np.ndarray]) -> None:
        """Executes commands [7] of some slots; ``finish`` tells what came of it."""
        env, moves = self.env, np.zeros((self.count, 7), np.float32)
        moves[:, 6] = self._grippers
        self._stepped = {}
        for slot, command in commands.items():
            try:
                values = checked(command, f"{self.spec.env_id} was given a command")
            except CommandError as error:  # ends this episode; nobody asks how its slot goes on
                self._stepped[slot] = {"done": True, "error": str(error)}
            else:
                moves[slot] = self._boundaries[slot].to_robot(values)
        if self._still is None:
            self._grippers = moves[:, 6].copy()
        failed = self._controller.apply(torch.from_numpy(moves).to(env.device)) or {}
        self._stepped |= {slot: {"done": True, "error": why} for slot, why in failed.items() if slot in commands}
        if env.gpu_sim_enabled:
            env.scene.px.gpu_apply_articulation_target_position()
        env._step_action(None)
        env._elapsed_steps += 1
        flags = evaluated(env, self.count)
        for slot in commands.keys() - self._stepped.keys():
            self._steps[slot] += 1
            reward, success, done = outcome(self.spec, self._steps[slot], flags[slot])
            self._stepped[slot] = {"reward": reward, "success": success, "done": done, "info": flags[slot]}

    def finish(self, starts: dict[int, dict]) -> list[tuple[int, dict]]:
        """Begins episodes (slot -> ``Simulation.initial_state``, with its seed); then a ``Transition``'s fields, with
        pictures, for each of their slots and of those that were stepped."""
        if starts:
            self._start(starts)
        rows = self._observe()
        answers = [
            (slot, {"observation": rows[slot]} | self._stepped.get(slot, {})) for slot in [*starts, *self._stepped]
        ]
        self._stepped = {}
        return answers

    def abandon(self) -> None:
        """Before another user: nobody will ask what came of a step that is still under way."""
        self._stepped = {}

    def _start(self, starts: dict[int, dict]) -> None:
        starts = dict(sorted(starts.items()))  # ManiSkill sets states by a mask, which knows no other order
        env, slots = self.env, torch.tensor(list(starts), device=self.env.device)
        for slot, start in starts.items():
            self._seeds[slot], self._steps[slot], self._instructions[slot] = start["seed"], 0, start["instruction"]
            self._boundaries[slot].reset()
            self._grippers[slot] = self._idle
        if not env.gpu_sim_enabled:
            renew_physics(env)
        env.reset(seed=self._seeds, options={"env_idx": slots})  # what the task keeps of an episode begins anew
        env.set_state_dict(self._stacked([start["state"] for start in starts.values()]), slots)
        for slot, start in starts.items():
            for name, row in start["buffers"].items():  # a task may keep some of them in certain episodes only
                kept = getattr(env, name, None)
                if isinstance(kept, torch.Tensor) and kept.shape == (self.count, *row.shape[1:]):  # else a constant
                    kept[slot] = torch.from_numpy(row)[0].to(kept)
        self._controller.begin(slots)
        if hasattr(env, "dress"):
            env.dress(list(starts))
        if self._photos and self._photos != (photos := self._photos_of(starts)):
            self._photos = photos
            for camera in self._cameras.values():
                camera.change_photos(photos)
        for actor in env._hidden_objects:
            actor.hide_visual()

    def _photos_of(self, starts: dict[int, dict]) -> list[str]:
        """Of all slots, once these episodes have begun."""
        return [starts[slot]["photo"] if slot in starts else photo for slot, photo in enumerate(self._photos)]

    def _stacked(self, states: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
        """One state with a row per episode; ``UserError`` unless the batch consists of the same things."""
        device, own = self.env.device, state_of(self.env)
        widths = [
            {(kind, key): value.shape[1] for kind, rows in state.items() for key, value in rows.items()}
            for state in (own, states[0])
        ]
        if widths[0] != widths[1]:
            odd = ", ".join(sorted(key for _, key in dict(widths[0].items() ^ widths[1].items())))
            raise UserError(
                f"environment '{self.spec.env_id}' has other objects in a batch than alone ({odd}), so that an episode "
                f"cannot start from its seed; {ELSE}"
            )
        return {
            kind: {
                key: torch.from_numpy(np.concatenate([state[kind][key] for state in states])).to(device) for key in rows
            }
            for kind, rows in own.items()
        }

    def _observe(self) -> list[dict]:
        """Pictures and the instruction of every slot."""
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=self.spec.video)
        pictures = {key: camera.take() for key, camera in self._cameras.items()}
        told = self.env.instructions if hasattr(type(self.env), "instructions") else self._instructions
        return [
            {key: rows[slot] for key, rows in pictures.items()} | {"instruction": told[slot]}
            for slot in range(self.count)
        ]

    def close(self) -> None:
        self.env.close()


def initial_states(simulations: list[Simulation], spec: SimulationSpec, seeds: list[int]) -> list[dict]:
    """``Simulation.initial_state`` of each seed, or the fields of the ``Transition`` that says why there is none."""
    if simulations[0].env.reconfiguration_freq:
        raise UserError(f"environment '{spec.env_id}' builds other objects for every episode, a batch cannot; {ELSE}")
    return [
        guarded(simulations, spec, 0, lambda simulation, seed=seed: {"seed": seed, **simulation.initial_state(seed)})
        for seed in seeds
    ]
