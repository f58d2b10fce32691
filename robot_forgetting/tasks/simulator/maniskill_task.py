"""A robot task on ManiSkill3, described by plain values: a yaml file is enough to add one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, TypedDict

from robot_forgetting.errors import UserError, unknown
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.ranges import Pixels, Plain, Processes, Range, Steps
from robot_forgetting.task import Demonstration, Task, VectorEnv
from robot_forgetting.tasks.simulator.conventions import Boundary
from robot_forgetting.tasks.simulator.environment import SimulationSpec
from robot_forgetting.tasks.simulator.robots import find_robot

Metres = Annotated[float, Range(-100, 100)]


class View(TypedDict, total=False):
    """Where the camera stands; or the size and the intrinsic matrix of the robot's own, see ``SimulationSpec``."""

    eye: tuple[Metres, Metres, Metres]
    target: tuple[Metres, Metres, Metres]
    fov: Annotated[float, Range(0.01, 3.1)]
    size: tuple[Pixels, Pixels]
    intrinsic: list[Annotated[float, Range(0, 100_000)]]
    sensor: str


class Noise(TypedDict):
    """See ``workers._demonstrate``."""

    small: Annotated[float, Range(0, 10)]
    kick: Annotated[float, Range(0, 10)]
    kick_probability: Annotated[float, Range(0, 1)]


class ManiSkillTask(Task):
    """A stock or user-defined ManiSkill environment with an instruction, a camera, and perhaps an expert.

    env_id: the environment's registered id
    expert: "package.module.function" that maps the unwrapped environment to a 7-D command, or None
    modules: imported in the workers first (a module that registers ``env_id``); the expert's is added
    spawn: "stock" (ManiSkill's initial states), or a name the environment's own ``spawn`` argument understands
    camera: eye and target in metres, fov in radians, and `sensor`, the name of one of several cameras; the square
        picture has ``image_size`` pixels a side
    render: "low_poly" or "stock"; demonstrations and evaluation share it
    noise: disturbance of demonstrations, see ``workers._demonstrate``
    statistics: the policy's key for the ranges of commands; null: the robot's
    processes: worker processes (default: one per core, at most 2 per 16 environments)
    simulation: "cpu", or "gpu": all environments in one batch on an NVIDIA GPU, see ``batched.py``
    robot, overlay, full_pictures, ends_on_success, rotation, gripper: see ``SimulationSpec``
    """

    def __init__(
        self,
        name: str,
        env_id: str,
        instruction: str,
        *,
        expert: str | None = None,
        modules: list[str] | tuple[str, ...] = (),
        spawn: str = "stock",
        max_steps: Steps = 60,
        camera: View | None = None,
        image_size: Pixels = 64,
        render: str = "low_poly",
        env_arguments: dict[str, Plain] | None = None,
        noise: Noise | None = None,
        statistics: str | None = None,
        processes: Processes | None = None,
        simulation: str = "cpu",
        robot: str = "panda",
        overlay: bool = False,
        full_pictures: bool = False,
        ends_on_success: bool = True,
        rotation: str | None = None,
        gripper: str | None = None,
    ):
        if max_steps < 1:
            raise UserError(f"task '{name}': max_steps must be at least 1, not {max_steps}")
        check_view(name, camera or CAMERA, full_pictures)
        self.name, self.instruction, self.max_steps, self.spawn = name, instruction, max_steps, spawn
        self.robot = find_robot(robot)
        Boundary(self.robot, rotation, gripper)  # refuses what cannot be converted
        self.statistics = statistics or self.robot.statistics
        self.disturbance = dict(noise or {"small": 0.05, "kick": 0.3, "kick_probability": 0.15})
        check_simulation(simulation)
        self.workers = processes or max(1, min(2, os.cpu_count() or 1))
        # Groups of environments (see ``rollout``). A batch is one, while demonstrations and starts have all workers.
        self.processes = self.workers if simulation == "cpu" else 1
        arguments = dict(env_arguments or {})
        if spawn != "stock" or "spawn" in arguments:
            arguments["spawn"] = spawn
        expert_module = [expert.rpartition(".")[0]] if expert and "." in expert else []
        self.spec = SimulationSpec(
            env_id=env_id,
            instruction=instruction,
            max_steps=max_steps,
            image_size=image_size,
            camera={key: value for key, value in (camera or CAMERA).items()},
            render=render,
            modules=tuple(dict.fromkeys([*modules, *expert_module])),
            env_arguments=arguments,
            expert=expert,
            robot=robot,
            overlay=overlay,
            full_pictures=full_pictures,
            ends_on_success=ends_on_success,
            rotation=rotation,
            gripper=gripper,
        )
        if simulation == "gpu":
            from robot_forgetting.tasks.simulator import batched

            batched.require(name, self.spec)
        self.simulation = simulation

    def convention(self) -> ConventionSpec:
        return ConventionSpec(
            action_dimensions=7,
            action_mode="delta",
            rotation=self.spec.rotation or self.robot.rotation,
            gripper=self.spec.gripper or self.robot.gripper,
            image_size=self.spec.image_size,
            control_hz=self.robot.control_hz,
            statistics=self.statistics,
        )

    def code_modules(self) -> list[str]:
        named = [self.robot.controller, *([self.spec.robot] if "." in self.spec.robot else [])]
        return [*self.spec.modules, *(dotted.rpartition(".")[0] for dotted in named)]

    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv:
        from dataclasses import replace

        from robot_forgetting.tasks.simulator.batched import BatchedVectorEnv
        from robot_forgetting.tasks.simulator.workers import ManiSkillVectorEnv

        if self.simulation == "gpu":
            return BatchedVectorEnv(replace(self.spec, video=render), num_envs, self.workers)
        return ManiSkillVectorEnv(replace(self.spec, video=render), num_envs, self.processes)

    @property
    def has_demonstrations(self) -> bool:
        return self.spec.expert is not None

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterator[Demonstration]:
        from robot_forgetting.tasks.simulator.workers import demonstrate

        if self.spec.expert is None:
            yield from super().demonstrations(count, split=split, start=start)
        seeds, found, tried = self.seeds(split), 0, 0
        while found < count:
            block = [seeds[start + tried + i] for i in range(max(8, count - found))]
            for seed, success, rows, commands in demonstrate(self.spec, block, self.disturbance, self.workers):
                if success and found < count:
                    found += 1
                    yield Demonstration(observations=rows, commands=commands, seed=seed)
            tried += len(block)
            if tried >= 40 and found < tried / 20:
                raise UserError(
                    f"the expert of task '{self.name}' succeeded in {found} of {tried} episodes; "
                    "lower its noise or correct it (robot-forgetting check shows how often it succeeds)"
                )


def check_view(name: str, camera: dict, full_pictures: bool) -> None:
    """``UserError`` unless a camera is wholly described."""
    given = camera.keys() - {"sensor"}
    if given not in ({"eye", "target", "fov"}, {"size", "intrinsic"}, set()):
        raise UserError(
            f"task '{name}': camera has {', '.join(sorted(given))}; give eye, target and fov, or size and intrinsic, "
            "or nothing but the name of a sensor"
        )
    if full_pictures and "size" not in camera:
        raise UserError(f"task '{name}': full_pictures needs camera.size, the original's; leave full_pictures out")


def check_simulation(simulation: str) -> None:
    if simulation not in ("cpu", "gpu"):
        raise unknown("simulation", simulation, ("cpu", "gpu"))


CAMERA = {"eye": [0.38, 0.22, 0.36], "target": [-0.01, 0.0, 0.04], "fov": 0.75}
