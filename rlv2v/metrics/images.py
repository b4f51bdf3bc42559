"""The images that clips are compared with: those of the target domain, and those of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlv2v.crop_size import CropSize
from rlv2v.data.decoding import deinterlaced, open_video, pictures
from rlv2v.data.index import Source, index_folder
from rlv2v.data.readers import FrameReader
from rlv2v.data.scaling import centre_crop, cover_size, fit_size, resize
from rlv2v.data.upright import Upright
from rlv2v.errors import UserError
from rlv2v.metrics.base import FVD_FRAMES, METRICS, Frame, Kind, Scene, Values

MAX_PLACES = 64  # of all images, evenly over them
SEEK_FRAMES = 64  # that are decoded to reach one in the middle of a video, about
THUMBNAIL = (256, 144)  # pixels, width and height


class References:
    """Hold videos and stills of the target domain and of training, of which up to 64 frames are read and measured.

    Args:
        sources: usable sources, each with the sets that it belongs to; the frames are spaced evenly over all of them.
        networks: by metric, see `rlv2v.metrics.learned`; with `fvd` each frame is the last of a run of 16.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, frozenset[Kind]]],
        networks: Mapping[str, Any] | None = None,
    ) -> None:
        self.sources, self.networks = list(sources), networks or {}
        self.kinds: set[Kind] = set().union(*(kinds for _, kinds in self.sources))
        self.run = FVD_FRAMES if "fvd" in self.networks else 1
        lengths = [source.num_frames for source, _ in self.sources]
        every = [(n, k) for n, length in enumerate(lengths) for k in range(min(self.run, length) - 1, length)]
        picked = np.linspace(0, len(every) - 1, min(MAX_PLACES, len(every))).round().astype(int)
        self.places = [every[k] for k in picked]
        self._measured: dict[int | CropSize, dict[Kind, list[tuple[int, dict[str, np.ndarray]]]]] = {}
        self._thumbnails: list[np.ndarray] = []

    @classmethod
    def open(
        cls,
        folders: Mapping[Path, frozenset[Kind]],
        networks: Mapping[str, Any] | None = None,
    ) -> References:
        """Return the usable sources of those folders that exist, each of the given kinds."""
        sources = []
        for folder, kinds in folders.items():
            found = index_folder(folder, frames=1, stills=folder.name.endswith("S")) if folder.is_dir() else []
            sources += [(source, kinds) for source in found if source.status != "excluded"]
        return cls(sources, networks)

    def clips(self, size: int | CropSize) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the source, the clip that ends with a picked frame), uint8 (1 or 16,H,W,3), scaled.

        size: a short side, of whole frames; or the size of crops, which are their middle, as training sees them.
        """
        reader = FrameReader()
        for number, (source, _) in enumerate(self.sources):
            ends = [end for n, end in self.places if n == number]
            sides = source.width, source.height
            scaled = cover_size(*sides, size) if isinstance(size, CropSize) else fit_size(*sides, size)
            if self.run == 1 and source.kind == "video" and len(ends) * SEEK_FRAMES > source.num_frames:
                for frame in decode_only(source.path, ends, scaled):  # less work than to seek
                    yield number, frame[None]
            else:
                for end in ends:
                    first = max(0, end - self.run + 1)
                    yield number, reader.read(source, first, end - first + 1, scaled)

    def measure(self, size: int | CropSize) -> dict[Kind, list[tuple[int, dict[str, np.ndarray]]]]:
        """Return of each kind what its metrics measure of frames at a size, see `clips`, with the source's number."""
        if size not in self._measured:
            measured: dict[Kind, list[tuple[int, dict[str, np.ndarray]]]] = {kind: [] for kind in self.kinds}
            thumbnails = []
            for index, (number, frames) in enumerate(self.clips(size)):
                clip = centre_crop(frames, size) if isinstance(size, CropSize) else frames
                last = index if self.run == 1 else (index + 1) * FVD_FRAMES - 1  # of a run
                frame = Frame(clip[-1], Scene(clip[-1]), last, recent=tuple(clip), networks=self.networks)
                for kind in self.sources[number][1]:
                    known = {kind, *self.networks}
                    metrics = [m for m in METRICS.values() if m.reference == kind and m.needs <= known]
                    values = {m.name: np.asarray(v) for m in metrics if (v := m.measure(frame)) is not None}
                    measured[kind].append((number, values))
                    if kind == "target":
                        thumbnails.append(resize(frame.small, *THUMBNAIL))
            self._measured[size], self._thumbnails = measured, thumbnails
        return self._measured[size]

    def values(self, size: int | CropSize) -> dict[Kind, Values]:
        """Return of each kind what its metrics measure of the frames of a size, {kind: {name: (N,...)}}."""
        return {kind: stacked([values for _, values in frames]) for kind, frames in self.measure(size).items()}

    def halves(self, short: int) -> tuple[Values, Values]:
        """Return the target's values in two parts: of every other source, or, of a single one, every other frame."""
        frames = self.measure(short)["target"]
        order = {number: rank for rank, number in enumerate(sorted({number for number, _ in frames}))}
        parts: tuple[list[dict[str, np.ndarray]], ...] = ([], [])
        for index, (number, values) in enumerate(frames):
            parts[(order[number] if len(order) > 1 else index) % 2].append(values)
        return stacked(parts[0]), stacked(parts[1])

    def mean_image(self, width: int, height: int) -> np.ndarray | None:
        """Return the mean of the target's frames, uint8 (H,W,3), which is smooth; None where there is none."""
        if "target" not in self.kinds:
            return None
        self.measure(min(width, height))
        return resize(np.rint(np.mean(self._thumbnails, axis=0)).astype(np.uint8), width, height)


def stacked(frames: Sequence[Mapping[str, np.ndarray]]) -> Values:
    """Return the values of frames by metric, those without one left out."""
    return {
        name: np.asarray([f[name] for f in frames if name in f]) for name in dict.fromkeys(n for f in frames for n in f)
    }


def decode_only(path: Path, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield those frames of a video, by number in ascending order; the others are decoded and not converted."""
    upright, wanted = Upright(size, path=path), set(numbers)
    with open_video(path) as container:
        try:
            for number, frame in enumerate(deinterlaced(pictures(path, container), "auto")):
                if number in wanted:
                    yield upright(frame)
                if number >= numbers[-1]:
                    return
        except UserError:
            return  # the index counts frames that can be decoded; a file that has changed gives fewer
