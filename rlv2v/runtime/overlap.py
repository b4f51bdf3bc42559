"""Read a stream ahead in one thread and write it behind in another, with a few items in memory at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from rlv2v.runtime.interrupt import held

DEPTH = 2
"""Items that wait between two threads, at most."""
PATIENCE = 1.0
"""Seconds that are waited for a reader, which may be in a read that never ends, such as that of a pipe."""
T = TypeVar("T")


class Handover(Generic[T]):
    """Pass items from one thread to another, in order; `put` waits while `DEPTH` of them wait.

    A signal may raise an exception anywhere in the main thread. `queue.Queue` then loses the next call to a thread that
    waits, or keeps its lock for ever; these two, which are written in C, do not.
    """

    def __init__(self) -> None:
        self._items, self._room = SimpleQueue[T](), SimpleQueue[None]()
        for _ in range(DEPTH):
            self._room.put(None)
        self.closed = False
        """Whether nobody takes items any more."""

    def put(self, item: T) -> None:
        """Hand an item over."""
        self._room.get()
        self._items.put(item)

    def end(self, item: T) -> None:
        """Hand the last item over, which waits for nobody."""
        self._items.put(item)

    def get(self) -> T:
        """Take an item."""
        item = self._items.get()
        self._room.put(None)
        return item

    def close(self) -> None:
        """Let nobody wait in `put` any more."""
        self.closed = True
        self._room.put(None)


def start(thread: threading.Thread) -> None:
    """Start a thread, which no signal may interrupt."""
    with held():
        thread.start()


@contextmanager
def read_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items`, which another thread takes `DEPTH` of ahead.

    An exception of theirs is raised where the items are taken, as it is. The thread ends with the block.
    """
    queue = Handover[tuple[bool, Any]]()

    def work() -> None:
        try:
            for item in items:
                queue.put((True, item))
                if queue.closed:
                    return
            queue.end((False, None))
        except BaseException as error:
            queue.end((False, error))
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
    try:
        start(thread)
        yield taken()
    finally:
        queue.close()
        if thread.ident is not None:
            thread.join(PATIENCE)


@contextmanager
def write_behind(write: Callable[[T], None]) -> Iterator[Callable[[T], None]]:
    """Yield a function that hands an item to another thread, which calls `write` on each in order.

    An exception of `write` is raised as it is, by the next item or by the end of the block, which waits until all is
    written. After an error of the block what waits is dropped. No call of `write` outlives the block.
    """
    queue = Handover[tuple[bool, Any]]()
    failures: list[BaseException] = []

    def work() -> None:
        while True:
            more, item = queue.get()
            if not more:
                return
            if not queue.closed:
                try:
                    write(item)
                except BaseException as error:
                    queue.close()
                    failures.append(error)

    def put(item: T) -> None:
        raise_failure()
        queue.put((True, item))

    def raise_failure() -> None:
        if failures:
            raise failures.pop()

    thread = threading.Thread(target=work, name="write-behind", daemon=True)
    try:
        start(thread)
        yield put
        queue.end((False, None))
        thread.join()
    except BaseException:
        queue.close()
        queue.end((False, None))
        if thread.ident is not None:
            thread.join()
        raise
    raise_failure()
