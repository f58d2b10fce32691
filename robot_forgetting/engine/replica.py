"""Data-parallel gradients on CPU: forked copies of the trainer compute parts of every batch.

Two torch threads in one process slow small matrices down as soon as anything else runs on the machine (measured here:
285 decisions/s with one thread, 59 with two, beside one busy process); two processes with one thread each do not.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from robot_forgetting.errors import UserError, raised, told
from robot_forgetting.machine import children
from robot_forgetting.method import Batch

# part -> (loss, penalty) after having called backward
Backward = Callable[[Batch, float], tuple[float, float]]


class Replicas:
    """``count`` forked processes that share the parameters' memory and add their gradients to the caller's.

    parameters: the trainable ones; moved to shared memory, so an optimiser that writes in place writes for all
    backward(part, share): computes the losses of ``part`` and back-propagates ``share`` of their sum
    """

    def __init__(self, parameters: list[Tensor], backward: Backward, count: int):
        self._parameters, self._backward = parameters, backward
        self._children: list[tuple[Connection, multiprocessing.Process, Tensor]] = []
        if count < 1:
            return
        torch.set_num_threads(1)
        for parameter in parameters:
            parameter.data = _shared(parameter.data)
        context = multiprocessing.get_context("fork")  # the child needs the method, its data and the policy as they are
        try:
            for _ in range(count):
                gradients = _shared(torch.zeros(sum(p.numel() for p in parameters)))
                ours, theirs = context.Pipe()
                process = children.start(context, self._serve, theirs, ours, gradients)
                theirs.close()
                self._children.append((ours, process, gradients))
        except BaseException:
            self.close()
            raise

    def __call__(self, batch: Batch) -> tuple[float, float]:
        """Leaves the batch's mean gradient in ``parameter.grad``; returns its mean loss and penalty."""
        workers = len(self._children) + 1
        bounds = [len(batch) * k // workers for k in range(workers + 1)]
        parts = [batch[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        busy = [(child, part) for child, part in zip(self._children, parts[1:], strict=True) if len(part)]
        for (connection, process, _), part in busy:
            try:
                connection.send((part, len(part) / len(batch)))
            except (BrokenPipeError, OSError) as error:
                raise self._died(process) from error
            except RuntimeError as error:  # torch sends tensors through /dev/shm
                raise UserError(
                    f"no room in /dev/shm for a batch ({error}); enlarge it (docker run --shm-size=1g), or use "
                    "processes=1"
                ) from error
        loss, penalty = self._backward(parts[0], len(parts[0]) / len(batch)) if len(parts[0]) else (0.0, 0.0)
        for (connection, process, gradients), _ in busy:
            try:
                answer = connection.recv()
            except (EOFError, ConnectionResetError) as error:
                raise self._died(process) from error
            if isinstance(answer[0], type):
                raise raised(*answer)
            loss, penalty = loss + answer[0], penalty + answer[1]
            start = 0
            for parameter in self._parameters:
                part = gradients[start : start + parameter.numel()].view_as(parameter)
                parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)
                start += parameter.numel()
        return loss, penalty

    def close(self) -> None:
        children.end(*(process for _, process, _ in self._children))
        for connection, _, _ in self._children:
            connection.close()
        self._children.clear()

    @staticmethod
    def _died(process) -> UserError:
        process.join(timeout=5)
        return UserError(
            f"a training process died (exit code {process.exitcode}), out of memory perhaps; the last "
            "checkpoint is kept, the same command continues; processes=1 needs less memory"
        )

    def _serve(self, connection: Connection, parents_end: Connection, gradients: Tensor) -> None:
        parents_end.close()
        while True:
            try:
                part, share = connection.recv()
            except (EOFError, OSError):  # the parent is gone
                os._exit(0)
            try:
                for parameter in self._parameters:
                    parameter.grad = None
                answer = self._backward(part, share)
                missing = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
                torch.cat([gradient.flatten() for gradient in missing], out=gradients)
            except Exception as error:
                answer = told(error)
            try:
                connection.send(answer)
            except OSError:
                os._exit(0)


def _shared(values: Tensor) -> Tensor:
    """A copy in memory that forked processes see too.

    Not ``share_memory_``: that is in /dev/shm, of which a container has 64 MB.
    """
    storage = values.untyped_storage()
    try:
        memory = mmap.mmap(-1, max(storage.nbytes(), values.element_size()))
    except OSError as error:
        megabytes = round(storage.nbytes() / 1e6)
        raise UserError(f"no memory for {megabytes} MB that processes share; processes=1 needs none") from error
    copy = torch.frombuffer(memory, dtype=values.dtype)
    return copy.as_strided(values.size(), values.stride(), values.storage_offset()).copy_(values)
