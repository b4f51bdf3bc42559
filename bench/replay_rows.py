"""Rows that can be checked by their own values, and what a buffer of them does for this bench.

Row k of the stream has the reward k, and the value k % 251 in every byte of its payload; where a buffer shares frames
between windows, frame j of the window has (k + j) % 251.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ADDED, DRAWN, ALPHA, BETA = 64, 256, 0.6, 0.4
FRAME, STATE = (64, 64, 3), 16
CHUNK = 65536


class Payload:
    """Rows of states of `state` frames; the first axis of each array is the row."""

    def __init__(self, frame: tuple[int, ...], state: int) -> None:
        self.frame, self.state = frame, state

    def rows(self, first: int, count: int, *shape: int) -> Array:
        """uint8 (count, *shape, *frame)."""
        shape = (*shape, *self.frame)
        values = (np.arange(first, first + count) % 251).astype(np.uint8).reshape(-1, *[1] * len(shape))
        return np.ascontiguousarray(np.broadcast_to(values, (count, *shape)))


class Peer(ABC):
    """A prioritised buffer as a learner uses it; `next_row` is the first row of the stream that was not added yet.

    capacity: rows kept. video: states are windows of `payload.state` frames; else a state is one frame.
    """

    share = 1
    """Of how many turns it gets one: more than 1 where a turn takes milliseconds."""
    ahead = 0
    """Batches that it may have drawn before they are asked for."""
    module = ""
    """What must import."""

    def __init__(self, capacity: int, payload: Payload, video: bool) -> None:
        self.capacity, self.payload, self.video, self.next_row = capacity, payload, video, 0
        self.state = (payload.state,) if video else ()
        self.make()

    @abstractmethod
    def make(self) -> None:
        """The empty buffer."""

    @abstractmethod
    def rows(self, first: int, count: int) -> Any:
        """Rows of the stream in the form that `add` takes; never timed."""

    @abstractmethod
    def add(self, rows: Any) -> object:
        """Adds them at the largest priority."""

    def row(self, first: int) -> Any:
        """One row of the stream in the form that `add_one` takes."""
        return self.rows(first, 1)

    def add_one(self, row: Any) -> object:
        """Adds it, as a learner that takes one step at a time."""
        return self.add(row)

    @abstractmethod
    def sample(self, count: int = DRAWN) -> Any:
        """That many rows, with weights."""

    @abstractmethod
    def update(self, ids: Any, priorities: Array) -> object:
        """Sets the priorities of rows by what the buffer knows them by: an id, key or index."""

    @abstractmethod
    def read(self, batch: Any) -> tuple[Any, Array, Array]:
        """ids as `update` takes them, rewards and weights of a batch, (count,) each."""

    @abstractmethod
    def parts(self, batch: Any) -> list[tuple[Array, Array]]:
        """The payload of a batch: arrays (count, ...) of frames, and the offset of each frame to its row's value."""

    @abstractmethod
    def bytes_used(self) -> int | None:
        """Bytes held, the rows' arrays and the trees; None where there is no telling."""

    @abstractmethod
    def save(self, path: Path) -> object:
        """Saves by what the buffer documents for it; of several ways the one that keeps most."""

    @abstractmethod
    def load(self, path: Path) -> object:
        """Loads it into this buffer, a new one."""

    def prepare(self, count: int) -> Any:
        """The next rows of the stream."""
        rows = self.rows(self.next_row, count)
        self.next_row += count
        return rows

    def prepare_one(self) -> Any:
        """The next row of the stream."""
        self.next_row += 1
        return self.row(self.next_row - 1)

    def fill(self) -> None:
        """All of the capacity."""
        chunk = ADDED if self.video else CHUNK
        for first in range(0, self.capacity, chunk):
            self.add(self.prepare(min(chunk, self.capacity - first)))

    def wrong(self, batch: Any) -> Array:
        """Which rows of a batch are not all of one transition, bool (count,)."""
        _, rewards, _ = self.read(batch)
        row = rewards.astype(np.int64)
        wrong = np.zeros(len(row), bool)
        for array, offsets in self.parts(batch):
            expected = ((row[:, None] + offsets) % 251).astype(np.uint8)
            wrong |= (array.reshape(len(row), len(offsets), -1) != expected[..., None]).any((1, 2))
        return wrong

    def batch_bytes(self, batch: Any) -> int:
        """Bytes of payload that a sample wrote."""
        return sum(array.nbytes for array, _ in self.parts(batch))
