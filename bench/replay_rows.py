"""The interface of a buffer in bench/replay.py, and rows that can be checked by their own values.

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
    """Make rows of states of `state` frames; the first axis of each array is the row."""

    def __init__(self, frame: tuple[int, ...], state: int) -> None:
        self.frame, self.state = frame, state

    def rows(self, first: int, count: int, *shape: int) -> Array:
        """Return uint8 (count, *shape, *frame)."""
        shape = (*shape, *self.frame)
        values = (np.arange(first, first + count) % 251).astype(np.uint8).reshape(-1, *[1] * len(shape))
        return np.ascontiguousarray(np.broadcast_to(values, (count, *shape)))


class Peer(ABC):
    """Use a prioritised buffer as a learner does; `next_row` is the first row of the stream that was not added yet.

    capacity: rows that it holds. video: states are windows of `payload.state` frames; otherwise one frame.

    A buffer defines
        make()                  make the empty buffer
        rows(first, count)      rows of the stream in the form that `add` takes; never timed
        add(rows)               add rows at the largest priority
        sample(count)           draw rows, with weights
        update(ids, priorities) set the priorities of rows by their id, key or index
        read(batch)             ids as `update` takes them, rewards and weights of a batch, (count,) each
        parts(batch)            its payload: arrays (count, ...) of frames, and each frame's offset to its row's value
        bytes_used()            bytes of the rows' arrays and the trees; None if the buffer does not show them
        save(path), load(path)  in the documented way that keeps most; load into a new buffer
    and, where one row goes in another way, row(first) and add_one(row).
    """

    share = 1
    """It gets one of so many turns: more than 1 where a turn takes milliseconds."""
    ahead = 0
    """Batches that it may draw before they are asked for."""
    module = ""
    """The module that must import."""

    def __init__(self, capacity: int, payload: Payload, video: bool) -> None:
        self.capacity, self.payload, self.video, self.next_row = capacity, payload, video, 0
        self.state = (payload.state,) if video else ()
        self.make()

    @abstractmethod
    def make(self) -> None: ...
    @abstractmethod
    def rows(self, first: int, count: int) -> Any: ...
    @abstractmethod
    def add(self, rows: Any) -> object: ...
    @abstractmethod
    def sample(self, count: int = DRAWN) -> Any: ...
    @abstractmethod
    def update(self, ids: Any, priorities: Array) -> object: ...
    @abstractmethod
    def read(self, batch: Any) -> tuple[Any, Array, Array]: ...
    @abstractmethod
    def parts(self, batch: Any) -> list[tuple[Array, Array]]: ...
    @abstractmethod
    def bytes_used(self) -> int | None: ...
    @abstractmethod
    def save(self, path: Path) -> object: ...
    @abstractmethod
    def load(self, path: Path) -> object: ...

    def row(self, first: int) -> Any:
        """Return one row of the stream in the form that `add_one` takes."""
        return self.rows(first, 1)

    def add_one(self, row: Any) -> object:
        """Add one row, as a learner that takes one step at a time."""
        return self.add(row)

    def prepare(self, count: int) -> Any:
        """Return the next rows of the stream."""
        rows = self.rows(self.next_row, count)
        self.next_row += count
        return rows

    def prepare_one(self) -> Any:
        """Return the next row of the stream."""
        self.next_row += 1
        return self.row(self.next_row - 1)

    def fill(self) -> None:
        """Fill the whole capacity."""
        chunk = ADDED if self.video else CHUNK
        for first in range(0, self.capacity, chunk):
            self.add(self.prepare(min(chunk, self.capacity - first)))

    def wrong(self, batch: Any) -> Array:
        """Return which rows of a batch mix several transitions, bool (count,)."""
        _, rewards, _ = self.read(batch)
        row = rewards.astype(np.int64)
        wrong = np.zeros(len(row), bool)
        for array, offsets in self.parts(batch):
            expected = ((row[:, None] + offsets) % 251).astype(np.uint8)
            wrong |= (array.reshape(len(row), len(offsets), -1) != expected[..., None]).any((1, 2))
        return wrong

    def batch_bytes(self, batch: Any) -> int:
        """Return the bytes of payload that a sample wrote."""
        return sum(array.nbytes for array, _ in self.parts(batch))
