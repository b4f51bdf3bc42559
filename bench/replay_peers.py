"""The replay buffers of bench/replay.py, each in its fastest documented form: whole batches where it takes them."""

from __future__ import annotations

import functools
import importlib
import math
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from replay_rows import ADDED, ALPHA, BETA, CHUNK, DRAWN, Array, Peer

from rlv2v.replay import PrioritizedReplay, ReplayBatch

SAME = np.zeros(1, np.int64)


class Ours(Peer):
    """Use rlv2v.replay; video rows are 64 windows on a clip of 80 frames, each with the next frame as action."""

    module = "rlv2v"

    def make(self) -> None:
        frame, state = self.payload.frame, self.payload.state
        self.replay = PrioritizedReplay(self.capacity, frame, state, alpha=ALPHA, beta=BETA, seed=0)

    def rows(self, first: int, count: int) -> Any:
        position = np.arange(first, first + count)
        states = None if self.video else self.payload.rows(first, count, 1)
        frames = self.payload.rows(first, count + self.payload.state if self.video else count)
        return states, frames, position, position.astype(np.float32)

    def add(self, rows: Any) -> object:
        states, frames, position, reward = rows
        if states is not None:
            return self.replay.add(state=states, action=frames, reward=reward, true_frame=frames, position=position)
        clip, starts, length = self.replay.put_clip(frames), np.arange(len(reward)), self.payload.state
        following, state = (clip, starts + length), (clip, starts, np.full(len(reward), length))
        self.replay.add(state=state, action=following, reward=reward, true_frame=following, position=position)
        clip.release()
        return clip

    def row(self, first: int) -> Any:
        frame = self.payload.rows(first, 1)
        return frame, frame[0], first

    def add_one(self, row: Any) -> object:
        state, frame, k = row
        return self.replay.add(state=state, action=frame, reward=float(k), true_frame=frame, position=k)

    def sample(self, count: int = DRAWN) -> ReplayBatch:
        return self.replay.sample(count)

    def update(self, ids: Any, priorities: Array) -> object:
        return self.replay.update_priorities(ids, priorities)

    def read(self, batch: ReplayBatch) -> tuple[Any, Array, Array]:
        return batch.ids, batch.rewards.numpy(), batch.weights.numpy()

    def parts(self, batch: ReplayBatch) -> list[tuple[Array, Array]]:
        last = np.array([self.payload.state if self.video else 0])
        window = np.arange(self.payload.state + 1) if self.video else np.zeros(2, np.int64)
        parts = [(batch.next_states, window), (batch.true_frames, last)]
        if batch.states.data_ptr() != batch.next_states.data_ptr():  # else views of the next states, actions too
            parts += [(batch.states, window[:-1]), (batch.actions, last)]
        return [(array.numpy(), offsets) for array, offsets in parts]

    def wrong(self, batch: ReplayBatch) -> Array:
        off = (batch.ids != batch.rewards) | (batch.positions != batch.rewards)
        return super().wrong(batch) | off.numpy()

    def bytes_used(self) -> int:
        return self.replay.bytes_used

    def save(self, path: Path) -> None:
        self.replay.save(path)

    def load(self, path: Path) -> None:
        self.replay.load(path)


class Cpprb(Peer):
    """Use cpprb.PrioritizedReplayBuffer, frames not shared (see `shared_frames` in replay_faults)."""

    module = "cpprb"
    options: ClassVar[dict[str, Any]] = {}

    def make(self) -> None:
        frame = self.payload.frame
        obs, act = {"shape": (*self.state, *frame), "dtype": np.uint8}, {"shape": frame, "dtype": np.uint8}
        fields = {"obs": obs, "next_obs": obs, "act": act, "rew": {}, "done": {}}
        kind = importlib.import_module("cpprb").PrioritizedReplayBuffer
        self.buffer = kind(self.capacity, fields, alpha=ALPHA, **self.options)

    def rows(self, first: int, count: int) -> Any:
        obs, rew = self.payload.rows(first, count, *self.state), np.arange(first, first + count).astype(np.float32)
        return {"obs": obs, "next_obs": obs, "act": self.payload.rows(first, count), "rew": rew, "done": 0 * rew}

    def add(self, rows: Any) -> object:
        return self.buffer.add(**rows)

    def sample(self, count: int = DRAWN) -> Any:
        return self.buffer.sample(count, beta=BETA)

    def update(self, ids: Any, priorities: Array) -> object:
        return self.buffer.update_priorities(ids, priorities)

    def read(self, batch: Any) -> tuple[Any, Array, Array]:
        return batch["indexes"], batch["rew"].ravel(), batch["weights"]

    def parts(self, batch: Any) -> list[tuple[Array, Array]]:
        return [(batch[name], SAME) for name in ("obs", "next_obs", "act")]

    def bytes_used(self) -> int:
        """Return the arrays and, as it does not show its trees, a sum and a minimum of float32 over a power of two."""
        arrays = self.buffer.get_all_transitions()
        return sum(array.nbytes for array in arrays.values()) + tree_bytes(self.capacity)

    def save(self, path: Path) -> None:
        self.buffer.save_transitions(path.with_suffix(".npz"))

    def load(self, path: Path) -> None:
        self.buffer.load_transitions(path.with_suffix(".npz"))


class Tianshou(Peer):
    """Use tianshou.data.PrioritizedReplayBuffer; a batch goes in by `update` from a buffer that was made of arrays."""

    module = "tianshou.data"

    def make(self) -> None:
        self.data = importlib.import_module("tianshou.data")
        self.buffer = self.data.PrioritizedReplayBuffer(self.capacity, alpha=ALPHA, beta=BETA)

    def rows(self, first: int, count: int) -> Any:
        obs, never = self.payload.rows(first, count, *self.state), np.zeros(count, bool)
        act, rew = self.payload.rows(first, count), np.arange(first, first + count).astype(np.float32)
        ends = {"terminated": never, "truncated": never, "done": never}
        return self.data.ReplayBuffer.from_data(obs=obs, act=act, rew=rew, obs_next=obs, **ends)

    def row(self, first: int) -> Any:
        obs, act, never = self.payload.rows(first, 1)[0], self.payload.rows(first, 1)[0], np.bool_(False)
        row = {"obs": obs, "act": act, "rew": np.float32(first), "obs_next": obs, "info": {}}
        return self.data.Batch(**row, terminated=never, truncated=never)

    def add_one(self, row: Any) -> object:
        return self.buffer.add(row)

    def fill(self) -> None:
        """Write most rows into the arrays that a few make: `update` counts rows in Python."""
        self.add(self.prepare(min(self.capacity, ADDED)))
        meta, weight = self.buffer._meta, self.buffer.weight
        while self.next_row < self.capacity:
            first = self.next_row
            rows = self.prepare(min(ADDED if self.video else CHUNK, self.capacity - first))._meta
            for name in rows.get_keys():
                meta[name][first : self.next_row] = rows[name]
        self.buffer._size, self.buffer._insertion_idx = self.capacity, 0
        self.buffer.last_index[0] = self.capacity - 1
        weight[np.arange(self.capacity)] = np.ones(self.capacity)

    def add(self, rows: Any) -> object:
        return self.buffer.update(rows)

    def sample(self, count: int = DRAWN) -> Any:
        return self.buffer.sample(count)

    def update(self, ids: Any, priorities: Array) -> object:
        return self.buffer.update_weight(ids, priorities)

    def read(self, batch: Any) -> tuple[Any, Array, Array]:
        return batch[1], batch[0].rew, batch[0].weight

    def parts(self, batch: Any) -> list[tuple[Array, Array]]:
        return [(batch[0][name], SAME) for name in ("obs", "obs_next", "act")]

    def bytes_used(self) -> int:
        arrays = [value for value in self.buffer._meta.values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) + self.buffer.weight._value.nbytes

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self.buffer))

    def load(self, path: Path) -> None:
        self.buffer = pickle.loads(path.read_bytes())


class Torchrl(Peer):
    """Use torchrl's ReplayBuffer of a LazyTensorStorage and a PrioritizedSampler.

    A quarter faster to add than TensorDictPrioritizedReplayBuffer, which is this with its index kept in each row.
    """

    module = "torchrl._torchrl"  # the compiled part, which the sampler needs

    def make(self) -> None:
        data = importlib.import_module("torchrl.data")
        self.pack = importlib.import_module("tensordict").TensorDict
        self.sampler = data.PrioritizedSampler(self.capacity, ALPHA, BETA)
        storage = data.LazyTensorStorage(self.capacity)
        self.buffer = data.ReplayBuffer(storage=storage, sampler=self.sampler)

    def rows(self, first: int, count: int) -> Any:
        obs, act = (torch.from_numpy(self.payload.rows(first, count, *shape)) for shape in (self.state, ()))
        rew, done = torch.arange(first, first + count).float(), torch.zeros(count, dtype=torch.bool)
        return self.pack({"obs": obs, "next_obs": obs, "act": act, "rew": rew, "done": done}, [count])

    def add(self, rows: Any) -> object:
        return self.buffer.extend(rows)

    def sample(self, count: int = DRAWN) -> Any:
        return self.buffer.sample(count, return_info=True)

    def update(self, ids: Any, priorities: Array) -> object:
        return self.buffer.update_priority(ids, torch.from_numpy(priorities))

    def read(self, batch: Any) -> tuple[Any, Array, Array]:
        data, info = batch
        return info["index"], data["rew"].numpy(), info["priority_weight"].numpy()

    def parts(self, batch: Any) -> list[tuple[Array, Array]]:
        return [(batch[0][name].numpy(), SAME) for name in ("obs", "next_obs", "act")]

    def bytes_used(self) -> int:
        rows = self.buffer.storage[: self.capacity]
        return sum(value.numel() * value.element_size() for value in rows.values()) + tree_bytes(self.capacity)

    def save(self, path: Path) -> None:
        self.buffer.dumps(path)

    def load(self, path: Path) -> None:
        self.buffer.extend(self.rows(0, 1))  # it loads into what it has allocated
        self.buffer.loads(path)


class Reverb(Peer):
    """Use a reverb server in this process with one table, of a fifth of the rows if they are many.

    Frames are shared where states overlap; those of one value compress to nothing, which favours it. Samples come
    through TrajectoryDataset, an order of magnitude faster than Client.sample: it draws ahead on threads of its own, so
    that a batch may be two older than the last update.
    """

    share = 5
    ahead = 8
    module = "reverb"

    def make(self, checkpoint: Path | None = None) -> None:
        reverb, spec = (importlib.import_module(name) for name in ("reverb", "tensorflow"))
        self.size = self.capacity if self.capacity <= 4096 else self.capacity // 5
        self.length = self.payload.state + 1 if self.video else 1
        frames = spec.TensorSpec((self.length, *self.payload.frame), np.uint8)
        self.names = ("frames",) if self.video else ("obs", "next_obs", "act")
        signature = {"rew": spec.TensorSpec((1,), np.float32), **dict.fromkeys(self.names, frames)}
        table = reverb.Table(
            "rows", sampler=reverb.selectors.Prioritized(ALPHA), remover=reverb.selectors.Fifo(), max_size=self.size,
            rate_limiter=reverb.rate_limiters.MinSize(1), signature=signature,
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        keep = importlib.import_module("reverb.platform.checkpointers_lib").DefaultCheckpointer
        source = {} if checkpoint is None else {"fallback_checkpoint_path": str(checkpoint)}
        self.server = reverb.Server([table], checkpointer=keep(self.folder.name, **source))
        self.client, self.batches = self.server.localhost_client(), cast(Any, None)
        self.writer = self.client.trajectory_writer(num_keep_alive_refs=self.length)
        self.dataset = functools.partial(
            reverb.TrajectoryDataset.from_table_signature, server_address=f"localhost:{self.server.port}", table="rows"
        )

    def rows(self, first: int, count: int) -> Any:
        reward = np.arange(first, first + count).astype(np.float32)
        if not self.video:
            payload = self.payload.rows(first, count)
            return [
                {"rew": one, **dict.fromkeys(self.names, frame)} for one, frame in zip(reward, payload, strict=True)
            ]
        frames, lead = self.payload.rows(first, count + self.length - 1), np.zeros(self.length - 1, np.float32)
        reward = np.concatenate([lead, reward])  # a row is there with the last frame of its window
        return [{"rew": one, "frames": frame} for one, frame in zip(reward, frames, strict=True)]

    def add(self, rows: Any) -> object:
        for step, row in enumerate(rows, 1):
            self.writer.append(row)
            if step >= self.length:
                past = self.writer.history
                item = {"rew": past["rew"][-1:], **{name: past[name][-self.length :] for name in self.names}}
                self.writer.create_item("rows", 1.0, item)
            if step % 16 == 0:  # more at a time are warned of
                self.writer.flush()
        return self.writer.end_episode()

    def fill(self) -> None:
        for first in range(0, self.size, ADDED):
            self.add(self.prepare(min(ADDED, self.size - first)))

    def sample(self, count: int = DRAWN) -> Any:
        if count != DRAWN:
            raise ValueError(f"reverb: a sample must be of {DRAWN} rows, which it draws ahead, got {count}")
        if self.batches is None:
            ahead = self.dataset(max_in_flight_samples_per_worker=2 * DRAWN)
            self.batches = ahead.batch(DRAWN).as_numpy_iterator()
        info, data = next(self.batches)
        weights = (info.table_size * info.probability) ** -BETA
        return info.key, data, weights / weights.max()

    def update(self, ids: Any, priorities: Array) -> object:
        return self.client.mutate_priorities("rows", dict(zip(ids.tolist(), priorities.tolist(), strict=True)))

    def read(self, batch: Any) -> tuple[Any, Array, Array]:
        return batch[0], batch[1]["rew"].ravel(), batch[2]

    def parts(self, batch: Any) -> list[tuple[Array, Array]]:
        return [(batch[1][name], np.arange(self.length)) for name in self.names]

    def bytes_used(self) -> None:
        return None

    def save(self, path: Path) -> None:
        shutil.copytree(self.client.checkpoint(), path)

    def load(self, path: Path) -> None:
        self.make(path)


MAKERS: dict[str, type[Peer]] = {
    "rlv2v": Ours, "cpprb": Cpprb, "tianshou": Tianshou, "torchrl": Torchrl, "reverb": Reverb
}  # fmt: skip


def tree_bytes(capacity: int) -> int:
    """Return the bytes of a binary sum tree and a minimum tree of float32, as in cpprb and torchrl."""
    return 2 * 2 * 4 * 2 ** math.ceil(math.log2(capacity))


def load(name: str) -> None:
    """Import what the buffer needs, with few greetings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
    importlib.import_module(MAKERS[name].module)


def available() -> tuple[list[str], dict[str, str]]:
    """Return the buffers that import, and why others do not."""
    names, missing = [], {}
    for name in MAKERS:
        try:
            load(name)
        except Exception as error:
            text = re.sub(r"/\S*/", "", next(iter(str(error).splitlines()), ""))  # without this machine's folders
            missing[name] = f"{type(error).__name__}: {text}"
        else:
            names.append(name)
    return names, missing
