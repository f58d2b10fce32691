"""Child processes that never outlive this one, and the signals that end a command.

Ctrl-C, SIGTERM and SIGHUP are heard in the parent alone, where they end the work once and in order; a child ends when
its parent ends it, or when the parent is gone, whatever took it away (kill -9, the kernel's out-of-memory killer).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from robot_forgetting.errors import UserError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_DEATH_SIGNAL = 1  # prctl(2)

_CHILDREN: set[BaseProcess] = set()


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: all end a command in the same way."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def stoppable(main: Callable[..., int]) -> Callable[..., int]:
    """``main(arguments)``, which Ctrl-C, SIGTERM and SIGHUP end in order, with a line and 128 + the signal's number.

    A signal to which the process was started deaf (nohup; Ctrl-C in a shell's background) stays unheard. Called without
    arguments it is the program: once it is ending nothing but SIGKILL ends it sooner, and no handler is put back.
    """

    def stop(number, frame):
        raise Stopped(number)

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        own = threading.current_thread() is threading.main_thread()
        numbers = [number for number in ENDING if own and signal.getsignal(number) not in (signal.SIG_IGN, None)]
        handlers = {number: signal.signal(number, stop) for number in numbers}
        try:
            return main(arguments)
        except KeyboardInterrupt as stopped:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            number = getattr(stopped, "number", signal.SIGINT)
            what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"\n{what}; the same command again continues where it stopped", file=sys.stderr)
            return 128 + number
        finally:
            if arguments is not None:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return wrapped


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For tidying up: a signal that would raise (a second Ctrl-C) does so at the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # it is raised elsewhere
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def start(context: BaseContext, target: Callable, *arguments) -> BaseProcess:
    """A running daemon that calls ``target(*arguments)``; ``end`` it when it is no longer needed."""
    if context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # when it starts it unblocks what is blocked below
    process = context.Process(target=_child, args=(os.getpid(), target, arguments), daemon=True)
    with undisturbed():
        # What is blocked stays so in the child, from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process.start()
        except OSError as error:
            raise UserError(f"no further process can be started ({error.strerror}); lower processes=") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _CHILDREN.add(process)
    return process


def end(*processes: BaseProcess) -> None:
    """Kills the processes, which have nothing to lose."""
    with undisturbed():
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            _CHILDREN.discard(process)


# After multiprocessing's own, so called before it: that one asks daemons by a SIGTERM, which they do not hear.
atexit.register(lambda: end(*_CHILDREN))


def _child(parent: int, target: Callable, arguments: tuple) -> None:
    end_with(parent)
    _CHILDREN.clear()  # a forked copy of the parent's
    target(*arguments)


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent, of that number, has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
