"""Reading ahead and writing behind: the order, the bound, errors that arrive as they are, and threads that end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from processes import finish, start

from rlv2v.runtime.overlap import DEPTH, read_ahead, write_behind


class Oops(Exception):
    """An error of a stage."""


def num_threads() -> int:
    return sum(thread.name in ("read-ahead", "write-behind") for thread in threading.enumerate())


def test_items_pass_in_order() -> None:
    written: list[int] = []
    with write_behind(written.append) as put, read_ahead(iter(range(100))) as items:
        for item in items:
            put(-item)
    assert written == [-k for k in range(100)]
    assert num_threads() == 0


def test_no_more_than_the_bound_is_read_ahead() -> None:
    made: list[int] = []
    full = threading.Event()

    def numbers() -> Iterator[int]:
        for k in range(100):
            made.append(k)
            if k == DEPTH:  # the last one that is made while nothing is taken: it waits for room
                full.set()
            yield k

    with read_ahead(numbers()):
        assert full.wait(60) and len(made) == DEPTH + 1
    assert len(made) == DEPTH + 1 and num_threads() == 0


def test_an_error_of_the_reader_comes_after_what_was_read_and_once() -> None:
    error = Oops("read")

    def numbers() -> Iterator[int]:
        yield 1
        raise error

    written: list[int] = []
    with pytest.raises(Oops) as caught, write_behind(written.append) as put, read_ahead(numbers()) as items:
        for item in items:
            put(item)
    assert caught.value is error and written in ([1], [])
    assert num_threads() == 0


@pytest.mark.parametrize("num", [1, 100])
def test_an_error_of_the_writer_is_raised_by_a_later_item_or_the_end(num: int) -> None:
    error, calls = Oops("write"), []

    def write(item: int) -> None:
        calls.append(item)
        raise error

    with pytest.raises(Oops) as caught, write_behind(write) as put:
        for item in range(num):
            put(item)
    assert caught.value is error and calls == [0]
    assert num_threads() == 0


def test_an_error_between_drops_what_waits_and_ends_both_threads() -> None:
    closed, begun, go_on = threading.Event(), threading.Event(), threading.Event()
    written: list[int] = []

    def endless() -> Iterator[int]:
        try:
            k = 0
            while True:
                yield (k := k + 1)
        finally:
            closed.set()

    def write(item: int) -> None:
        begun.set()
        go_on.wait(60)
        written.append(item)

    def fail() -> None:
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), write_behind(write) as put, read_ahead(endless()) as items:
        for item in items:
            put(item)
            if item == 2:
                begun.wait(60)
                fail()
    assert written == [1], "the call under way ends, the next does not begin"
    assert closed.is_set() and num_threads() == 0


def test_a_read_that_never_ends_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    entered = threading.Event()

    def blocked() -> Iterator[bytes]:
        entered.set()
        yield os.read(reading, 1)

    try:
        with pytest.raises(Oops), read_ahead(blocked()):
            assert entered.wait(60)
            raise Oops
    finally:
        os.close(writing)


STOPS = """
import random, signal
from itertools import count
from rlv2v.runtime.interrupt import Stop, raised
from rlv2v.runtime.overlap import read_ahead, write_behind
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGUSR1))
rng = random.Random(0)
for _ in range(400):
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.004), 0.01)
    try:
        with raised(), write_behind(lambda item: None) as put, read_ahead(count()) as items:
            for item in items:
                put(item)
    except Stop:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_a_signal_at_any_moment_ends_both_threads() -> None:
    """`queue.Queue` does not survive it: one stop in thirty waits for ever."""
    process = start("-c", STOPS)
    try:
        process.wait(60)
    finally:
        process.kill()
    assert finish(process) == ([0], [""])
