"""Worker processes that hold simulations, and the ``VectorEnv``s over them.

Processes are spawned once and kept for the life of the program (importing torch and SAPIEN costs seconds); a worker
holds the environments of one task at a time. Pictures come back through the pipes: at 64 px that is
12 KiB per step, far below the cost of drawing them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from unittest import mock

import numpy as np

from robot_forgetting.errors import PluginError, UserError, raised
from robot_forgetting.machine import children, user_modules
from robot_forgetting.task import Transition, VectorEnv
from robot_forgetting.tasks.simulator.batched import ELSE, GPU
from robot_forgetting.tasks.simulator.environment import SimulationSpec
from robot_forgetting.tasks.simulator.serving import serve
from robot_forgetting.tasks.simulator.simulation import blank

SPAWN = multiprocessing.get_context("spawn")


class Worker:
    """One process. ``call`` sends a request; ``receive`` returns its answer or raises what went wrong there."""

    def __init__(self, index: int | str):
        self.index = index
        self.connection, child = SPAWN.Pipe()
        # One thread each: several processes share the cores, and two torch threads on a busy core are slower than one.
        # The safe path: a spawned Python would look for its own modules in the working folder first.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONSAFEPATH="1"):
            self.process = children.start(SPAWN, serve, child, user_modules.folders)
        child.close()
        self.render: str | None = None  # the option this process draws with, once it does
        self._unanswered = 0

    def call(self, verb: str, *arguments) -> None:
        try:
            self.connection.send((verb, *arguments))
        except (BrokenPipeError, OSError) as error:
            raise WorkerDied(self._epitaph()) from error
        self._unanswered += 1

    def receive(self):
        status, answer = self._answer()
        if status == "error":
            raise raised(*answer)
        return answer

    def drain(self) -> None:
        """Drops answers that nobody waited for (a user left in the middle), so that they are not taken for others."""
        while self._unanswered:
            self._answer()

    def _answer(self) -> tuple:
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerDied(self._epitaph()) from error
        self._unanswered -= 1
        return answer

    def close(self) -> None:
        children.end(self.process)
        self.connection.close()

    def _epitaph(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        died = f"a simulator process died (exit code {code})"
        if code is None or code < 0:  # a signal's
            return f"{died}; run `robot-forgetting doctor`, and try fewer environments (num_envs=)"
        return f"{died}; see what it has said"


class WorkerDied(UserError):
    """A simulator process ended without an answer (a crash in native code, or the kernel's out-of-memory killer)."""


class WorkerPool:
    """The program's workers, started when first needed.

    Whoever uses one keeps the object: an index may meanwhile have become another process.
    """

    def __init__(self):
        self._workers: dict[int | str, Worker] = {}

    def __getitem__(self, index: int | str) -> Worker:
        worker = self._workers.get(index)
        if worker is None or not worker.process.is_alive():
            worker = self._workers[index] = Worker(index)
        return worker

    def prepare(self, index: int | str, spec: SimulationSpec, count: int, backend: str | None = None) -> Worker:
        """A living worker that has been asked to hold ``count`` simulations; its answer is the caller's to receive.

        backend: ManiSkill's, for a worker that holds them as one ``BatchedSimulation``
        """
        worker = self[index]
        try:
            worker.drain()
        except WorkerDied:
            worker = self[index]
        if worker.render not in (None, spec.render):  # low_poly changes ManiSkill for good in its process
            worker.close()
            worker = self[index]
        worker.render = spec.render
        worker.call("make", spec, count, backend)
        return worker

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


POOL = WorkerPool()


class ManiSkillVectorEnv(VectorEnv):
    """``num_envs`` simulations of one task over ``processes`` workers; a worker's slots form a group.

    A simulation that raises ends its episode with ``error`` set and is rebuilt; a worker that dies ends the episodes of
    its whole group so, and is replaced.
    """

    def __init__(self, spec: SimulationSpec, num_envs: int, processes: int):
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, not {num_envs}")
        processes = max(1, min(processes, num_envs))
        self.spec = spec
        slots = np.array_split(np.arange(num_envs), processes)
        self.groups = [[int(slot) for slot in group] for group in slots]
        self._busy: dict[Connection, tuple[int, list[int]]] = {}
        self._dead: list[tuple[int, list[int]]] = []
        self._workers = [POOL.prepare(index, spec, len(group)) for index, group in enumerate(self.groups)]
        self.camera = [worker.receive() for worker in self._workers][0]  # which the policy looks through, for `check`

    def request(self, group: int, resets: dict[int, int], commands: dict[int, np.ndarray]) -> None:
        worker, first = self._workers[group], self.groups[group][0]
        slots = [*resets, *commands]
        try:
            worker.call(
                "advance",
                {slot - first: seed for slot, seed in resets.items()},
                {slot - first: command for slot, command in commands.items()},
            )
        except WorkerDied:
            self._dead.append((group, slots))
            return
        self._busy[worker.connection] = (group, slots)

    def wait(self) -> tuple[int, list[Transition]]:
        if self._dead:
            group, slots = self._dead.pop()
            return group, self._replace(group, slots)
        connection = wait(list(self._busy))[0]
        group, slots = self._busy.pop(connection)
        try:
            answers = self._workers[group].receive()
        except WorkerDied:
            return group, self._replace(group, slots)
        first = self.groups[group][0]
        return group, [Transition(slot=first + local, **answer) for local, answer in answers]

    def _replace(self, group: int, slots: list[int]) -> list[Transition]:
        self._workers[group] = POOL.prepare(group, self.spec, len(self.groups[group]))
        self._workers[group].receive()
        died = "the simulator process died during this episode"
        return [Transition(slot, blank(self.spec), done=True, error=died) for slot in slots]

    def close(self) -> None:
        """Waits for answers still under way; the workers live on for the next task."""
        self._busy.clear()
        for worker in self._workers:
            with contextlib.suppress(WorkerDied):  # the episodes it belonged to are being abandoned
                worker.drain()


class BatchedVectorEnv(VectorEnv):
    """``num_envs`` slots of one batch, which are one group; ``processes`` CPU workers make initial states.

    A slot that a request leaves out moves on, see ``BatchedSimulation``. An initial state that fails ends its episode
    with ``error`` set; whatever else goes wrong ends all running episodes so, and the batch is built anew.
    """

    def __init__(self, spec: SimulationSpec, num_envs: int, processes: int, backend: str = GPU):
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, not {num_envs}")
        self.spec, self.groups, self._backend = spec, [list(range(num_envs))], backend
        self._processes = max(1, min(processes, num_envs))
        self._prepare()

    def _prepare(self) -> None:
        still = replace(self.spec, video=False)
        self._starters = [POOL.prepare(index, still, 1) for index in range(self._processes)]
        self._batch = POOL.prepare("batch", self.spec, len(self.groups[0]), self._backend)
        for worker in self._starters:
            worker.receive()
        try:
            self._batch.receive()
        except (RuntimeError, PluginError) as error:
            self._batch.close()  # with what it holds of the GPU
            raise UserError(
                f"a batch of {len(self.groups[0])} environments could not be built: {error}; "
                f"try a smaller num_envs, or {ELSE}"
            ) from error

    def request(self, group: int, resets: dict[int, int], commands: dict[int, np.ndarray]) -> None:
        self._asked = resets, commands
        self._failure: Exception | None = None
        seeds = list(resets.values())
        try:
            for index, worker in enumerate(self._starters[: len(seeds)]):
                worker.call("initial_states", seeds[index :: self._processes])
            if commands:
                self._batch.call("step", commands)
        except WorkerDied as error:
            self._failure = error

    def wait(self) -> tuple[int, list[Transition]]:
        resets, commands = self._asked
        try:
            if self._failure is not None:
                raise self._failure
            found = [worker.receive() for worker in self._starters[: len(resets)]]
            begun = {slot: found[n % self._processes][n // self._processes] for n, slot in enumerate(resets)}
            if commands:
                self._batch.receive()
            self._batch.call("finish", {slot: start for slot, start in begun.items() if "error" not in start})
            answers = self._batch.receive()
        except (WorkerDied, RuntimeError, PluginError) as error:  # a process that died, or an exception in one
            return 0, self._replace([*resets, *commands], error)
        broken = [(slot, start) for slot, start in begun.items() if "error" in start]
        return 0, [
            Transition(slot=slot, **{"observation": blank(self.spec), **answer}) for slot, answer in [*answers, *broken]
        ]

    def _replace(self, slots: list[int], error: Exception) -> list[Transition]:
        self._batch.close()  # a process in which CUDA failed is of no more use
        self._prepare()
        said = f"the batch failed: {error}"
        return [Transition(slot, blank(self.spec), done=True, error=said) for slot in slots]

    def close(self) -> None:
        """The workers live on for the next task; the next one to use them drops answers still under way."""


def demonstrate(spec: SimulationSpec, seeds: list[int], noise: dict, processes: int):
    """Runs the expert on ``seeds`` over the workers; yields (seed, success, observation columns, commands [L, 7]) in
    order."""
    workers = [POOL.prepare(group, spec, 1) for group in range(processes)]
    for worker in workers:
        worker.receive()
    queues = [seeds[group::processes] for group in range(processes)]
    for worker, queue in zip(workers, queues, strict=True):
        if queue:
            worker.call("demonstrate", queue[0], noise)
    for index, seed in enumerate(seeds):
        worker, queue = workers[index % processes], queues[index % processes]
        answer = worker.receive()
        done = index // processes + 1
        if done < len(queue):
            worker.call("demonstrate", queue[done], noise)
        yield seed, *answer
