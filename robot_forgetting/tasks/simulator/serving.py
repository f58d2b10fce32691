"""What runs in a worker process: simulations of one task, asked through a pipe (see ``workers``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from robot_forgetting.errors import told
from robot_forgetting.machine import user_modules
from robot_forgetting.rollout import columns
from robot_forgetting.tasks.simulator.batched import BatchedSimulation, initial_states
from robot_forgetting.tasks.simulator.environment import SimulationSpec, seen_through
from robot_forgetting.tasks.simulator.simulation import Simulation, guarded

SETTLED = 6  # steps of success with nothing left to do, after which a demonstration ends


def serve(connection: Connection, folders: Sequence[str] = ()) -> None:
    """A worker's main loop. Requests are answered in order, one answer each. folders: of the user's own modules"""
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
                    simulations = [BatchedSimulation(new_spec, count, backend)]
                spec, answer = new_spec, seen_through(simulations[0].env, new_spec)
            elif verb == "advance":
                answer = _advance(simulations, spec, *arguments)
            elif verb == "demonstrate":
                answer = demonstration(simulations[0], *arguments)
            elif verb == "initial_states":
                answer = initial_states(simulations, spec, *arguments)
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


def demonstration(simulation: Simulation, seed: int, noise: dict) -> tuple[bool, dict, np.ndarray]:
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
