"""Training batches from a dataset, prepared while the last one is in use.

What a batch is made of is a function of its step (`rlv2v.data.sampler`), so a loader's whole state is its step and the
list of the files that broke. On the CPU each clip is read and resized by a thread (`ThreadReader`); on a GPU, or for
`backend="dali"`, a DALI graph a set decodes, resizes and crops (`rlv2v.data.dali`). Both draw the same and decode the
same colours; they resample nearly alike.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from rlv2v.data.dali import GraphReader
from rlv2v.data.index import Dataset, Source, index_folder
from rlv2v.data.readers import FrameReader, Times, has_dali
from rlv2v.data.sampler import SETS, Augment, Draw, Draws, Unreadable, restored
from rlv2v.data.video import centre_crop, fit, fit_size, read_frames
from rlv2v.errors import UserError, one_line

Backend = Literal["auto", "dali"]
Device = Literal["cpu", "gpu"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """uint8 RGB: x, y, z (B,T,H,W,3), s (B,H,W,3); None for a set that is empty or not asked for."""

    x: torch.Tensor | None
    y: torch.Tensor | None
    z: torch.Tensor | None
    s: torch.Tensor | None


class SetReader(Protocol):
    """The batches of one set."""

    def prepare(self, step: int) -> None:
        """Start on the batch of `step` and of the one after it, by the draws as they are now."""

    def take(self, step: int) -> torch.Tensor:
        """The batch of `step`, uint8 (B,T,size,size,3). Raises `Unreadable`; may then be prepared and taken again."""

    def close(self) -> None:
        """Stop what runs in the background."""


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

    def release(self, num_bytes: int) -> None:
        """Give back what was reserved for a source that could not be read; it is not tried again."""
        with self._lock:
            self._free += num_bytes

    def put(self, source: Source, frames: np.ndarray) -> None:
        self._frames[source.path] = frames


class ClipReader:
    """Clips of size H = W, one `FrameReader` a thread; whole sources are kept in `cache` while it has room."""

    def __init__(self, cache: Cache, size: int) -> None:
        self._cache, self._size, self._local = cache, size, threading.local()
        self._times: dict[Path, Times | None] = {}

    def read(self, source: Source, start: int, num: int) -> np.ndarray:
        """Frames `start .. start+num`, short side `size`, by this thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = FrameReader(self._times)
        reader: FrameReader = self._local.reader
        return reader.read(source, start, num, fit_size(source.width, source.height, self._size))

    def _cached(self, source: Source, start: int, num: int) -> np.ndarray:
        """The same, from memory where the source is kept there."""
        whole = self._cache.get(source)
        if whole is None:
            width, height = fit_size(source.width, source.height, self._size)
            num_bytes = source.num_frames * width * height * 3
            if not self._cache.reserve(source, num_bytes):
                return self.read(source, start, num)
            try:
                whole = self.read(source, 0, source.num_frames)
            except (UserError, OSError):  # whether a draw fails must not depend on which thread was to fill the cache
                self._cache.release(num_bytes)
                return self.read(source, start, num)
            self._cache.put(source, whole)
        return whole[start : start + num]

    def clip(self, draw: Draw, num: int) -> np.ndarray:
        """The frames of a draw, cropped and flipped, uint8 (num,size,size,3)."""
        clip = self._cached(draw.source, draw.start, num)
        top, left = draw.corner(self._size)
        clip = clip[:, top : top + self._size, left : left + self._size]
        left_right, up_down, transposed = draw.flips
        clip = clip[:, :, ::-1] if left_right else clip
        clip = clip[:, ::-1] if up_down else clip
        return clip.swapaxes(1, 2) if transposed else clip


class ThreadReader:
    """Batches of clips that the threads of `pool` read, each clip a task of its own."""

    def __init__(
        self, draws: Callable[[int], tuple[Draw, ...]], read: Callable[[Draw], np.ndarray], pool: ThreadPoolExecutor
    ) -> None:
        self._draws, self._read, self._pool = draws, read, pool
        self._pending: dict[int, dict[Draw, Future[np.ndarray]]] = {}

    def prepare(self, step: int) -> None:
        known, self._pending = self._pending, {}
        for ahead in (step, step + 1):
            before = known.get(ahead, {})
            self._pending[ahead] = {
                draw: before.get(draw) or self._pool.submit(self._read, draw) for draw in self._draws(ahead)
            }

    def take(self, step: int) -> torch.Tensor:
        clips, faults = [], {}
        for draw in self._draws(step):
            try:
                clips.append(self._pending[step][draw].result())
            except (UserError, OSError) as error:
                faults[draw.source] = one_line(error).removeprefix(f"{one_line(draw.source.path)}: ")
        if faults:
            raise Unreadable(faults)
        return torch.from_numpy(np.stack(clips))

    def close(self) -> None:
        self._pending = {}


class Loader:
    """An endless iterator of `Batch`; `next(loader)` is step `loader.step`, prepared while the last one was in use.

    dataset: from `open_dataset`, opened for at least `frames` frames.  batch: clips a rank and step, by set, such as
    {"x": 2, "y": 1, "z": 2, "s": 2}; a set that is missing or 0 gives None.  frames, size: T and H = W.
    seed: same seed, same batches.  augment: `none`, `flip` (left-right), `dihedral` (also up-down and transposed); the
    crop is random in all three.  threads: background readers, without influence on what is drawn.  cache_mib: memory
    for whole sources, resized; 0 = none; a DALI graph keeps none.
    device: where the batches are; on `gpu`, which is torch's current CUDA device, DALI decodes, resizes and crops.
    backend: `dali` runs the GPU's graph on the CPU, `auto` the faster threads. `dali` and `gpu` raise where DALI is
    missing.

    A file that breaks during the run is warned about by name and left out, another clip of its set takes its place;
    `UserError` lists the files when more than a fifth of a set is lost. Each rank has its own list of them.
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
        device: Device = "cpu",
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
        self._graph = uses_graph(device, backend)
        self.size, self.threads, self.device, self.step = size, threads, device, 0
        self._clips = ClipReader(Cache(cache_mib * 2**20), size)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rlv2v-loader")
        self._new_draws = partial(
            Draws, batch=batch, frames=frames, seed=seed, rank=rank, world_size=world_size, augment=augment
        )
        self._open(dataset)

    def _open(self, dataset: Dataset) -> None:
        """Draw from `dataset`; what was prepared before is dropped."""
        self.plan = self._new_draws(dataset)
        self._readers = {name: self._reader(name) for name in SETS if self.plan.batch[name]}

    def _reader(self, name: str) -> SetReader:
        draws, num = partial(self.plan.at, name), self.plan.length(name)
        if not self._graph:
            return ThreadReader(draws, partial(self._clips.clip, num=num), self._pool)
        return GraphReader(
            self.plan.dataset.sets[name],
            draws,
            partial(self.plan.compute, name),
            lambda draw: self._pool.submit(self._clips.read, draw.source, draw.start, num),
            batch=self.plan.batch[name],
            frames=num,
            size=self.size,
            device=self.device,
            threads=self.threads,
        )

    def draws(self, name: str, step: int) -> list[Draw]:
        """What this rank's batch of set `name` at `step` is made of."""
        return list(self.plan.at(name, step))

    def _take(self, name: str) -> torch.Tensor:
        """The batch of a set; files that break are denied until it is whole."""
        while True:
            try:
                return self._readers[name].take(self.step)
            except Unreadable as error:
                self.plan.deny(name, self.step, error.faults)
                self._readers[name].prepare(self.step)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The batch of this step. Raises `UserError` with the files when too many can no longer be read."""
        for reader in self._readers.values():
            reader.prepare(self.step)
        clips = {name: self._take(name) for name in self._readers}
        self.step += 1
        stills = clips.get("s")
        return Batch(clips.get("x"), clips.get("y"), clips.get("z"), None if stills is None else stills[:, 0])

    def state_dict(self) -> dict[str, Any]:
        """The next step, the files that broke, and what must be equal for the step to mean the same clips."""
        plan = self.plan
        return {
            "step": self.step,
            "denied": plan.state(),
            "fingerprint": plan.dataset.fingerprint,
            "seed": plan.seed,
            "frames": plan.frames,
            "size": self.size,
            "augment": plan.augment,
            "batch": {name: num * plan.world_size for name, num in plan.batch.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the saved step; any rank may load any rank's state. Raises `UserError` naming what has changed.

        The files that were denied by then stay so, whether the index still holds them or not.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise UserError(
                f"loader state: expected {', '.join(sorted(missing))}, which it lacks; it was not saved by a loader"
            )
        dataset = restored(self.plan.dataset, state["denied"])
        mine = {**self.state_dict(), "fingerprint": dataset.fingerprint}
        what = {"fingerprint": "the dataset (its files changed)", "batch": "the batch over all ranks"}
        for name in mine.keys() - {"step", "denied"}:
            if state[name] != mine[name]:
                raise UserError(
                    f"resume: {what.get(name, name)} must stay as saved: expected {state[name]}, got {mine[name]}; "
                    f"restore it or start a new run"
                )
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise UserError(f"loader state: step must be 0 or more, got {state['step']}")
        for reader in self._readers.values():
            reader.close()
        self._open(dataset)
        self.plan.load(state["denied"])
        self.step = state["step"]

    def close(self) -> None:
        """Stop the background readers."""
        for reader in self._readers.values():
            reader.close()
        self._pool.shutdown(cancel_futures=True)


def uses_graph(device: Device, backend: Backend) -> bool:
    """Whether a DALI graph reads the sets; `UserError` where what it needs is missing."""
    for name, value, known in (("device", device, Device), ("backend", backend, Backend)):
        if value not in get_args(known):
            raise UserError(f"{name}: expected {' or '.join(get_args(known))}, got {value}")
    if (device, backend) == ("cpu", "auto"):
        return False
    if not has_dali():
        raise UserError(f"device {device}, backend {backend}: DALI is not installed; install nvidia-dali-cuda130")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device gpu: expected a CUDA GPU, found none that torch can use; use device cpu")
    return True


def evaluation_clips(folder: Path, *, frames: int | None, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name without suffix, uint8 (T,size,size,3)) of each video of a folder in natural order.

    The first `frames` frames (None: all), short side resized to `size`, centre crop, no augmentation. Sources that are
    damaged or too short for that are warned about by name and left out; `UserError` when none is left.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of videos")
    found = index_folder(folder, frames=frames or 1)
    for source in found:
        if source.status == "excluded":
            log.warning("%s: %s; left out", one_line(source.path), source.reason)
    usable = [source for source in found if source.status != "excluded"]
    if not usable:
        why = "; ".join(f"{one_line(s.path.name)}: {s.reason}" for s in found) or "it is empty"
        raise UserError(f"{folder}: no usable clip: {why}")
    for source in usable:
        num = source.num_frames if frames is None else frames
        clip = [centre_crop(fit(f[None], size), size)[0] for f in read_frames(source.path, num=num)]
        yield source.path.stem, np.stack(clip)
