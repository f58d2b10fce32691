"""Worker processes that hold simulations, and the ``VectorEnv`` over them.

Processes are spawned once and kept for the life of the program (importing torch and SAPIEN costs seconds); a worker
holds the environments of one task at a time. Pictures come back through the pipes: at 64 px that is
12 KiB per step, far below the cost of drawing them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from unittest import mock

import numpy as np

from robot_forgetting.errors import UserError, blamed, described, raised, told
from robot_forgetting.machine import children, user_modules
from robot_forgetting.rollout import columns
from robot_forgetting.task import Transition, VectorEnv
from robot_forgetting.tasks.simulator.environment import SimulationSpec, seen_through
from robot_forgetting.tasks.simulator.simulation import CommandError, Simulation

SPAWN = multiprocessing.get_context("spawn")
SETTLED = 6  # steps of success with nothing left to do, after which a demonstration ends


class Worker:
    """One process. ``call`` sends a request; ``receive`` returns its answer or raises what went wrong there."""

    def __init__(self, index: int | str):
        self.index = index
        self.connection, child = SPAWN.Pipe()
        # One thread each: several processes share the cores, and two torch threads on a busy core are slower than one.
        # The safe path: a spawned Python would look for its own modules in the working folder first.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONSAFEPATH="1"):
            self.process = children.start(SPAWN, _serve, child, user_modules.folders)
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

        backend: ManiSkill's, for a worker that holds them as one ``batched.BatchedSimulation``
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


def _serve(connection: Connection, folders: Sequence[str] = ()) -> None:
    """A worker's main loop. Requests are answered in order, one answer each. folders: of the user's own modules"""
    import torch

    from robot_forgetting.tasks.simulator import batched

    user_modules.search(folders)
    torch.set_num_threads(1)
    # Lavapipe's threads. Workers are what fills the cores; two of two threads each on two cores took 1.8 times as long
    # for a step of the WidowX's.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    spec, simulations = None, []
    while True:
        try:
            verb, *arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # SAPIEN's teardown at interpreter exit can hang; there is nothing left to save
        try:
            if verb == "make":
                new_spec, count, backend = arguments
                # A batch may have more slots than are asked for, which step and are drawn too: building takes seconds.
                if new_spec != spec or (backend and simulations and simulations[0].count < count):
                    for simulation in simulations:
                        simulation.close()
                    simulations = []
                if backend is None:
                    simulations += [Simulation(new_spec) for _ in range(count - len(simulations))]
                elif simulations:
                    simulations[0].abandon()
                else:
                    simulations = [batched.BatchedSimulation(new_spec, count, backend)]
                spec, answer = new_spec, seen_through(simulations[0].env, new_spec)
            elif verb == "advance":
                answer = _advance(simulations, spec, *arguments)
            elif verb == "demonstrate":
                answer = _demonstrate(simulations[0], *arguments)
            elif verb == "initial_states":
                answer = batched.initial_states(simulations, spec, *arguments)
            elif verb in ("step", "finish"):
                answer = getattr(simulations[0], verb)(*arguments)
            said = ("ok", answer)
        except Exception as error:
            said = ("error", told(error))
        try:
            connection.send(said)
        except OSError:  # nobody listens any more: the parent was killed
            os._exit(0)


def _advance(simulations: list[Simulation], spec: SimulationSpec, resets: dict, commands: dict) -> list:
    answers = []
    for slot, seed in resets.items():
        answers.append((slot, guarded(simulations, spec, slot, lambda s, seed=seed: {"observation": s.reset(seed)})))
    for slot, command in commands.items():

        def step(simulation, command=command):
            observation, reward, success, done, info = simulation.step(command)
            return {"observation": observation, "reward": reward, "success": success, "done": done, "info": info}

        answers.append((slot, guarded(simulations, spec, slot, step)))
    return answers


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


def _demonstrate(simulation: Simulation, seed: int, noise: dict) -> tuple[bool, dict, np.ndarray]:
    """One expert episode. The executed command is disturbed, the recorded one is the expert's (Laskey et al. 2017).

    noise: {"small": sigma of every step, "kick": sigma of rare large ones, "kick_probability"} in command units

    An episode that would run to its time limit ends once success has lasted ``SETTLED`` steps in which the expert was
    ``Simulation.idle``: what follows is the same picture over and over.
    """
    rng = np.random.default_rng([seed, 0xDA27])
    observation, success, done, lasting = simulation.reset(seed), False, False, 0
    rows, commands = [], []
    while not done and lasting < SETTLED:
        command = simulation.expert_command()
        rows.append(observation)
        commands.append(command)
        disturbed = command.astype(np.float64)
        disturbed[:3] += rng.normal(0, noise["small"], 3)
        disturbed[:3] += rng.normal(0, noise["kick"], 3) * (rng.random() < noise["kick_probability"])
        observation, _, success, done, _ = simulation.step(disturbed)
        lasting = lasting + 1 if success and simulation.idle(command) else 0
    return success, columns(rows), np.stack(commands)
