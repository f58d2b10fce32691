"""A robot task on ManiSkill3, described by plain values: a yaml file is enough to add one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.ranges import ArgumentsOf, Plain, Processes, Range
from robot_forgetting.task import Demonstration, Task, VectorEnv
from robot_forgetting.tasks.simulator.conventions import Boundary, declared
from robot_forgetting.tasks.simulator.environment import SimulationSpec, View
from robot_forgetting.tasks.simulator.robots import find_robot

# What a task has in its own way; and what one of SimplerEnv's does not leave to its yaml.
OWN = ("env_id", "instruction", "modules", "camera", "env_arguments", "robot", "video")
FIXED = ("modules", "spawn", "camera", "robot", "overlay", "ends_on_success")


class Noise(TypedDict):
    """See ``serving.demonstration``."""

    small: Annotated[float, Range(0, 10)]
    kick: Annotated[float, Range(0, 10)]
    kick_probability: Annotated[float, Range(0, 1)]


class ManiSkillTask(Task):
    """A stock or user-defined ManiSkill environment with an instruction, a camera, and perhaps an expert.

    modules: imported in the workers first (a module that registers ``env_id``); the expert's is added
    spawn: "stock" (ManiSkill's initial states), or a name the environment's own ``spawn`` argument understands
    camera, noise, statistics: null: the robot's. noise: disturbance of demonstrations, see ``serving.demonstration``;
        statistics: the policy's key for the ranges of commands
    processes: worker processes (default: one per core, at most 2 per 16 environments)
    simulation: "cpu", or "gpu": all environments in one batch on an NVIDIA GPU, see ``batched.py``
    options: see ``SimulationSpec``
    """

    def __init__(
        self,
        name: str,
        env_id: str,
        instruction: str,
        *,
        modules: list[str] | tuple[str, ...] = (),
        spawn: str = "stock",
        camera: View | None = None,
        env_arguments: dict[str, Plain] | None = None,
        noise: Noise | None = None,
        statistics: str | None = None,
        processes: Processes | None = None,
        simulation: str = "cpu",
        robot: str = "panda",
        **options: Annotated[Any, ArgumentsOf(SimulationSpec, without=OWN)],
    ):
        arguments = dict(env_arguments or {})
        if spawn != "stock" or "spawn" in arguments:
            arguments["spawn"] = spawn
        expert = options.get("expert")
        expert_module = [expert.rpartition(".")[0]] if expert and "." in expert else []
        self.robot = find_robot(robot)
        options |= {"robot": robot, "camera": dict(camera or self.robot.camera), "env_arguments": arguments}
        options["modules"] = tuple(dict.fromkeys([*modules, *expert_module]))
        self.spec = SimulationSpec(env_id, instruction, **options)
        try:
            self.spec.check()
        except UserError as error:
            raise UserError(f"task '{name}': {error}") from None
        self.name, self.instruction, self.max_steps, self.spawn = name, instruction, self.spec.max_steps, spawn
        Boundary(self.robot, self.spec.rotation, self.spec.gripper)  # refuses what cannot be converted
        self.statistics = statistics or self.robot.statistics
        self.disturbance = dict(noise or self.robot.noise)
        check_simulation(simulation)
        self.workers = processes or max(1, min(2, os.cpu_count() or 1))
        # Groups of environments (see ``rollout``). A batch is one, while demonstrations and starts have all workers.
        self.processes = self.workers if simulation == "cpu" else 1
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

        from robot_forgetting.tasks.simulator.workers import BatchedVectorEnv, ManiSkillVectorEnv

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


def check_simulation(simulation: str) -> None:
    check_choice("simulation", simulation, ("cpu", "gpu"))


def twin_task(name: str, env_id: str, instruction: str, robot: str, **options) -> ManiSkillTask:
    """A task of SimplerEnv's: a photo for the background, and success as it stands when the time is up.

    rotation, gripper: what the policy's commands mean, by default what the robot takes; "euler_xyz" and "1 opens,
        0 closes" are the published OpenVLA's
    full_pictures: draw the camera's own size and average down to the square, as SimplerEnv does; false draws it small
    """
    own = find_robot(robot)
    options = {"image_size": 224, "full_pictures": True, "render": "stock"} | options
    options |= declared(name, options.get("rotation", own.rotation), options.get("gripper", own.gripper))
    return ManiSkillTask(name, env_id, instruction, robot=robot, overlay=True, ends_on_success=False, **options)
