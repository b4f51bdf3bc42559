"""Read frames from every kind of source in order, with their times.

A source is a video file that PyAV reads, a folder of numbered images, a raw `.npy` of uint8 (T,H,W,3), or one image.
Frames are uint8 RGB (H,W,3) as a player shows them (`rlv2v.data.upright`), with square pixels; a stream that changes
size on the way is scaled to the size of its first frame.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BufferedReader
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from typing import Literal, NamedTuple

import av
import numpy as np

from rlv2v.data.clock import DECODING_CLOCK, DEFAULT_FPS, Timeline, declared_rate, measured_rate
from rlv2v.data.damage import Faults
from rlv2v.data.decoding import Deinterlace, TimedFrame, decode, open_video, pictures, stream_of
from rlv2v.data.hdr import CURVES
from rlv2v.data.images import IMAGE_SUFFIXES, read_image
from rlv2v.data.scaling import resize
from rlv2v.data.upright import pixel_aspect, turn_of
from rlv2v.errors import UserError

Kind = Literal["video", "frames", "raw", "image"]
RATE_PACKETS = 256
"""Packets whose times tell a video's rate before it is read."""


def kind_of(path: Path) -> Kind:
    """Return what `path` is read as, by its name alone: a folder is `frames`, `.npy` `raw`, else `image` or `video`."""
    if path.is_dir():
        return "frames"
    suffix = path.suffix.lower()
    return "raw" if suffix == ".npy" else "image" if suffix in IMAGE_SUFFIXES else "video"


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Return a sort key by which frame2 comes before frame10."""
    pieces = re.split(r"([0-9]+)", path.name)
    return [(0, int(piece), piece) if piece.isdigit() else (1, 0, piece) for piece in pieces if piece]


def files_of(path: Path) -> list[Path]:
    """Return the files that a source is made of: the images of a folder in natural order, hidden ones left out."""
    if not path.is_dir():
        return [path]
    images = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(images, key=natural_key)


HEADERS = threading.Lock()
"""Held while NumPy parses a header: threads that are in CPython's parser at once can get a SystemError (gh-106905)."""


@contextmanager
def open_raw(path: Path) -> Iterator[tuple[BufferedReader, tuple[int, int, int, int]]]:
    """Open a raw clip: the file, at its first frame, and the declared (T,H,W,3). Raises `UserError`."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            with HEADERS:
                shape, fortran, dtype = read[version](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran:
                order = " in Fortran order" if fortran else ""
                raise UserError(f"{path}: expected uint8 (T,H,W,3), got {dtype} {shape}{order}")
            yield file, shape
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, TokenError) as error:  # NumPy parses the header
        raise UserError(f"{path}: cannot be read as .npy: {getattr(error, 'strerror', None) or error}") from error


def raw_shape(path: Path) -> tuple[tuple[int, int, int, int], int]:
    """Return the declared (T,H,W,3) of a raw clip, and how many of its frames the file holds completely."""
    with open_raw(path) as (file, shape):
        complete = (path.stat().st_size - file.tell()) // (shape[1] * shape[2] * 3)
    return shape, min(complete, shape[0])


def read_raw(path: Path, start: int, num: int) -> np.ndarray:
    """Read frames `start .. start+num` of a raw clip, fewer where it ends.

    The file is not mapped: a mapped file that is cut short while in use ends the process.
    """
    with open_raw(path) as (file, shape):
        frames = np.empty((max(0, min(num, shape[0] - start)), *shape[1:]), np.uint8)
        file.seek(start * frames[:1].nbytes, 1)
        num_bytes = file.readinto(frames.data) if frames.size else 0
    return frames[: num_bytes // (shape[1] * shape[2] * 3)]


def stored_frames(path: Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Yield all frames of a raw clip, a folder of images or one image, scaled to `size` or to the size of the first.

    A `UserError` follows the last complete frame of a raw clip that is cut short.
    """
    if kind_of(path) == "raw":
        (num, *_), complete = raw_shape(path)
        frames: Iterator[np.ndarray] = (frame for k in range(complete) for frame in read_raw(path, k, 1))
    else:
        files = files_of(path)
        num = complete = len(files)
        frames = map(read_image, files)
        if not files:
            raise UserError(f"{path}: a folder without images; expected numbered frames")
    for frame in frames:
        size = size or (frame.shape[1], frame.shape[0])
        yield resize(frame, *size)
    if complete < num:
        raise UserError(f"{path}: the file ends after {complete} of {num} frames")


def timed_frames(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    fps: Fraction = DEFAULT_FPS,
    deinterlace: Deinterlace = "auto",
    faults: Faults | None = None,
) -> Iterator[TimedFrame]:
    """Yield all frames of any source with their times; see `decode` for a video's arguments.

    fps: frames a second of what has no clock: a folder, a raw clip, one image.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if kind_of(path) == "video":
        yield from decode(path, size, deinterlace=deinterlace, faults=faults)
        return
    for number, frame in enumerate(stored_frames(path, size)):
        yield TimedFrame(frame, number / fps, 1 / fps)


def read_frames(
    path: Path, *, start: int = 0, num: int | None = None, size: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Yield frames `start .. start+num` (`num=None`: to the end) of any source, uint8 RGB (H,W,3).

    size: (width, height) to scale to; None: those of the first frame. Sequential: everything before `start` is decoded
    (`rlv2v.data.readers` seeks). There are fewer frames than asked for where the source ends. Raises `UserError` naming
    the file when it cannot be opened or decoded.
    """
    stop = None if num is None else start + num
    for frame in islice(timed_frames(path, size=size), start, stop):
        yield frame.rgb


def resampled(frames: Iterator[TimedFrame], fps: Fraction) -> Iterator[TimedFrame]:
    """Yield a frame every 1 / fps seconds to the end of the last one: the one that is shown then."""
    shown: TimedFrame | None = None
    number = 0
    for frame in frames:
        while shown is not None and number / fps < frame.time - Fraction(1, 1000):
            yield TimedFrame(shown.rgb, number / fps, 1 / fps)
            number += 1
        shown = frame
    end = shown.time + shown.duration if shown else Fraction(0)
    while shown is not None and (number == 0 or number / fps < end - Fraction(1, 1000)):
        yield TimedFrame(shown.rgb, number / fps, 1 / fps)
        number += 1


class Probe(NamedTuple):
    """Hold what a source declares, and what its first frame and packets show."""

    codec: str
    width: int
    """Width of the upright frame in its own pixels."""
    height: int
    fps: Fraction
    """Frames a second, see `rlv2v.data.clock`; 25 where the source has no clock (folders, raw, images)."""
    num_frames: int | None
    """None where the container does not say."""
    has_audio: bool = False
    pixel_aspect: Fraction = Fraction(1)
    """How many times as wide as high the upright frame's pixels are."""
    tick: Fraction | None = None
    """Seconds of which the source's times are multiples; None where it has no clock."""
    hdr: str = ""
    """PQ or HLG if the pictures are HDR, which is tone-mapped."""
    start: Fraction = Fraction(0)
    """Time of the first frame on the file's own clock, seconds."""


def probe(path: Path) -> Probe:
    """Open a source, read its first frame and describe it."""
    kind = kind_of(path)
    if kind == "video":
        return probe_video(path)
    first = next(read_frames(path, num=1), None)
    if first is None:
        raise UserError(f"{path}: no frame can be decoded")
    height, width = first.shape[:2]
    files = files_of(path)
    count = raw_shape(path)[0][0] if kind == "raw" else len(files)
    return Probe(files[0].suffix[1:].lower(), width, height, DEFAULT_FPS, count)


def probe_video(path: Path) -> Probe:
    """Describe a video file by its header, the times of its first packets and its first good frame."""
    with open_video(path) as container:
        stream = stream_of(container)
        first = next(pictures(path, container, Faults()), None)
        if first is None:
            raise UserError(f"{path}: no frame can be decoded")
        return describe(container, first, measured_rate(first_times(path), declared_rate(stream)))


def describe(container: av.container.InputContainer, first: av.VideoFrame, fps: Fraction) -> Probe:
    """Describe an open video by its header, its first frame and its rate."""
    stream = stream_of(container)
    tick, aspect, transposed = Fraction(stream.time_base or 0), pixel_aspect(stream), turn_of(first)[0]
    start = first.dts if first.pts is None or container.format.name in DECODING_CLOCK else first.pts
    sides = (first.height, first.width) if transposed else (first.width, first.height)
    return Probe(
        stream.codec_context.codec.canonical_name,
        *sides,
        fps,
        stream.frames or None,
        bool(container.streams.audio),
        1 / aspect if transposed else aspect,
        tick,
        CURVES.get(first.color_trc, ""),
        (start or 0) * tick,
    )


def first_times(path: Path) -> list[Fraction]:
    """Return when the first frames of a video file are shown, seconds by its packets, ascending."""
    times: list[Fraction] = []
    with open_video(path) as container:
        timeline = Timeline(container, stream := stream_of(container))
        try:
            for packet in container.demux(stream):
                timeline.move(packet, timeline.part_of(packet))
                if packet.size and not packet.is_discard and packet.pts is not None:
                    times.append(packet.pts * packet.time_base)
                if len(times) == RATE_PACKETS:
                    break
        except av.FFmpegError:
            pass  # what reads the file names the fault
    # the last packets may be shown after some that are still to come
    return sorted(times)[: -16 if len(times) == RATE_PACKETS else None]
