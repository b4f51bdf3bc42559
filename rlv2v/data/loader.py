"""Load training batches from a dataset; the next ones are prepared while the last one is in use.

The content of a batch is a function of its step (`rlv2v.data.sampler`), so a loader's state is its step and the list
of the files that broke. Each clip is read and resized by a thread (`ThreadReader`). On a GPU, or for `backend="dali"`,
a DALI graph (`rlv2v.data.dali`) decodes, resizes and crops the sets whose videos it decodes as PyAV does. Both draw the
same clips and decode the same colours; they resample nearly alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from rlv2v.crop_size import CropSize
from rlv2v.data.dali import Device, GraphReader, decodes, has_dali
from rlv2v.data.demux import SharedFiles
from rlv2v.data.index import Dataset, Source, describe_change, index_folder, name_in, usable_sources
from rlv2v.data.inspect import short_reason
from rlv2v.data.readers import FrameReader
from rlv2v.data.sampler import SETS, Augment, ClipSample, ClipSampler, Unreadable, restore_dataset
from rlv2v.data.scaling import centre_crop, cover
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError
from rlv2v.runtime.device import on_device

Backend = Literal["auto", "dali"]


@dataclass(frozen=True)
class Batch:
    """Hold uint8 RGB: x, y, z (B,T,H,W,3), s (B,H,W,3); None for a set that is empty or not asked for."""

    x: torch.Tensor | None
    y: torch.Tensor | None
    z: torch.Tensor | None
    s: torch.Tensor | None


class ClipReader:
    """Read clips of H and W of `size`, with one `FrameReader` a thread, and cache sources, resized.

    The first sources read stay, until `cache_bytes` are full. Clips are drawn in random order, each once an epoch: to
    evict the oldest would only drop what comes next.
    """

    def __init__(self, size: CropSize, cache_bytes: int) -> None:
        self.size, self.free_bytes = size, cache_bytes
        self._local, self._lock = threading.local(), threading.Lock()
        self._files = SharedFiles()
        self._cache: dict[tuple[Path, tuple[int, int]], np.ndarray | None] = {}
        """None: a thread is reading the source, or could not."""

    def read(self, source: Source, start: int, num: int, scaled: tuple[int, int]) -> np.ndarray:
        """Return frames `start .. start+num`, scaled to a width and height, by this thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = FrameReader(self._files)
        reader: FrameReader = self._local.reader
        return reader.read(source, start, num, scaled)

    def _cached(self, source: Source, scaled: tuple[int, int]) -> np.ndarray | None:
        """Return all frames of a source that is in memory or that there is room for, else None."""
        num_bytes = source.num_frames * scaled[0] * scaled[1] * 3
        key = source.path, scaled
        with self._lock:
            if key in self._cache or num_bytes > self.free_bytes:
                return self._cache.get(key)
            self.free_bytes -= num_bytes
            self._cache[key] = None
        with suppress(UserError, OSError):  # whether a clip fails must not depend on which thread fills the cache
            self._cache[key] = self.read(source, 0, source.num_frames, scaled)
            return self._cache[key]
        with self._lock:
            self.free_bytes += num_bytes
        return None

    def clip(self, sample: ClipSample, num: int) -> np.ndarray:
        """Return the frames of a sample, cropped and flipped, uint8 (num,H,W,3)."""
        source, scaled, first = sample.source, sample.scaled(self.size), sample.start
        frames = self._cached(source, scaled)
        height, width = self.size.height, self.size.width
        if sample.end is not None:
            still = (self.read(source, 0, 1, scaled) if frames is None else frames)[0]
            corners = sample.corners(self.size, num)
            clip = np.stack([still[top : top + height, left : left + width] for top, left in corners])
        else:
            clip = self.read(source, first, num, scaled) if frames is None else frames[first : first + num]
            top, left = sample.corner(self.size)
            clip = clip[:, top : top + height, left : left + width]
        left_right, up_down, transposed = sample.flips
        clip = clip[:, :, ::-1] if left_right else clip
        clip = clip[:, ::-1] if up_down else clip
        return clip.swapaxes(1, 2) if transposed else clip


class ThreadReader:
    """Read the batches of one set by the threads of `pool`, each clip a task of its own."""

    def __init__(self, sampler: ClipSampler, name: str, clips: ClipReader, pool: ThreadPoolExecutor) -> None:
        self._samples, self._pool = partial(sampler.samples, name), pool
        self._read = partial(clips.clip, num=sampler.length(name))
        self._pending: dict[ClipSample, Future[np.ndarray]] = {}

    def prepare(self, step: int) -> None:
        """Start on the batch of `step` and of the one after it, by the samples as they are now."""
        pending, samples = self._pending, self._samples(step) + self._samples(step + 1)
        self._pending = {sample: pending.get(sample) or self._pool.submit(self._read, sample) for sample in samples}

    def take(self, step: int) -> torch.Tensor:
        """Return the batch of `step`, uint8 (B,T,H,W,3). Raises `Unreadable`; may then be prepared again."""
        clips, faults = [], {}
        for sample in self._samples(step):
            try:
                clips.append(self._pending[sample].result())
            except (UserError, OSError) as error:
                faults[sample.source] = short_reason(error, sample.source.path)
        if faults:
            raise Unreadable(faults)
        return torch.from_numpy(np.stack(clips))

    def close(self) -> None:
        """Forget what is under way; the pool is the loader's."""
        self._pending = {}


class Loader:
    """Iterate endlessly over `Batch`; `next(loader)` is step `loader.step`, prepared while the last one was in use.

    dataset: from `open_dataset`, opened for at least `frames` frames.  batch: clips a rank and step, by set, such as
    {"x": 2, "y": 1, "z": 2, "s": 2}; a set that is missing or 0 gives None.  frames: T.  size: H and W of crops, see
    `CropSize.of`; a video just covers one.  seed: same seed, same batches.  augment: `none`, `flip`
    (left-right), `dihedral` (also up-down and transposed, squares alone); the crop is random in all three.
    threads: background readers, without influence on what is drawn.  cache_mib: memory for sources, resized; 0 = none;
    a DALI graph uses none.
    device: where the batches are; on `gpu`, which is torch's current CUDA device, DALI decodes what NVDEC can.
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
        size: CropSize | int | str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment = "flip",
        threads: int = 1,
        backend: Backend = "auto",
        device: Device = "cpu",
        cache_mib: int = 1024,
    ) -> None:
        if not batch.keys() <= set(SETS) or min(batch.values(), default=0) < 0:
            raise UserError(f"batch: expected 0 or more of each set {', '.join(SETS)}, got {dict(batch)}")
        for value, choices in ((augment, Augment), (backend, Backend), (device, Device)):
            if value not in get_args(choices):
                raise UserError(f"loader: expected {' or '.join(get_args(choices))}, got {value}")
        self.size = CropSize.of(size)
        if augment == "dihedral" and not self.size.is_square:
            raise UserError(f"augment: expected none or flip for crops of {self.size}, got dihedral, which transposes")
        if not 0 <= rank < world_size:
            raise UserError(f"rank: expected 0 to world_size-1 = {world_size - 1}, got {rank}")
        self._uses_dali = needs_dali(device, backend)
        self.threads, self.device, self.step = threads, device, 0
        self.clips = ClipReader(self.size, cache_mib * 2**20)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rlv2v-loader")
        self._open(ClipSampler(dataset, batch, frames, seed, rank, world_size, augment))

    def _open(self, sampler: ClipSampler) -> None:
        """Take the samples of `sampler`, and drop what was prepared of another one."""
        self.sampler = sampler
        self._readers = {name: self._open_reader(name) for name in SETS if sampler.batch[name]}

    def _open_reader(self, name: str) -> ThreadReader | GraphReader:
        sources = self.sampler.dataset.sets[name]
        if self._uses_dali and all(decodes(source, self.device) for source in sources):
            return GraphReader(self.sampler, name, size=self.size, device=self.device, threads=self.threads)
        return ThreadReader(self.sampler, name, self.clips, self._pool)

    def _take(self, name: str) -> torch.Tensor:
        """Return the batch of a set; files that break are excluded until it is complete."""
        while True:
            try:
                clips = self._readers[name].take(self.step)
                return on_device(clips, torch.device("cuda")) if self.device == "gpu" else clips
            except Unreadable as error:
                self.sampler.exclude(name, self.step, error.faults)
                self._readers[name].prepare(self.step)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Return the batch of this step. Raises `UserError` with the files when too many can no longer be read."""
        for reader in self._readers.values():
            reader.prepare(self.step)
        clips = {name: self._take(name) for name in self._readers}
        self.step += 1
        stills = clips.get("s")
        return Batch(clips.get("x"), clips.get("y"), clips.get("z"), None if stills is None else stills[:, 0])

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the files that broke, and what must be equal for the step to mean the same clips."""
        sampler = self.sampler
        return {
            "step": self.step,
            "excluded": sampler.state(),
            "fingerprint": sampler.dataset.fingerprint,
            "contents": sampler.dataset.contents(),
            "seed": sampler.seed,
            "frames": sampler.frames,
            "size": self.size.plain,
            "augment": sampler.augment,
            "batch": {name: num * sampler.world_size for name, num in sampler.batch.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the saved step; any rank may load any rank's state. Raises `UserError` naming what has changed.

        The files that were excluded by then stay so, whether the index still holds them or not.
        """
        if missing := self.state_dict().keys() - state.keys() - {"contents"}:  # older ones lack it
            raise UserError(
                f"loader state: expected {', '.join(sorted(missing))}, which it lacks; it was not saved by a loader"
            )
        dataset = restore_dataset(self.sampler.dataset, state["excluded"])
        current = self.state_dict()
        if state["fingerprint"] != dataset.fingerprint:
            change = describe_change(state["contents"], dataset.contents()) if "contents" in state else "files changed"
            raise UserError(
                f"resume: {dataset.root} must stay as it was: {change}; restore it, or start a new run by --from"
            )
        titles = {"batch": "the batch over all ranks"}
        for name in current.keys() - {"step", "excluded", "fingerprint", "contents"}:
            if state[name] != current[name]:
                raise UserError(
                    f"resume: {titles.get(name, name)} must stay as saved: expected {state[name]}, "
                    f"got {current[name]}; restore it or start a new run"
                )
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise UserError(f"loader state: step must be 0 or more, got {state['step']}")
        for reader in self._readers.values():
            reader.close()
        self._open(replace(self.sampler, dataset=dataset))
        self.sampler.load(state["excluded"])
        self.step = state["step"]

    def close(self) -> None:
        """Stop the background readers."""
        for reader in self._readers.values():
            reader.close()
        self._pool.shutdown(cancel_futures=True)


def needs_dali(device: Device, backend: Backend) -> bool:
    """Return whether a DALI graph reads the sets. Raises `UserError` where what it needs is missing."""
    if (device, backend) == ("cpu", "auto"):
        return False
    if not has_dali():
        asked = "device gpu (--decode gpu)" if device == "gpu" else "backend dali"
        raise UserError(f"{asked}: needs DALI, which is not installed; install the extra: pip install 'rlv2v[dali]'")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device gpu: expected a CUDA GPU, found none that torch can use; use device cpu")
    return True


def evaluation_clips(folder: Path, *, frames: int | None, size: CropSize) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path in the folder without suffix, uint8 (T,H,W,3)) for each video of a folder in natural order.

    The first `frames` frames (None: all), scaled to cover `size`, centre crop, no augmentation. Sources that are
    damaged or too short for that are warned about by name and left out; `UserError` when none is left.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of videos")
    for source in usable_sources(index_folder(folder, frames=frames or 1), folder, "clip", required=True):
        num = source.num_frames if frames is None else frames
        clip = [centre_crop(cover(f[None], size), size)[0] for f in read_frames(source.path, num=num)]
        yield name_in(folder, source.path), np.stack(clip)
