"""The signals that ask a command to end, and three ways to take them: note them, hold them back, or raise the first."""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; `kill`; a terminal that closes; what batch systems send before the time is up."""
INSISTING = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.01
"""Seconds after which a signal comes once more whose exception Python dropped."""
Handler = Callable[[int, FrameType | None], None]


class Interrupt:
    """Note in `by` the name of the first signal that asks the run to end after its step.

    A second Ctrl-C or SIGTERM ends the process at once, which is as safe as a kill: files on the disk are whole at
    every moment. Terminals and batch systems repeat the other signals by themselves.
    """

    def __init__(self) -> None:
        self.by = ""
        self._insisted = False
        self._handlers = ExitStack()

    def __enter__(self) -> Interrupt:
        self._handlers.enter_context(handled_by(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in INSISTING:
            if self._insisted:
                os._exit(128 + number)
            self._insisted = True
        self.by = self.by or signal.Signals(number).name


@contextmanager
def held() -> Iterator[list[int]]:
    """Hold the signals back while the block runs, which looks at the list of their numbers and ends soon.

    Afterwards the first of them goes to the handler from before: it is as if it came only then.
    """
    numbers: list[int] = []
    try:
        with handled_by(lambda number, _: numbers.append(number)):
            yield numbers
    finally:
        if numbers:
            signal.raise_signal(numbers[0])


class Stop(KeyboardInterrupt):
    """Report the signal that asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.exit_code = number, 128 + number
        self.remedy = ""
        """How to go on, if there is something to say."""


@contextmanager
def raised() -> Iterator[None]:
    """Raise the first signal as `Stop` in the block, and no later one, so that the block can tidy up.

    Where the block ends with an error after it, as when PyAV loses a `Stop` and reports an interrupted call, the signal
    is what counts. Where Python drops a `Stop`, since it was raised in a finaliser or in the callback of a weak
    reference, the signal comes once more.
    """
    stop: Stop | None = None
    dropped, on_the_way = False, list[_thread.LockType]()
    report = sys.unraisablehook

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal stop, dropped
        if stop is None or dropped:
            stop, dropped = Stop(number), False
            raise stop

    def come_again(number: int, arrived: _thread.LockType) -> None:
        time.sleep(AGAIN)
        if dropped:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        arrived.release()

    def unraisable(raised: sys.UnraisableHookArgs) -> None:
        nonlocal dropped
        if stop is None or raised.exc_value is not stop:
            report(raised)
            return
        dropped = True
        on_the_way.append(arrived := _thread.allocate_lock())
        arrived.acquire()
        _thread.start_new_thread(come_again, (stop.number, arrived))  # `threading` takes locks that may be held here

    with handled_by(handle):
        sys.unraisablehook = unraisable
        try:
            yield
        except Exception as error:
            if stop is None:
                raise
            raise stop from error
        finally:
            sys.unraisablehook = report
            for arrived in on_the_way:
                arrived.acquire()
        if dropped and stop is not None:
            raise stop


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Let `handler` take the signals; outside of the main thread they stay as they are.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_lost_terminal()
        handler(number, frame)

    taken = [s for s in SIGNALS if not (s == signal.SIGHUP and signal.getsignal(s) is signal.SIG_IGN)]
    before = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave_lost_terminal() -> None:
    """Send what goes to a terminal that is gone to nowhere: writing there would be an error."""
    for descriptor in range(3):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
