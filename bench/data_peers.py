"""The ways to read 16 frames at a random start, for bench/data.py, where each runs in a process of its own on one core.

Every peer is used in its fastest documented form on one thread, with its files kept open from clip to clip. The frames
show which they are: 16 squares of 8x8 pixels at 64x64 are the bits of `file * 1024 + frame`.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from rlv2v.crop_size import CropSize
from rlv2v.data.index import Dataset, index_folder
from rlv2v.data.loader import ClipReader, Loader
from rlv2v.data.sampler import ClipSample

Array = np.ndarray[Any, Any]
FRAMES, SIZE, BITS = 16, 64, 16
DARK, BRIGHT = 40, 215
Place = tuple[int, int]
"""File and first frame of a clip."""
Read = Callable[[list[Place]], Iterable[tuple[int, int, Array]]]
"""Yield file, start and frames, uint8 RGB (16,64,64,3), of each draw; the loader takes draws of its own."""


def stamp(frame: Array, file: int, index: int) -> Array:
    """Return a copy of uint8 (S,S,3) whose top quarter shows `file` and `index` in two rows of eight squares."""
    bits = np.array([(file * 1024 + index) >> k & 1 for k in range(BITS)], np.uint8).reshape(2, 8)
    side = frame.shape[0] // 8
    stamped = frame.copy()
    stamped[: 2 * side] = (DARK + (BRIGHT - DARK) * bits).repeat(side, 0).repeat(side, 1)[..., None]
    return stamped


def read_stamps(clip: Array) -> Array:
    """Return `file * 1024 + frame`, int (T,), of uint8 (T,64,64,3), from the middle of each square."""
    squares = clip[:, :16].astype(np.float32).mean(-1).reshape(-1, 2, 8, 8, 8)[:, :, 2:6, :, 2:6].mean((2, 4))
    codes: Array = (squares.reshape(-1, BITS) > (DARK + BRIGHT) / 2) @ (1 << np.arange(BITS))
    return codes


def num_wrong(read: Read, draws: list[Place]) -> int:
    """Return how many frames are not those asked for."""
    count = 0
    for file, start, clip in read(draws):
        asked = file * 1024 + start + np.arange(FRAMES)
        right = clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8
        count += int((read_stamps(clip) != asked).sum()) if right else FRAMES
    return count


def shrink(frames: Iterable[Array]) -> Array:
    """Resize by area average to 64x64, for the libraries that do not resize."""
    return np.stack([cv2.resize(f, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for f in frames])


def sources_of(files: Sequence[str]) -> list[Any]:
    """Return the files as the index sees them."""
    sources = [s for s in index_folder(Path(files[0]).parent, frames=FRAMES) if s.status == "ok"]
    if [str(s.path) for s in sources] != list(files):
        raise RuntimeError(f"index: expected {files}, got {[str(s.path) for s in sources]}")
    return sources


def ours(files: Sequence[str]) -> Read:
    """Do what a thread of the loader does for one draw, cache off."""
    sources, reader = sources_of(files), ClipReader(CropSize(SIZE, SIZE), cache_bytes=0)

    def read(draws: list[Place]) -> Iterator[tuple[int, int, Array]]:
        for file, start in draws:
            yield file, start, reader.clip(ClipSample(sources[file], start, (0.5, 0.5), (False, False, False)), FRAMES)

    return read


def ours_end_to_end(files: Sequence[str]) -> Read:
    """Call `next(loader)`: one background thread, one clip a batch, and the loader's own draws."""
    sources = sources_of(files)
    dataset = Dataset(Path(files[0]).parent, {"x": sources, "y": [], "z": [], "s": []}, [], "")
    loader = Loader(dataset, batch={"x": 1}, frames=FRAMES, size=SIZE, seed=0, augment="none", cache_mib=0)

    def read(draws: list[Place]) -> Iterator[tuple[int, int, Array]]:
        for _ in draws:
            (sample,) = loader.sampler.samples("x", loader.step)
            clip = next(loader).x
            assert clip is not None
            yield sources.index(sample.source), sample.start, clip[0].numpy()

    return read


def peer(open_file: Callable[[str], Any], read_clip: Callable[[Any, int], Array]) -> Callable[[Sequence[str]], Read]:
    """Return the way to read that opens each file once, by what opens one and what reads the frames from a start."""

    def way(files: Sequence[str]) -> Read:
        reader = cache(open_file)
        return lambda draws: ((file, start, read_clip(reader(files[file]), start)) for file, start in draws)

    return way


def open_pyav(path: str) -> Any:
    """Return what PyAV needs to read a file: one reformatter scales and converts the wanted frames alone."""
    container = av.open(path)
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    scale = Fraction(stream.average_rate or 0) * Fraction(stream.time_base or 0)
    return container, stream, scale, av.video.reformatter.VideoReformatter()


def read_pyav(opened: Any, start: int) -> Array:
    """Seek to the last key frame and decode on."""
    container, stream, scale, reformatter = opened
    container.seek(round(start / scale), stream=stream)
    frames: list[Array] = []
    for frame in container.decode(stream):
        if round(frame.pts * scale) >= start:
            frames.append(reformatter.reformat(frame, SIZE, SIZE, "rgb24", interpolation="AREA").to_ndarray())
            if len(frames) == FRAMES:
                break
    return np.stack(frames)


def read_opencv(capture: Any, start: int) -> Array:
    """Set the position of a `VideoCapture` by frame number."""
    capture.set(cv2.CAP_PROP_POS_FRAMES, start)
    return shrink(capture.read()[1] for _ in range(FRAMES))[..., ::-1]


def open_torchcodec(path: str) -> Any:
    """Return a `VideoDecoder`; its own `Resize` is slower than OpenCV's (6.8 against 5.9 ms a clip)."""
    decoders = importlib.import_module("torchcodec.decoders")
    return decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)


WAYS: dict[str, Callable[[Sequence[str]], Read]] = {
    "rlv2v": ours,
    "Loader": ours_end_to_end,
    "PyAV": peer(open_pyav, read_pyav),
    "OpenCV": peer(lambda path: cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), read_opencv),
    "decord": peer(
        lambda path: importlib.import_module("decord").VideoReader(path, num_threads=1, width=SIZE, height=SIZE),
        lambda reader, start: reader.get_batch(range(start, start + FRAMES)).asnumpy(),
    ),
    "torchcodec": peer(
        open_torchcodec,
        lambda decoder, start: shrink(decoder.get_frames_in_range(start, start + FRAMES).data.numpy()),
    ),
}
PEERS = tuple(WAYS)[2:]
MODULES = {"rlv2v": "rlv2v", "Loader": "rlv2v", "PyAV": "av", "OpenCV": "cv2"}
"""What must import, where it is not the name."""

_reads: dict[str, Read] = {}  # of a process that runs a way: that of the files that were opened last


def load(name: str) -> None:
    """Pin this process to one core and import a way's library."""
    cv2.setNumThreads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    importlib.import_module(MODULES.get(name, name))


def open_files(name: str, files: Sequence[str], draws: list[Place]) -> int:
    """Get ready for the files of a case; return how many frames of the draws are wrong."""
    _reads[name] = WAYS[name](files)
    return num_wrong(_reads[name], draws)


def time_clips(name: str, draws: list[Place]) -> float:
    """Return the seconds to read all draws."""
    start = time.perf_counter()
    for _ in _reads[name](draws):
        pass
    return time.perf_counter() - start


def plain_names(folder: Path) -> str:
    """Return a library search path with PyAV's FFmpeg under the names that torchcodec looks for."""
    bundled = Path(av.__file__).parents[1] / "av.libs"
    for library in bundled.glob("lib[as][vw]*.so.*"):
        match = re.fullmatch(r"(lib\w+)-[0-9a-f]+(\.so\.\d+)\..*", library.name)
        if match and not (folder / "".join(match.groups())).exists():
            (folder / "".join(match.groups())).symlink_to(library)
    return f"{folder}:{bundled}"
