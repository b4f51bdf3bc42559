"""Read frames from every kind of source in order, and scale and crop them.

A source is a video file that PyAV reads, a folder of numbered images, a raw `.npy` of uint8 (T,H,W,3), or one image.
Frames are uint8 RGB (H,W,3), upright (rotation metadata and EXIF are applied); a stream that changes size on the way
is scaled to the size of its first frame. Colours follow the file's tags, BT.601 where it has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from rlv2v.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
TEXT_FORMATS = {"tty", "bin", "xbin", "adf", "idf", "concat", "hls", "dash", "sdp", "svg_pipe"}
"""Formats that FFmpeg draws as a picture (a README.txt) or follows to other files and hosts (a playlist)."""
SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""Without the last two flags FFmpeg's colours come out 1 to 1.5 levels of 255 too dark."""
Kind = Literal["video", "frames", "raw", "image"]


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


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder in natural order, hidden files left out."""
    images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(images, key=natural_key)


def files_of(path: Path) -> list[Path]:
    """Return the files that a source is made of."""
    return images_in(path) if path.is_dir() else [path]


def read_image(path: Path) -> np.ndarray:
    """Read one image as uint8 RGB (H,W,3), upright by its EXIF tag; transparency is dropped."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected an image file, got a folder, pipe or device")
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    except (OSError, cv2.error) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    if image is None:
        raise UserError(f"{path}: cannot be read as an image; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    rgb: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


@contextmanager
def open_raw(path: Path) -> Iterator[tuple[BufferedReader, tuple[int, int, int, int]]]:
    """Open a raw clip: the file, at its first frame, and the declared (T,H,W,3). Raises `UserError`."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran:
                order = " in Fortran order" if fortran else ""
                raise UserError(f"{path}: expected uint8 (T,H,W,3), got {dtype} {shape}{order}")
            yield file, shape
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError) as error:
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


def open_video(path: Path) -> av.container.InputContainer:
    """Open with PyAV and check that there is a video in it (see `stream_of`); the caller closes it."""
    try:
        container = av.open(path.as_posix() if path.is_absolute() else f"./{path.as_posix()}")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be opened as a video: {reason}") from error
    if fault := not_a_video(container):
        container.close()
        raise UserError(f"{path}: {fault}")
    return container


def not_a_video(container: av.container.InputContainer) -> str:
    """Return why an opened file is not what a user calls a video; empty: it is one."""
    if container.format.name in TEXT_FORMATS:
        return "a text file or a playlist; expected a video"
    if not container.streams.video:
        return "no video stream; expected a file with pictures"
    stream = stream_of(container)
    if stream.disposition & Disposition.attached_pic:
        return "no video stream but a cover picture; expected a video"
    if getattr(stream, "codec_context", None) is None:
        return "PyAV does not know its codec; expected H.264, VP9 or another common one"
    return ""


def stream_of(container: av.container.InputContainer) -> av.VideoStream:
    """Return the first video stream that is not a cover picture, the first one if all are."""
    streams = container.streams.video
    return next((s for s in streams if not s.disposition & Disposition.attached_pic), streams[0])


class Upright:
    """Convert decoded frames to uint8 RGB (H,W,3), turned by their display matrix, all of one size.

    size: (width, height) of the upright frames, scaled to in the same pass (area average where that shrinks, bilinear
    where it grows); None: the size of the first frame. It caches tables from frame to frame: use one for each stream.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._size, self._reformatter = size, VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        if self._size is None:
            self._size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        width, height = self._size[::-1] if turns % 2 else self._size
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def decode(path: Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Yield all frames of a video file in display order; the first damaged one raises a `UserError` naming it."""
    count, upright = 0, Upright(size)
    with open_video(path) as container:
        try:
            for frame in container.decode(stream_of(container)):
                if frame.is_corrupt:
                    raise UserError(f"{path}: frame {count} is damaged")
                yield upright(frame)
                count += 1
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be decoded after frame {count}: {reason}") from error


def stored_frames(path: Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Yield all frames of a raw clip, a folder of images or one image, scaled to `size` or to the size of the first."""
    files = files_of(path)
    if not files:
        raise UserError(f"{path}: a folder without images; expected numbered frames")
    for frame in raw_frames(path) if kind_of(path) == "raw" else map(read_image, files):
        size = size or (frame.shape[1], frame.shape[0])
        yield frame if frame.shape[1::-1] == size else resize(frame, *size)


def raw_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a raw clip; a `UserError` follows the last complete one of a file that is cut short."""
    (num, *_), complete = raw_shape(path)
    for k in range(complete):
        yield from read_raw(path, k, 1)
    if complete < num:
        raise UserError(f"{path}: the file ends after {complete} of {num} frames")


def read_frames(
    path: Path, *, start: int = 0, num: int | None = None, size: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Yield frames `start .. start+num` (`num=None`: to the end) of any source, uint8 RGB (H,W,3).

    size: (width, height) to scale to; None: those of the first frame. Sequential: everything before `start` is decoded
    (`rlv2v.data.readers` seeks). There are fewer frames than asked for where the source ends. Raises `UserError` naming
    the file when it cannot be opened or decoded.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    frames = decode(path, size) if kind_of(path) == "video" else stored_frames(path, size)
    yield from islice(frames, start, None if num is None else start + num)


@dataclass(frozen=True)
class Probe:
    """Hold what a source declares before it is decoded; `num_frames` is None where the container does not say."""

    kind: Kind
    codec: str
    width: int
    """Width of the upright frame, pixels."""
    height: int
    fps: Fraction
    """Frames a second; 25 where the source has no clock (folders, raw, images)."""
    num_frames: int | None
    has_audio: bool


def probe(path: Path) -> Probe:
    """Open a source, read its first frame and describe it."""
    kind = kind_of(path)
    first = next(read_frames(path, num=1), None)
    if first is None:
        raise UserError(f"{path}: no frame can be decoded")
    height, width = first.shape[:2]
    if kind != "video":
        count = raw_shape(path)[0][0] if kind == "raw" else len(images_in(path)) if kind == "frames" else 1
        suffix = images_in(path)[0].suffix if kind == "frames" else path.suffix
        return Probe(kind, suffix.lstrip(".").lower(), width, height, Fraction(25), count, has_audio=False)
    with open_video(path) as container:
        stream = stream_of(container)
        fps = stream.average_rate or stream.guessed_rate or Fraction(25)
        name = stream.codec_context.codec.canonical_name
        return Probe(kind, name, width, height, Fraction(fps), stream.frames or None, bool(container.streams.audio))


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale (H,W,3) to exactly `width` x `height`: area average when it shrinks, bilinear when it grows."""
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, (width, height), interpolation=method)
    return scaled


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return (width, height) scaled so that the short side is `size`; the aspect stays."""
    short = min(width, height)
    return max(size, round(width * size / short)), max(size, round(height * size / short))


def fit(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize (T,H,W,3) so that the short side is `size`."""
    height, width = frames.shape[1:3]
    if min(height, width) == size:
        return np.ascontiguousarray(frames)
    target = fit_size(width, height, size)
    return np.stack([resize(frame, *target) for frame in frames])


def centre_crop(frames: np.ndarray, size: int) -> np.ndarray:
    """Return the middle `size` x `size` of (T,H,W,3)."""
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])
