"""Which clip, frames, crop and flips make up each batch: drawn by address, never by a running generator.

Slot j of a set is clip `j mod n` of epoch `j div n`, in that epoch's random order. Step k of W ranks with batch B takes
slots `k*W*B ...`, rank r the r-th B of them: an epoch shows every clip once over all ranks, and one rank with batch 2B
draws what two ranks with B do. Order, start, crop and flips come from (seed, set, purpose, epoch or slot). A source of
N frames is `N div T` clips, each with a random start in its share of it. Where the clip of a slot lies in a file that
broke during the run (the denylist), another clip of the set takes the slot, by an address of its own; crop and flips
stay. So the draws of a step are a function of the step and of the denylist alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlv2v.data.index import Dataset, Source, fingerprint_of
from rlv2v.data.video import fit_size
from rlv2v.errors import UserError, one_line

Augment = Literal["none", "flip", "dihedral"]
ALLOWED = {"none": (False, False, False), "flip": (True, False, False), "dihedral": (True, True, True)}
"""Which of the flips of a `Draw` an augmentation may use."""
SETS = ("x", "y", "z", "s")
ORDER, CLIP, SUBSTITUTE = 0, 1, 2
"""Purposes of a draw, part of its address."""
MAX_LOST = 0.2
"""Share of a set's files that may break before the run stops."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One clip of a batch: frames `start .. start+T` of `source`, a crop, and one flip for all of its frames."""

    source: Source
    start: int
    crop: tuple[float, float]
    """Top and left as a share of the room that there is, in [0, 1)."""
    flips: tuple[bool, bool, bool]
    """Left-right, up-down, transposed."""

    def corner(self, size: int) -> tuple[int, int]:
        """Top and left of the crop, pixels of the frame whose short side was scaled to `size`."""
        width, height = fit_size(self.source.width, self.source.height, size)
        return int(self.crop[0] * (height - size + 1)), int(self.crop[1] * (width - size + 1))


class Unreadable(Exception):
    """Files of one batch that can no longer be read, each with the reason."""

    def __init__(self, faults: Mapping[Source, str]) -> None:
        super().__init__("; ".join(f"{one_line(source.path)}: {reason}" for source, reason in faults.items()))
        self.faults = dict(faults)


class Draws:
    """The draws of every step of one rank, and the denylist. Arguments as for `Loader`, checked there."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: Mapping[str, int],
        frames: int,
        seed: int,
        rank: int,
        world_size: int,
        augment: Augment,
    ) -> None:
        self.dataset, self.frames, self.seed, self.augment = dataset, frames, seed, augment
        self.rank, self.world_size = rank, world_size
        self.batch = {name: batch.get(name, 0) if dataset.sets[name] else 0 for name in SETS}
        self.clips = {name: list(self._clips(name)) for name in SETS}
        self.denied: dict[str, list[Source]] = {name: [] for name in SETS}
        self._reasons: dict[Source, str] = {}
        self._order = lru_cache(maxsize=2 * len(SETS))(self._shuffle)
        self._at = lru_cache(maxsize=4 * len(SETS))(self.compute)

    def length(self, name: str) -> int:
        """Frames of a clip of set `name`."""
        return 1 if name == "s" else self.frames

    def _clips(self, name: str) -> Iterator[tuple[Source, int, int]]:
        """(source, k, K): share k of K of each source of a set."""
        length = self.length(name)
        for source in self.dataset.sets[name]:
            if source.num_frames < length:
                raise UserError(f"{source.path}: {source.num_frames} frames, shorter than the clip length {length}")
            num = source.num_frames // length
            yield from ((source, k, num) for k in range(num))

    def _rng(self, name: str, purpose: int, address: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, SETS.index(name), purpose, address]))
        )

    def _shuffle(self, name: str, epoch: int) -> np.ndarray:
        return self._rng(name, ORDER, epoch).permutation(len(self.clips[name]))

    def at(self, name: str, step: int) -> tuple[Draw, ...]:
        """What this rank's batch of set `name` at `step` is made of."""
        return self._at(name, step)

    def compute(self, name: str, step: int) -> tuple[Draw, ...]:
        """The same, not remembered: for a thread beside the one that may `deny`, which must leave nothing stale."""
        first = (step * self.world_size + self.rank) * self.batch[name]
        return tuple(self._draw(name, slot) for slot in range(first, first + self.batch[name]))

    def _start(self, clip: tuple[Source, int, int], name: str, rng: np.random.Generator) -> int:
        """A start uniform in share k of K of the starts that the source has."""
        source, k, num = clip
        starts = source.num_frames - self.length(name) + 1
        return int(rng.integers(k * starts // num, (k + 1) * starts // num))

    def _draw(self, name: str, slot: int) -> Draw:
        epoch, position = divmod(slot, len(self.clips[name]))
        clip = self.clips[name][self._order(name, epoch)[position]]
        rng = self._rng(name, CLIP, slot)
        start = self._start(clip, name, rng)
        top, left = rng.random(2)
        coins = rng.random(3) < 0.5
        flips = tuple(bool(coin and may) for coin, may in zip(coins, ALLOWED[self.augment], strict=True))
        if clip[0] in self.denied[name]:
            clip, start = self._substitute(name, slot)
        return Draw(clip[0], start, (float(top), float(left)), (flips[0], flips[1], flips[2]))

    def _substitute(self, name: str, slot: int) -> tuple[tuple[Source, int, int], int]:
        """The clip that stands in at `slot`: the first that is not denied in an order of the slot's own."""
        rng = self._rng(name, SUBSTITUTE, slot)
        order = (self.clips[name][k] for k in rng.permutation(len(self.clips[name])))
        clip = next(clip for clip in order if clip[0] not in self.denied[name])
        return clip, self._start(clip, name, rng)

    def deny(self, name: str, step: int, faults: Mapping[Source, str]) -> None:
        """Draw from these files no more, with a warning each. `UserError` lists all lost ones if they are too many."""
        for source, reason in faults.items():
            self._reasons[source] = reason
            self.denied[name].append(source)
            log.warning(
                "%s: %s; left out from step %d on, other clips take its place", one_line(source.path), reason, step
            )
        self._at.cache_clear()
        lost, num = self.denied[name], len(self.dataset.sets[name])
        if len(lost) > MAX_LOST * num:
            why = "; ".join(f"{one_line(s.path)}: {self._reasons.get(s, 'lost before the resume')}" for s in lost)
            raise UserError(
                f"set {name.upper()}: expected at most {MAX_LOST:.0%} of its {num} files to break during a run, "
                f"lost {len(lost)}; restore them or start a new run: {why}"
            )

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """The denylist as plain values: per set the entries of the index and their positions in it."""
        return {
            name: [
                {**asdict(s), "path": s.path.relative_to(self.dataset.root).as_posix(), "position": sources.index(s)}
                for s in self.denied[name]
            ]
            for name, sources in self.dataset.sets.items()
            if self.denied[name]
        }

    def load(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Take over the denylist of a dataset that `restored` has completed."""
        self.denied = {name: [entry_source(self.dataset.root, e) for e in state.get(name, [])] for name in SETS}
        self._at.cache_clear()


def entry_source(root: Path, entry: Mapping[str, Any]) -> Source:
    """The source that an entry of `Draws.state` stands for."""
    values = {key: value for key, value in entry.items() if key != "position"}
    return Source(**{**values, "path": root / entry["path"]})


def restored(dataset: Dataset, state: Mapping[str, list[dict[str, Any]]]) -> Dataset:
    """The dataset as it was before the files on a saved denylist broke, so that clip numbers mean the same again.

    A file that broke is missing in a new index, or shorter: its old entry is put back, at its old position.
    """
    sets = dict(dataset.sets)
    for name, entries in state.items():
        lost = {entry["position"]: entry_source(dataset.root, entry) for entry in entries}
        paths = {source.path for source in lost.values()}
        kept = [source for source in sets[name] if source.path not in paths]
        for position, source in sorted(lost.items()):
            kept.insert(position, source)
        sets[name] = kept
    if sets == dataset.sets:
        return dataset
    return replace(dataset, sets=sets, fingerprint=fingerprint_of(dataset.root, sets))
