"""Run a function over many files on several processes, so that a crash, a kill or Ctrl-C costs one file only.

Workers are forked from a clean server process, not from the caller with its threads; they end with their parent, also
when that is killed, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from typing import TypeVar

import cv2

from rlv2v.errors import UserError, get_logger
from rlv2v.runtime.interrupt import SIGNALS

log = get_logger(__name__)
Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """Leave what a terminal sends to the parent, use one thread, and end as soon as the parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@cache
def warn_of_no_semaphores(reason: str) -> None:
    """Say once that processes cannot work together here."""
    log.warning("processes cannot share semaphores (/dev/shm: %s): one file at a time is read, in this one", reason)


def run_all(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, *, isolate: bool = False
) -> Iterator[tuple[Task, Result | UserError]]:
    """Yield (task, function(task)) in the order of completion; a `UserError` of one task is its result.

    jobs: processes; 1 runs in this one, unless `isolate`, and so does any number where there is no /dev/shm. A process
    that dies (a decoder's crash, no memory) fails its task alone: what was under way is tried again one by one. Any
    other exception of a task ends the run and is raised.
    """
    if jobs == 1 and not isolate:
        for task in tasks:
            try:
                yield task, function(task)
            except UserError as error:
                yield task, error
        return
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload(["rlv2v.data.prepare.convert"])
    others = set(multiprocessing.active_children())
    try:
        pool = ProcessPoolExecutor(min(jobs, max(1, len(tasks))), context, initializer=start_worker)
    except (OSError, ImportError, NotImplementedError) as error:  # a semaphore is a file in /dev/shm
        warn_of_no_semaphores(str(getattr(error, "strerror", None) or error))
        yield from run_all(function, tasks, 1)
        return
    unfinished, complete = dict(enumerate(tasks)), False
    try:
        futures: dict[Future[Result], int] = {}
        with suppress(BrokenProcessPool):  # a process has died before all tasks were submitted
            for num, task in enumerate(tasks):
                futures[pool.submit(function, task)] = num
        for future in as_completed(futures):
            failure = future.exception()
            if not isinstance(failure, BrokenProcessPool):
                task = unfinished.pop(futures[future])
                yield task, failure if isinstance(failure, UserError) else future.result()
        complete = True
    finally:
        if not complete:  # Ctrl-C, or an error of the caller's: do not wait for what is under way
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)
    again = list(unfinished.values())
    if again and jobs == 1:
        yield again.pop(0), UserError("its process died: the decoder crashed or the memory did not suffice")
    if again:
        yield from run_all(function, again, 1, isolate=True)
