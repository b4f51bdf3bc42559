"""The buffers of bench/replay.py, each in its fastest documented form, and rows that show where they are wrong.

Row k of the stream has the reward k, and the value k % 251 in every byte of its payload; where a buffer shares frames
between windows, frame j of the window has (k + j) % 251.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from harness import Bench

from rlv2v.replay import PrioritizedReplay, ReplayBatch

Array = npt.NDArray[Any]
ADDED, DRAWN, ALPHA, BETA = 64, 256, 0.6, 0.4
FRAME, STATE = (64, 64, 3), 16
CHUNK = 65536
SAME = np.zeros(1, np.int64)


class Payload(NamedTuple):
    """Make rows whose states are `state` frames; the first axis of each array is the row."""

    frame: tuple[int, ...]
    state: int = 1

    @property
    def video(self) -> bool:
        """Return whether states are windows of several frames."""
        return self.state > 1

    def rows(self, first: int, count: int, *shape: int) -> Array:
        """Return uint8 (count, *shape, *frame)."""
        shape = (*shape, *self.frame)
        values = (np.arange(first, first + count) % 251).astype(np.uint8).reshape(-1, *[1] * len(shape))
        return np.ascontiguousarray(np.broadcast_to(values, (count, *shape)))

    def transitions(self, first: int, count: int) -> tuple[Array, Array, Array]:
        """Return states, actions and rewards of rows."""
        window = (self.state,) if self.video else ()
        rewards = np.arange(first, first + count).astype(np.float32)
        return self.rows(first, count, *window), self.rows(first, count), rewards


@dataclass
class Peer:
    """Use a prioritised buffer as a learner does; `next_row` is the first row of the stream that was not added yet."""

    capacity: int
    payload: Payload
    rows: Callable[[int, int], Any]
    """Return rows (first, count) of the stream in the form that `add` takes, one alone as itself; never timed."""
    add: Callable[[Any], object]  # add rows at the largest priority
    sample: Callable[..., Any]  # draw `count` rows (default 256), with weights
    update: Callable[[Any, Array], object]  # set the priorities of rows by their id or index
    read: Callable[[Any], tuple[Any, Array, Array]]
    """Return ids as `update` takes them, rewards and weights of a batch, (count,) each."""
    bytes_used: Callable[[], int]  # return the bytes of the rows' arrays and the trees
    save: Callable[[Path], object]  # save in the documented way that keeps most
    load: Callable[[Path], object]  # load into this new buffer
    parts: Callable[[Any], list[tuple[Array, Array]]] = lambda batch: whole_states(batch)
    """Return a batch's payload: arrays (count, ...) of frames, and each frame's offset to its row's value."""
    replay: Any = None  # the buffer itself
    next_row: int = 0

    def prepare(self, count: int) -> Any:
        """Return the next rows of the stream."""
        self.next_row += count
        return self.rows(self.next_row - count, count)

    def fill(self) -> None:
        """Fill the whole capacity."""
        chunk = ADDED if self.payload.video else CHUNK
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


def whole_states(batch: Any) -> list[tuple[Array, Array]]:
    """Return the parts of a batch whose rows keep their states whole."""
    return [(np.asarray(batch[name]), SAME) for name in ("obs", "next_obs", "act")]


def ours(capacity: int, payload: Payload) -> Peer:
    """Use rlv2v.replay; video rows are 64 windows on a clip of 80 frames, each with the next frame as action."""
    video, length = payload.video, payload.state
    replay = PrioritizedReplay(capacity, payload.frame, length, alpha=ALPHA, beta=BETA, seed=0)

    def rows(first: int, count: int) -> Any:
        if count == 1 and not video:
            frame = payload.rows(first, 1)
            return frame, frame[0], first, float(first)
        position = np.arange(first, first + count)
        states = None if video else payload.rows(first, count, 1)
        return states, payload.rows(first, count + length if video else count), position, position.astype(np.float32)

    def add(rows: Any) -> None:
        states, frames, position, reward = rows
        if states is not None:
            replay.add(state=states, action=frames, reward=reward, true_frame=frames, position=position)
            return
        clip, starts = replay.put_clip(frames), np.arange(len(reward))
        following, state = (clip, starts + length), (clip, starts, np.full(len(reward), length))
        replay.add(state=state, action=following, reward=reward, true_frame=following, position=position)
        clip.release()

    def parts(batch: ReplayBatch) -> list[tuple[Array, Array]]:
        last = np.array([length if video else 0])
        window = np.arange(length + 1) if video else np.zeros(2, np.int64)
        tensors = [(batch.next_states, window), (batch.true_frames, last)]
        if batch.states.data_ptr() != batch.next_states.data_ptr():  # else views of the next states, actions too
            tensors += [(batch.states, window[:-1]), (batch.actions, last)]
        tensors += [(column % 251, SAME) for column in (batch.ids, batch.positions)]
        return [(tensor.numpy(), offsets) for tensor, offsets in tensors]

    return Peer(
        capacity,
        payload,
        rows,
        add,
        sample=lambda count=DRAWN: replay.sample(count),
        update=replay.update_priorities,
        read=lambda batch: (batch.ids, batch.rewards.numpy(), batch.weights.numpy()),
        bytes_used=lambda: replay.bytes_used,
        save=replay.save,
        load=lambda path: replay.load(path),  # looked up at the call: a test replaces it
        parts=parts,
        replay=replay,
    )


def cpprb(capacity: int, payload: Payload, **options: Any) -> Peer:
    """Use cpprb.PrioritizedReplayBuffer, frames not shared (see `shared_frames` in replay_faults)."""

    def rows(first: int, count: int) -> Any:
        obs, act, rew = payload.transitions(first, count)
        return {"obs": obs, "next_obs": obs, "act": act, "rew": rew, "done": 0 * rew}

    shapes = {name: {"shape": array.shape[1:], "dtype": array.dtype} for name, array in rows(0, 1).items()}
    fields = shapes | {"rew": {}, "done": {}}
    buffer = importlib.import_module("cpprb").PrioritizedReplayBuffer(capacity, fields, alpha=ALPHA, **options)
    return Peer(
        capacity,
        payload,
        rows,
        add=lambda rows: buffer.add(**rows),
        sample=lambda count=DRAWN: buffer.sample(count, beta=BETA),
        update=buffer.update_priorities,
        read=lambda batch: (batch["indexes"], batch["rew"].ravel(), batch["weights"]),
        bytes_used=lambda: sum(a.nbytes for a in buffer.get_all_transitions().values()) + tree_bytes(capacity),
        save=lambda path: buffer.save_transitions(path.with_suffix(".npz")),
        load=lambda path: buffer.load_transitions(path.with_suffix(".npz")),
    )


def tianshou(capacity: int, payload: Payload) -> Peer:
    """Use tianshou.data.PrioritizedReplayBuffer; several rows go in by `update` from a buffer made of arrays."""
    data = importlib.import_module("tianshou.data")
    buffer = data.PrioritizedReplayBuffer(capacity, alpha=ALPHA, beta=BETA)

    def rows(first: int, count: int) -> Any:
        (obs, act, rew), never = payload.transitions(first, count), np.zeros(count, bool)
        fields = {"obs": obs, "act": act, "rew": rew, "obs_next": obs, "terminated": never, "truncated": never}
        if count == 1:
            return data.Batch({name: values[0] for name, values in fields.items()}, info={})
        return data.ReplayBuffer.from_data(**fields, done=never)

    def bytes_used() -> int:
        arrays = [value for value in peer.replay._meta.values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) + int(peer.replay.weight._value.nbytes)

    peer = Peer(
        capacity,
        payload,
        rows,
        add=lambda rows: (buffer.add if type(rows) is data.Batch else buffer.update)(rows),
        sample=lambda count=DRAWN: peer.replay.sample(count),
        update=lambda ids, priorities: peer.replay.update_weight(ids, priorities),
        read=lambda batch: (batch[1], batch[0].rew, batch[0].weight),
        bytes_used=bytes_used,
        save=lambda path: path.write_bytes(pickle.dumps(buffer)),
        load=lambda path: setattr(peer, "replay", pickle.loads(path.read_bytes())),
        parts=lambda batch: [(batch[0][name], SAME) for name in ("obs", "obs_next", "act")],
        replay=buffer,
    )
    return peer


def torchrl(capacity: int, payload: Payload) -> Peer:
    """Use torchrl's ReplayBuffer of a LazyTensorStorage and a PrioritizedSampler.

    A quarter faster to add than TensorDictPrioritizedReplayBuffer, which is this with its index kept in each row.
    """
    data, pack = importlib.import_module("torchrl.data"), importlib.import_module("tensordict").TensorDict
    sampler, storage = data.PrioritizedSampler(capacity, ALPHA, BETA), data.LazyTensorStorage(capacity)
    buffer = data.ReplayBuffer(storage=storage, sampler=sampler)

    def rows(first: int, count: int) -> Any:
        obs, act, rew = map(torch.from_numpy, payload.transitions(first, count))
        return pack(
            {"obs": obs, "next_obs": obs, "act": act, "rew": rew, "done": torch.zeros_like(rew).bool()}, [count]
        )

    def bytes_used() -> int:
        return sum(value.nbytes for value in buffer.storage[:capacity].values()) + tree_bytes(capacity)

    def load(path: Path) -> None:
        buffer.extend(rows(0, 1))  # it loads into what it has allocated
        buffer.loads(path)

    return Peer(
        capacity,
        payload,
        rows,
        add=buffer.extend,
        sample=lambda count=DRAWN: buffer.sample(count, return_info=True),
        update=lambda ids, priorities: buffer.update_priority(ids, torch.from_numpy(priorities)),
        read=lambda batch: (batch[1]["index"], batch[0]["rew"].numpy(), batch[1]["priority_weight"].numpy()),
        bytes_used=bytes_used,
        save=buffer.dumps,
        load=load,
        parts=lambda batch: whole_states(batch[0]),
    )


MAKERS: dict[str, Callable[..., Peer]] = {"rlv2v": ours, "cpprb": cpprb, "tianshou": tianshou, "torchrl": torchrl}
MODULES = {"tianshou": "tianshou.data", "torchrl": "torchrl._torchrl"}
"""What must import, where it is not the name: the sampler of torchrl needs the compiled part."""


def tree_bytes(capacity: int) -> int:
    """Return the bytes of a binary sum tree and a minimum tree of float32, as in cpprb and torchrl, which hide them."""
    return 2 * 2 * 4 * 2 ** math.ceil(math.log2(capacity))


def available(bench: Bench) -> list[str]:
    """Return the buffers that import; record why others do not."""
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # no greetings
    names = []
    for name in MAKERS:
        try:
            importlib.import_module(MODULES.get(name, name))
            names.append(name)
        except Exception as error:
            bench.skip(name, error)
    return names
