"""Jobs dealt to forked processes of one thread each; the first error ends them all."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence

import torch

from robot_forgetting.errors import UserError, raised, told
from robot_forgetting.machine import children

Tell = Callable[[int], None]  # units of work done


def work_through(jobs: Sequence[Callable[[Tell], None]], processes: int, advanced: Tell) -> None:
    """Runs the jobs in their order, ``processes`` at a time; ``advanced`` hears about their units of work.

    One process with one thread each and not threads: two threads on matrices this small wait for each other most of the
    time. Ctrl-C ends all; what a job has written so far is its own business.
    """
    torch.set_num_threads(1)
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            job(advanced)
        return
    context = multiprocessing.get_context("fork")  # jobs are closures over data that nobody wants to copy
    todo, messages = context.Queue(), context.Queue()
    for index in range(len(jobs)):
        todo.put(index)
    workers, left = [], len(jobs)
    try:
        for _ in range(min(processes, len(jobs))):
            workers.append(children.start(context, _serve, jobs, todo, messages))
        while left:
            try:
                kind, value = messages.get(timeout=1.0)
            except queue.Empty:
                _check_alive(workers)
                continue
            if kind == "advanced":
                advanced(value)
            elif kind == "done":
                left -= 1
            else:
                raise raised(*value)
    finally:
        children.end(*workers)


def _check_alive(workers) -> None:
    for worker in workers:
        if worker.exitcode is not None:
            raise UserError(
                f"a training process died (exit code {worker.exitcode}), out of memory perhaps; the same command "
                "continues; processes=1 needs less memory"
            )


def _serve(jobs, todo, messages) -> None:
    torch.set_num_threads(1)
    while True:
        index = todo.get()
        try:
            jobs[index](lambda units: messages.put(("advanced", units)))
        except Exception as error:
            messages.put(("error", told(error)))
        else:
            messages.put(("done", index))
