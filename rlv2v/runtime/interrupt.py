"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupt:
    """Ctrl-C or SIGTERM asks the run to end after its step (`by` names the signal); a second one ends it at once.

    At once is as safe as a kill: what is on the disk is whole at every moment.
    """

    def __init__(self) -> None:
        self.by = ""

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _: FrameType | None) -> None:
        if self.by:
            os._exit(128 + number)
        self.by = signal.Signals(number).name
