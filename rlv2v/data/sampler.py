"""Choose the clips, frames, crops and flips of each batch, by address and never by a running generator.

Slot j of a set is clip `j mod n` of epoch `j div n`, in that epoch's random order. Step k of W ranks with batch B takes
slots `k*W*B ...`, rank r the r-th B of them: an epoch shows every clip once over all ranks, and one rank with batch 2B
draws what two ranks with B do. Order, start, crop and flips come from (seed, set, purpose, epoch or slot). A source of
N frames is `N div T` clips, each with a random start in its share of it. Where the clip of a slot lies in an excluded
file, one that broke during the run, another clip of the set takes the slot, by an address of its own; crop and flips
stay. So the samples of a step are a function of the step and of the excluded files alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from rlv2v.crop_size import CropSize
from rlv2v.data.index import Dataset, fingerprint_of
from rlv2v.data.inspect import Source
from rlv2v.data.scaling import cover_size
from rlv2v.errors import UserError, get_logger

Augment = Literal["none", "flip", "dihedral"]
ALLOWED = {"none": (False, False, False), "flip": (True, False, False), "dihedral": (True, True, True)}
"""Which of the flips of a `ClipSample` an augmentation may use."""
SETS = ("x", "y", "z", "s")
ORDER, CLIP, SUBSTITUTE = 0, 1, 2
"""Purposes of a draw, part of its address."""
ROOM = 1.25
"""Size of what a still covers, over that of the crop that moves over it."""
MAX_LOST = 0.2
"""Share of a set's files that may break before the run stops."""
SavedSources = Mapping[str, list[dict[str, Any]]]
"""Excluded sources as plain values: for each set the fields of each source, and its `position` in the index."""
log = get_logger(__name__)


@dataclass(frozen=True)
class ClipSample:
    """Hold one clip of a batch: frames `start .. start+T` of `source`, a crop, and one flip for all of its frames."""

    source: Source
    start: int
    crop: tuple[float, float]
    """Top and left as a share of the free room, in [0, 1)."""
    flips: tuple[bool, bool, bool]
    """Left-right, up-down, transposed."""
    end: tuple[float, float] | None = None
    """Of a still that serves as a clip: where the crop has moved to in the last frame, as `crop`."""

    def scaled(self, size: CropSize) -> tuple[int, int]:
        """Return width and height that the source is scaled to: it just covers a crop, or its way over a still."""
        return cover_size(self.source.width, self.source.height, size if self.end is None else room(size))

    def corner(self, size: CropSize) -> tuple[int, int]:
        """Return top and left of the crop, in pixels of the scaled frame."""
        return self._corner(self.crop, size)

    def corners(self, size: CropSize, frames: int) -> list[tuple[int, int]]:
        """Return top and left of the crop in each frame of a still that serves as a clip, on a line, evenly."""
        assert self.end is not None
        shares = np.linspace(self.crop, self.end, frames)
        return [self._corner((top, left), size) for top, left in shares.tolist()]

    def _corner(self, share: tuple[float, float], size: CropSize) -> tuple[int, int]:
        width, height = self.scaled(size)
        return int(share[0] * (height - size.height + 1)), int(share[1] * (width - size.width + 1))


def room(size: CropSize) -> CropSize:
    """Return what a still covers over which a crop moves."""
    return CropSize(round(ROOM * size.height), round(ROOM * size.width))


class Unreadable(Exception):
    """Report the files of one batch that can no longer be read, each with the reason."""

    def __init__(self, faults: Mapping[Source, str]) -> None:
        super().__init__(faults)
        self.faults = faults


@dataclass(eq=False)
class ClipSampler:
    """Choose the samples of every step of one rank. The fields are those of `Loader`."""

    dataset: Dataset
    batch: Mapping[str, int]
    frames: int
    seed: int
    rank: int
    world_size: int
    augment: Augment

    def __post_init__(self) -> None:
        self.batch = {name: self.batch.get(name, 0) if self.dataset.sets[name] else 0 for name in SETS}
        self.clips = {name: list(self._clips(name)) for name in SETS}
        self.excluded: dict[str, list[Source]] = {name: [] for name in SETS}
        self._reasons: dict[Source, str] = {}
        self._order = lru_cache(maxsize=2 * len(SETS))(self._shuffle)
        self.samples = lru_cache(maxsize=4 * len(SETS))(self.compute)

    def length(self, name: str) -> int:
        """Return the frames of a clip of set `name`."""
        return 1 if name == "s" else self.frames

    def _clips(self, name: str) -> Iterator[tuple[Source, int, int]]:
        """Yield (source, low, high) of each clip of a set, whose start is drawn from low .. high-1."""
        length = self.length(name)
        for source in self.dataset.sets[name]:
            if source.is_still and length > 1:
                yield source, 0, 1
                continue
            if source.num_frames < length:
                raise UserError(f"{source.path}: {source.num_frames} frames, shorter than the clip length {length}")
            starts, num = source.num_frames - length + 1, source.num_frames // length
            yield from ((source, k * starts // num, (k + 1) * starts // num) for k in range(num))

    def _rng(self, name: str, purpose: int, address: int) -> np.random.Generator:
        key = [self.seed, SETS.index(name), purpose, address]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def _shuffle(self, name: str, epoch: int) -> np.ndarray:
        return self._rng(name, ORDER, epoch).permutation(len(self.clips[name]))

    def compute(self, name: str, step: int) -> tuple[ClipSample, ...]:
        """Return the samples of this rank's batch of set `name` at `step`.

        `samples` does the same by a cache, for the thread that calls `exclude`; another thread would leave stale rows.
        """
        first = (step * self.world_size + self.rank) * self.batch[name]
        return tuple(self._sample(name, slot) for slot in range(first, first + self.batch[name]))

    def _sample(self, name: str, slot: int) -> ClipSample:
        clips = self.clips[name]
        epoch, position = divmod(slot, len(clips))
        source, low, high = clips[self._order(name, epoch)[position]]
        rng = self._rng(name, CLIP, slot)
        start = int(rng.integers(low, high))
        top, left = rng.random(2).tolist()
        left_right, up_down, transposed = ((rng.random(3) < 0.5) & ALLOWED[self.augment]).tolist()
        end: tuple[float, float] | None = None
        if self.dataset.sets[name][0].is_still and name != "s":
            down, right = rng.random(2).tolist()
            end = down, right
        if source in self.excluded[name]:  # the first usable clip in an order of the slot's own stands in
            rng = self._rng(name, SUBSTITUTE, slot)
            order = (clips[k] for k in rng.permutation(len(clips)))
            source, low, high = next(clip for clip in order if clip[0] not in self.excluded[name])
            start = int(rng.integers(low, high))
        return ClipSample(source, start, (top, left), (left_right, up_down, transposed), end)

    def exclude(self, name: str, step: int, faults: Mapping[Source, str]) -> None:
        """Draw from these files no more, with a warning each.

        Raises:
            UserError: more than a fifth of the set is lost; it lists the files.
        """
        for source, reason in faults.items():
            self._reasons[source] = reason
            self.excluded[name].append(source)
            log.warning("%s: %s; left out from step %d on, other clips take its place", source.path, reason, step)
        self.samples.cache_clear()
        lost, num = self.excluded[name], len(self.dataset.sets[name])
        if len(lost) > MAX_LOST * num:
            reasons = "; ".join(f"{s.path}: {self._reasons.get(s, 'lost before the resume')}" for s in lost)
            raise UserError(
                f"set {name.upper()}: expected at most {MAX_LOST:.0%} of its {num} files to break during a run, "
                f"lost {len(lost)}; restore them or start a new run: {reasons}"
            )

    def state(self) -> SavedSources:
        """Return the excluded sources as plain values; sets without any are left out."""
        root = self.dataset.root
        state: dict[str, list[dict[str, Any]]] = {}
        for name, excluded in self.excluded.items():
            for s in excluded:
                place = {"path": s.path.relative_to(root).as_posix(), "position": self.dataset.sets[name].index(s)}
                state.setdefault(name, []).append({**s.to_row(), **place})
        return state

    def load(self, state: SavedSources) -> None:
        """Take over the excluded sources of a dataset that `restore_dataset` has completed."""
        sets = self.dataset.sets
        self.excluded = {name: [sets[name][row["position"]] for row in state.get(name, [])] for name in SETS}
        self.samples.cache_clear()


def restore_dataset(dataset: Dataset, state: SavedSources) -> Dataset:
    """Return the dataset as it was before the files of `state` broke, so that clip numbers mean the same again.

    A file that broke is missing in a new index, or shorter: its old source is put back at its old position.
    """
    sets = dict(dataset.sets)
    for name, rows in state.items():
        paths = [dataset.root / row["path"] for row in rows]
        sets[name] = [source for source in sets[name] if source.path not in paths]
        for row in sorted(rows, key=lambda row: int(row["position"])):
            sets[name].insert(row["position"], Source.from_row(dataset.root / row["path"], row))
    if sets == dataset.sets:
        return dataset
    return replace(dataset, sets=sets, fingerprint=fingerprint_of(dataset.root, sets))
