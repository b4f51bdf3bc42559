"""Convert one source to one prepared clip: decode it again, resize, time evenly, write under a hidden name, rename.

Stores. `raw`: a `.npy`, uint8 (T,H,W,3), just covering `size`. `video`: VP9 in MP4, yuv420p, BT.601 limited range and
tagged so, constant rate, key frames at most 12 apart, covering at least 128x128 as well, and both sides even: what
DALI's CPU decoder and NVDEC (VP9: at least 128x128) read. Style images become PNG, covering `size`. The aspect stays.

Time. Output frame k is the source frame nearest to t = k / F, the earlier one of two, for k < duration * F. F is `fps`,
else the source's rate by `rlv2v.data.clock`: where its frames keep to an even grid, each of them is then used once.
Folders of frames and `.npy` have no clock: every frame is used once, and `fps` (else 25) is only noted.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np

from rlv2v.crop_size import CropSize
from rlv2v.data import video
from rlv2v.data.clock import without_leaps
from rlv2v.data.decoding import open_video, pictures, stream_of
from rlv2v.data.demux import packet_times
from rlv2v.data.images import read_image, write_image
from rlv2v.data.index import examine
from rlv2v.data.inspect import Source, excluded_source
from rlv2v.data.scaling import cover_size
from rlv2v.data.writer import VideoWriter
from rlv2v.errors import UserError, one_line
from rlv2v.files import atomic_file

VERSION = 1
"""Part of every output's hash: a change of what is written takes a new name."""
MIN_VIDEO_SIDE = 128
VIDEO_BYTES_PER_PIXEL = 0.15
"""A generous estimate for prepared VP9: a street at 128 px takes 0.06, an animated film with grain 0.12."""
MAX_FPS = 1000
MAX_NAME_BYTES = 120
Store = Literal["raw", "video"]
CHANGED = "the file changed while in use; start again"


@dataclass(frozen=True)
class Item:
    """Hold one source, the length and rate of its output, the set that it goes into, and the output's name."""

    source: Source
    frames: int = 0
    """Frames of the output."""
    fps: float = 0.0
    """Rate of the output; 25 where neither the source nor `--fps` says."""
    set: str = ""
    output: str = ""
    """Relative to OUT; empty if excluded."""

    @property
    def usable(self) -> bool:
        """Return whether an output is planned for it."""
        return self.source.status != "excluded"

    def exclude(self, reason: str) -> Item:
        """Return the item as excluded for `reason`."""
        return replace(self, source=replace(self.source, status="excluded", reason=one_line(reason)))


@dataclass(frozen=True)
class Format:
    """Hold the settings that shape every output of one command."""

    size: CropSize
    """What each output just covers."""
    store: Store
    fps: float | None
    """Frames a second; None: the rate of each source."""

    def target_size(self, source: Source) -> tuple[int, int]:
        """Return (width, height) of the output."""
        if self.store == "raw" or source.kind == "image":
            return cover_size(source.width, source.height, self.size)
        size = CropSize(*(max(side, MIN_VIDEO_SIDE) for side in (self.size.height, self.size.width)))
        width, height = cover_size(source.width, source.height, size)
        return width + width % 2, height + height % 2

    def estimate_bytes(self, item: Item) -> int:
        """Estimate the output's size: exact for `raw`, generous for most `video` and for images."""
        width, height = self.target_size(item.source)
        per_pixel = 3.0 if self.store == "raw" or item.source.kind == "image" else VIDEO_BYTES_PER_PIXEL
        return 4096 + int(width * height * item.frames * per_pixel)

    def output_name(self, path: Path, source: Source, sha256: str) -> str:
        """Return the output's file name: the source's name made safe, ten digits of a hash, and a suffix.

        The hash covers `sha256`, which identifies the source's bytes, and all settings. Letters and digits of every
        script stay, everything else becomes `_`, and the name is cut at 120 bytes.
        """
        stem = re.sub(r"[^\w.-]+", "_", path.name if path.is_dir() else path.stem).strip("._-")
        stem = stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "clip"
        settings = json.dumps([VERSION, sha256, self.size.plain, self.store, self.fps])
        suffix = ".png" if source.kind == "image" else {"raw": ".npy", "video": ".mp4"}[self.store]
        return f"{stem}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}{suffix}"

    def is_complete(self, path: Path, item: Item) -> bool:
        """Return whether an output has the frames and the size that it should have; its pixels are not read."""
        width, height = self.target_size(item.source)
        try:
            if item.source.kind == "image":
                return read_image(path).shape == (height, width, 3)
            if self.store == "raw":
                return video.raw_shape(path) == ((item.frames, height, width, 3), item.frames)
            with open_video(path) as container:
                stream = stream_of(container)
                return (stream.frames, stream.width, stream.height) == (item.frames, width, height)
        except UserError:
            return False


def survey_source(path: Path, fps: float | None) -> tuple[Item, list[int]]:
    """Decode a source to its end, hash it and time it; return that and its `file_key`.

    A fault is not raised: `source.status` and `.reason` hold it.
    """
    key, source = examine(path, None, threading.Event())
    if source.num_frames < 1:
        return Item(excluded_source(path, source.reason)), key
    try:
        wanted, rate = time_frames(source, fps)
        return Item(source, len(wanted), float(rate)), key
    except (UserError, OSError) as error:
        return Item(excluded_source(path, str(error))), key


def frame_times(source: Source) -> np.ndarray:
    """Return the seconds from the first to each usable frame of a video, float64 (N,), ascending.

    They come from the packets where those number the frames, else from a decode (hidden frames, edit lists, damage);
    even steps of the file's rate where frames have no times or times run back.
    """
    num, known = source.num_frames, packet_times(source)
    with open_video(source.path) as container:
        stream = stream_of(container)
        stamps = [f.pts for f in islice(pictures(source.path, container), num)] if known is None else known[0]
        times = np.array([pts for pts in stamps if pts is not None], np.float64) * float(stream.time_base or 0)
    if len(times) != num or (np.diff(times) <= 0).any():
        return np.arange(num) / source.fps
    return without_leaps(times - times[0], 1 / source.fps)


def time_frames(source: Source, fps: float | None) -> tuple[np.ndarray, Fraction]:
    """Return the source frame of each output frame, int (T,), and the output's rate, by the rule of this module."""
    num = source.num_frames
    if source.kind != "video":
        return np.arange(num), as_rate(fps or source.fps)
    times = frame_times(source)
    rate = as_rate(fps or source.fps)
    output_times = np.arange(max(1, round((times[-1] + 1 / source.fps) * float(rate)))) / float(rate)
    later = np.minimum(np.searchsorted(times, output_times), num - 1)
    earlier = np.maximum(later - 1, 0)
    return np.where(output_times - times[earlier] <= times[later] - output_times + 1e-6, earlier, later), rate


def as_rate(fps: float) -> Fraction:
    """Return frames a second as a fraction that a container can hold. Raises `UserError` outside (0, 1000]."""
    rate = Fraction(fps).limit_denominator(60060)
    if not 0 < rate <= MAX_FPS:
        raise UserError(f"expected a rate of up to {MAX_FPS} frames a second, got {fps:g}; give --fps")
    return rate


def output_frames(item: Item, size: tuple[int, int], wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the output's frames; one at a time is in memory."""
    num = 0
    for index, frame in enumerate(video.read_frames(item.source.path, num=int(wanted[-1]) + 1, size=size)):
        while num < len(wanted) and wanted[num] == index:
            yield frame
            num += 1
    if num != len(wanted):
        raise UserError(f"expected {len(wanted)} frames, got {num}: {CHANGED}")


def write_output(path: Path, item: Item, output_format: Format) -> None:
    """Write the output in constant memory: frames are appended, so that a full disk is an error and not a crash."""
    wanted, rate = time_frames(item.source, output_format.fps)
    if len(wanted) != item.frames:
        raise UserError(CHANGED)
    width, height = output_format.target_size(item.source)
    frames = output_frames(item, (width, height), wanted)
    if item.source.kind == "image":
        write_image(path, next(frames))
    elif output_format.store == "video":
        with VideoWriter(path, rate, "vp9-601") as writer:
            for frame in frames:
                writer.write(frame)
    else:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(wanted), height, width, 3)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for frame in frames:
                file.write(np.ascontiguousarray(frame).data)


def convert_source(item: Item, out: Path, output_format: Format) -> int:
    """Write one output and return its bytes; it appears complete or not at all, and nothing is ever replaced.

    Raises:
        UserError: the source is at fault.
        OSError: the disk is.
    """
    target = out / item.output
    target.parent.mkdir(exist_ok=True)
    try:
        with atomic_file(target) as partial:
            write_output(partial, item, output_format)
            if not output_format.is_complete(partial, item):
                raise UserError("what was written does not read back complete")
            if target.exists():
                raise UserError(f"{target} appeared meanwhile; it was left as it is")
        return target.stat().st_size
    except av.FFmpegError as error:  # raised by the encoder; plain exceptions travel between processes
        raise UserError(f"{item.source.path}: cannot be encoded: {error}") from None
