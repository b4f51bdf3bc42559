"""Real time is not for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def policy() -> int:
    """How the kernel schedules this thread; -1 where it does not say."""
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else -1


@contextmanager
def usual_priority() -> Iterator[None]:
    """Leave with the scheduling policy that was there before; around every encoding of AV1.

    SVT-AV1 makes the calling thread real-time (SCHED_FIFO 99) when root runs it, and all children of the process then
    are: two of gloo's event loops that wait for a lock keep both cores, and the thread that has the lock never runs.
    """
    before = policy()
    try:
        yield
    finally:
        if policy() != before:
            os.sched_setscheduler(0, before, os.sched_param(0))
