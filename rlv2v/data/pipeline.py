"""Training batches from a dataset: which clip, frames and crop are drawn by address, never by a running generator.

Slot j of a set is clip `j mod n` of epoch `j div n`, in that epoch's random order. Step k of W ranks with batch B takes
slots `k*W*B ...`, rank r the r-th B of them: an epoch shows every clip once over all ranks, and one rank with batch 2B
draws what two ranks with B do. Order, start, crop and flips come from (seed, set, purpose, epoch or slot), so the whole
state of a loader is its step. A source of N frames is `N div T` clips, each with a random start in its share of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from rlv2v.data.index import Dataset, Source, index_folder
from rlv2v.data.readers import AutoReader, open_reader
from rlv2v.data.video import centre_crop, fit, fit_size, one_line, read_frames
from rlv2v.errors import UserError

Augment = Literal["none", "flip", "dihedral"]
Backend = Literal["auto", "dali", "pyav"]
SETS = ("x", "y", "z", "s")
ORDER, CLIP = 0, 1
"""Purposes of a draw, part of its address."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """uint8 RGB: x, y, z (B,T,H,W,3), s (B,H,W,3); None for a set that is empty or not asked for."""

    x: torch.Tensor | None
    y: torch.Tensor | None
    z: torch.Tensor | None
    s: torch.Tensor | None


@dataclass(frozen=True)
class Draw:
    """One clip of a batch: frames `start .. start+T` of `source`, a crop, and one flip for all of its frames."""

    source: Source
    start: int
    crop: tuple[float, float]
    """Top and left as a share of the room that there is, in [0, 1)."""
    flips: tuple[bool, bool, bool]
    """Left-right, up-down, transposed."""


class Cache:
    """Whole sources, resized, in memory, first come first kept until `limit` bytes are full.

    Clips are drawn in random order, each once an epoch: to evict the oldest would only drop what comes next.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._lock = threading.Lock()
        self._frames: dict[Path, np.ndarray] = {}
        self._reserved: set[Path] = set()

    def get(self, source: Source) -> np.ndarray | None:
        return self._frames.get(source.path)

    def reserve(self, source: Source, num_bytes: int) -> bool:
        """Whether the caller shall read the whole source and `put` it."""
        with self._lock:
            if source.path in self._reserved or num_bytes > self._free:
                return False
            self._free -= num_bytes
            self._reserved.add(source.path)
            return True

    def put(self, source: Source, frames: np.ndarray) -> None:
        self._frames[source.path] = frames


class Loader:
    """An endless iterator of `Batch`; `next(loader)` is step `loader.step`, prepared while the last one was in use.

    dataset: from `open_dataset`, opened for at least `frames` frames.  batch: clips a rank and step, by set, such as
    {"x": 2, "y": 1, "z": 2, "s": 2}; a set that is missing or 0 gives None.  frames, size: T and H = W.
    seed: same seed, same batches.  augment: `none`, `flip` (left-right), `dihedral` (also up-down and transposed); the
    crop is random in all three.  threads: background readers, without influence on what is drawn.  backend: `auto` uses
    DALI where it is installed, `dali` raises where it is not.  cache_mib: memory for whole sources, resized; 0 = none.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: Mapping[str, int],
        frames: int,
        size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment = "flip",
        threads: int = 1,
        backend: Backend = "auto",
        cache_mib: int = 1024,
    ) -> None:
        if unknown := set(batch) - set(SETS):
            raise UserError(f"batch: expected sets {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
        for name, value, least in (
            ("frames", frames, 1),
            ("size", size, 1),
            ("seed", seed, 0),
            ("threads", threads, 1),
        ):
            if value < least:
                raise UserError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank: expected 0 to world_size-1 = {world_size - 1}, got {rank}")
        if augment not in get_args(Augment):
            raise UserError(f"augment: expected {', '.join(get_args(Augment))}, got {augment}")
        if min(batch.values(), default=0) < 0:
            raise UserError(f"batch: expected 0 or more of each set, got {dict(batch)}")
        self.dataset, self.frames, self.size, self.seed, self.augment = dataset, frames, size, seed, augment
        self.rank, self.world_size, self.step = rank, world_size, 0
        self.batch = {name: batch.get(name, 0) if dataset.sets[name] else 0 for name in SETS}
        self.clips = {name: list(self._clips(name)) for name in SETS}
        open_reader(backend)  # a missing backend is said now, not in a thread
        self._backend, self._local, self._cache = backend, threading.local(), Cache(cache_mib * 2**20)
        self._order = lru_cache(maxsize=2 * len(SETS))(self._shuffle)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rlv2v-loader")
        self._pending: tuple[int, dict[str, list[Future[np.ndarray]]]] | None = None

    def _clips(self, name: str) -> Iterator[tuple[Source, int, int]]:
        """(source, k, K): share k of K of each source of a set."""
        length = 1 if name == "s" else self.frames
        for source in self.dataset.sets[name]:
            if source.num_frames < length:
                raise UserError(
                    f"{one_line(source.path)}: {source.num_frames} frames, shorter than the clip length {length}"
                )
            num = source.num_frames // length
            yield from ((source, k, num) for k in range(num))

    def _rng(self, name: str, purpose: int, address: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, SETS.index(name), purpose, address]))
        )

    def _shuffle(self, name: str, epoch: int) -> np.ndarray:
        return self._rng(name, ORDER, epoch).permutation(len(self.clips[name]))

    def draws(self, name: str, step: int) -> list[Draw]:
        """What this rank's batch of set `name` at `step` is made of."""
        first = (step * self.world_size + self.rank) * self.batch[name]
        return [self._draw(name, slot) for slot in range(first, first + self.batch[name])]

    def _draw(self, name: str, slot: int) -> Draw:
        epoch, position = divmod(slot, len(self.clips[name]))
        source, k, num = self.clips[name][self._order(name, epoch)[position]]
        starts = source.num_frames - (1 if name == "s" else self.frames) + 1
        rng = self._rng(name, CLIP, slot)
        start = int(rng.integers(k * starts // num, (k + 1) * starts // num))
        top, left = rng.random(2)
        coins = rng.random(3) < 0.5
        allowed = {"none": (False, False, False), "flip": (True, False, False), "dihedral": (True, True, True)}[
            self.augment
        ]
        flips = tuple(bool(coin and may) for coin, may in zip(coins, allowed, strict=True))
        return Draw(source, start, (float(top), float(left)), (flips[0], flips[1], flips[2]))

    def _reader(self) -> AutoReader:
        """This thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = open_reader(self._backend)
        reader: AutoReader = self._local.reader
        return reader

    def _resized(self, source: Source, start: int, num: int) -> np.ndarray:
        """Frames `start .. start+num`, short side `size`, from memory where the source is kept there."""
        whole = self._cache.get(source)
        if whole is None:
            width, height = fit_size(source.width, source.height, self.size)
            if not self._cache.reserve(source, source.num_frames * width * height * 3):
                return fit(self._reader().read(source, start, num), self.size)
            whole = fit(self._reader().read(source, 0, source.num_frames), self.size)
            self._cache.put(source, whole)
        return whole[start : start + num]

    def _load(self, draw: Draw, num: int) -> np.ndarray:
        """The frames of a draw, cropped and flipped, uint8 (num,size,size,3)."""
        clip = self._resized(draw.source, draw.start, num)
        top, left = (int(u * (side - self.size + 1)) for u, side in zip(draw.crop, clip.shape[1:3], strict=True))
        clip = clip[:, top : top + self.size, left : left + self.size]
        left_right, up_down, transposed = draw.flips
        clip = clip[:, :, ::-1] if left_right else clip
        clip = clip[:, ::-1] if up_down else clip
        return clip.swapaxes(1, 2) if transposed else clip

    def _submit(self, step: int) -> dict[str, list[Future[np.ndarray]]]:
        lengths = {name: 1 if name == "s" else self.frames for name in SETS}
        return {
            name: [self._pool.submit(self._load, d, lengths[name]) for d in self.draws(name, step)] for name in SETS
        }

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The batch of this step. Raises `UserError` naming the file that can no longer be read."""
        if self._pending is None or self._pending[0] != self.step:
            self._pending = (self.step, self._submit(self.step))
        futures = self._pending[1]
        self._pending = (self.step + 1, self._submit(self.step + 1))
        clips = {name: [f.result() for f in found] for name, found in futures.items()}
        self.step += 1
        tensors = {name: torch.from_numpy(np.stack(found)) if found else None for name, found in clips.items()}
        return Batch(tensors["x"], tensors["y"], tensors["z"], None if tensors["s"] is None else tensors["s"][:, 0])

    def state_dict(self) -> dict[str, Any]:
        """The next step, and what must be equal for it to mean the same clips."""
        return {
            "step": self.step,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "frames": self.frames,
            "size": self.size,
            "augment": self.augment,
            "batch": {name: num * self.world_size for name, num in self.batch.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the saved step; any rank may load any rank's state. Raises `UserError` naming what has changed."""
        mine = self.state_dict()
        if missing := mine.keys() - state.keys():
            raise UserError(
                f"loader state: expected {', '.join(sorted(missing))}, which it lacks; it was not saved by a loader"
            )
        what = {"fingerprint": "the dataset (its files changed)", "batch": "the batch over all ranks"}
        for name in mine.keys() - {"step"}:
            if state[name] != mine[name]:
                raise UserError(
                    f"resume: {what.get(name, name)} must stay as saved: expected {state[name]}, got {mine[name]}; "
                    f"restore it or start a new run"
                )
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise UserError(f"loader state: step must be 0 or more, got {state['step']}")
        self.step = state["step"]

    def close(self) -> None:
        """Stop the background readers."""
        self._pool.shutdown(cancel_futures=True)


def evaluation_clips(folder: Path, *, frames: int | None, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name without suffix, uint8 (T,size,size,3)) of each video of a folder in natural order.

    The first `frames` frames (None: all), short side resized to `size`, centre crop, no augmentation. Sources that are
    damaged or too short for that are warned about by name and left out; `UserError` when none is left.
    """
    if not folder.is_dir():
        raise UserError(f"{one_line(folder)}: no such folder; expected a folder of videos")
    found = index_folder(folder, frames=frames or 1)
    for source in found:
        if source.status == "excluded":
            log.warning("%s: %s; left out", one_line(source.path), source.reason)
    usable = [source for source in found if source.status != "excluded"]
    if not usable:
        why = "; ".join(f"{one_line(s.path.name)}: {s.reason}" for s in found) or "it is empty"
        raise UserError(f"{one_line(folder)}: no usable clip: {why}")
    for source in usable:
        num = source.num_frames if frames is None else frames
        clip = [centre_crop(fit(f[None], size), size)[0] for f in read_frames(source.path, num=num)]
        yield source.path.stem, np.stack(clip)
