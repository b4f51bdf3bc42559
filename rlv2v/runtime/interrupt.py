"""The signals that ask a run to end."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupt:
    """Note in `by` the name of a signal (Ctrl-C or SIGTERM) that asks the run to end after its step.

    A second signal ends the process at once, which is as safe as a kill: files on the disk are whole at every moment.
    """

    def __init__(self) -> None:
        self.by = ""

    def __enter__(self) -> Interrupt:
        self._handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.by:
            os._exit(128 + number)
        self.by = signal.Signals(number).name
