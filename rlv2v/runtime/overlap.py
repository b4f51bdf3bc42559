"""Read a stream ahead in one thread and write it behind in another, with a few items in memory at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any, TypeVar

DEPTH = 2
"""Items that wait between two threads, at most."""
PATIENCE = 1.0
"""Seconds that are waited for a reader, which may be in a read that never ends, such as that of a pipe."""
T = TypeVar("T")


@contextmanager
def read_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items`, which another thread takes `DEPTH` of ahead.

    An exception of theirs is raised where the items are taken, as it is. The thread ends with the block.
    """
    queue: Queue[tuple[bool, Any]] = Queue(DEPTH)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                queue.put((True, item))
                if stopped.is_set():
                    return
            queue.put((False, None))
        except BaseException as error:
            queue.put((False, error))
        finally:
            if close := getattr(items, "close", None):  # a file that a generator holds open is closed here
                close()

    def taken() -> Iterator[T]:
        while True:
            more, item = queue.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        try:
            while True:  # make room for what the thread is about to put, after which it looks at `stopped`
                queue.get_nowait()
        except Empty:
            thread.join(PATIENCE)


@contextmanager
def write_behind(write: Callable[[T], None]) -> Iterator[Callable[[T], None]]:
    """Yield a function that hands an item to another thread, which calls `write` on each in order.

    An exception of `write` is raised as it is, by the next item or by the end of the block, which waits until all is
    written. After an error of the block what waits is dropped. No call of `write` outlives the block.
    """
    queue: Queue[tuple[bool, Any]] = Queue(DEPTH)
    failures: list[BaseException] = []
    dropped = threading.Event()

    def work() -> None:
        while True:
            more, item = queue.get()
            if not more:
                return
            if not dropped.is_set():
                try:
                    write(item)
                except BaseException as error:
                    dropped.set()
                    failures.append(error)

    def put(item: T) -> None:
        raise_failure()
        queue.put((True, item))

    def raise_failure() -> None:
        if failures:
            raise failures.pop()

    thread = threading.Thread(target=work, name="write-behind", daemon=True)
    thread.start()
    try:
        yield put
        queue.put((False, None))
        thread.join()
    except BaseException:
        dropped.set()
        queue.put((False, None))
        thread.join()
        raise
    raise_failure()
