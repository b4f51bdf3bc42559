"""One source in, one prepared clip out: read once more, resized, timed evenly, written under a hidden name, renamed.

Stores. `raw`: a `.npy`, uint8 (T,H,W,3), short side `size`. `video`: VP9 in MP4, yuv420p, BT.601 limited range and
tagged so, constant rate, key frames at most 12 apart, short side max(size, 128) and both sides even: what DALI's CPU
decoder and NVDEC (VP9: at least 128x128) read. Style images: PNG, short side `size`. The aspect is kept.

Time. Output frame k is the source frame nearest to t = k / F, the earlier one of two, for k < duration * F. F is
`fps`; without it the file's rate if all_states frame lies within half a step of that rate's grid (each frame
is then kept
once), else the average rate (N-1) / (t_last - t_first). Folders of frames and `.npy` have no clock: every frame is kept
once, and `fps` (else 25) is only noted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np

from rlv2v.data import video
from rlv2v.data.index import Source, examine
from rlv2v.data.inspect import excluded
from rlv2v.data.video import fit_size
from rlv2v.data.writer import VideoWriter, write_image
from rlv2v.errors import UserError

VERSION = 1
"""Part of every output's hash: a change of what is written takes a new name."""
PARTIAL = ".rlv2v-partial-"
MIN_VIDEO_SIDE = 128
VIDEO_BYTES_PER_PIXEL = 0.15
"""Of the prepared VP9, on the generous side: a street at 128 px takes 0.06, an animated film with grain 0.12."""
MAX_FPS = 1000
MAX_NAME_BYTES = 120
Store = Literal["raw", "video"]


@dataclass(frozen=True)
class Survey:
    """A source and what it becomes."""

    source: Source
    frames: int
    """Of the output."""
    fps: float
    """Of the output; 25 where neither the source nor `--fps` says."""


@dataclass(frozen=True)
class Job:
    """What a worker is told to write."""

    survey: Survey
    target: Path
    size: int
    store: Store
    fps: float | None


def survey(path: Path, fps: float | None) -> Survey:
    """Decode a source to its end and hash it. What is wrong with the file is said in `source.status` and `.reason`."""
    source = examine(path, None, threading.Event()).source
    blank = Survey(source, 0, 0.0)
    if source.status == "excluded":
        return blank
    try:
        if source.num_frames < 1:
            raise UserError(source.reason or "no frame can be read")
        wanted, rate = timing(source, fps)
        return Survey(source, len(wanted), float(rate))
    except (UserError, OSError) as error:
        return unusable(path, str(error))


def unusable(path: Path, reason: str) -> Survey:
    """The survey of a source that cannot be used."""
    return Survey(excluded(path, reason), 0, 0.0)


def frame_times(source: Source) -> np.ndarray:
    """Seconds from the first to each usable frame of a video, float64 (N,), ascending.

    From the packets where they number the frames, else from a decode (hidden frames, edit lists, damage); even steps
    of the file's rate where frames have no times or times run back.
    """
    num = source.num_frames
    with video.open_video(source.path) as container:
        stream = video.stream_of(container)
        base = stream.time_base
        try:
            shown = [p.pts for p in container.demux(stream) if p.size]
        except av.FFmpegError:
            shown = []
    known = [pts for pts in shown if pts is not None]
    if len(known) == len(shown) == len(set(known)) == num:
        known.sort()
    else:
        with video.open_video(source.path) as container:
            shown = [f.pts for f in islice(container.decode(video.stream_of(container)), num)]
        known = [pts for pts in shown if pts is not None]
    times = np.array(known, np.float64) * float(base or 0)
    if len(times) != num or (np.diff(times) <= 0).any():
        return np.arange(num) / source.fps
    return times - times[0]


def timing(source: Source, fps: float | None) -> tuple[np.ndarray, Fraction]:
    """Which source frame each output frame is, int (T,), and the output's rate; the rule is the module's."""
    num = source.num_frames
    if source.kind != "video":
        return np.arange(num), as_rate(fps or source.fps)
    times = frame_times(source)
    step = np.arange(num)
    even = np.abs(times * source.fps - step).max() < 0.45  # half a step, less the rounding of the container's clock
    own = source.fps if even or num == 1 else (num - 1) / times[-1]
    rate = as_rate(fps or own)
    at = np.arange(max(1, round((times[-1] + 1 / own) * float(rate)))) / float(rate)
    after = np.minimum(np.searchsorted(times, at), num - 1)
    before = np.maximum(after - 1, 0)
    return np.where(at - times[before] <= times[after] - at + 1e-6, before, after), rate


def as_rate(fps: float) -> Fraction:
    """Frames a second as a fraction that a container can hold; `UserError` outside (0, 1000]."""
    rate = Fraction(fps).limit_denominator(60060)
    if not 0 < rate <= MAX_FPS:
        raise UserError(f"expected a rate of up to {MAX_FPS} frames a second, got {fps:g}; give --fps")
    return rate


def target_size(source: Source, size: int, store: Store) -> tuple[int, int]:
    """(width, height) of the output."""
    if store == "raw" or source.kind == "image":
        return fit_size(source.width, source.height, size)
    width, height = fit_size(source.width, source.height, max(size, MIN_VIDEO_SIDE))
    return width + width % 2, height + height % 2


def estimate(found: Survey, size: int, store: Store) -> int:
    """Bytes of the output: exact for `raw`, generous for most `video` and for images."""
    width, height = target_size(found.source, size, store)
    share = 3.0 if store == "raw" or found.source.kind == "image" else VIDEO_BYTES_PER_PIXEL
    return 4096 + int(width * height * found.frames * share)


def suffix_of(source: Source, store: Store) -> str:
    return ".png" if source.kind == "image" else {"raw": ".npy", "video": ".mp4"}[store]


def safe_stem(path: Path) -> str:
    """The source's name without suffix, letters and digits of every script kept, all else a `_`, at most 120 bytes."""
    name = path.name if path.is_dir() else path.stem
    safe = re.sub(r"[^\w.-]+", "_", name).strip("._-")
    return safe.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "clip"


def short_hash(sha256: str, size: int, store: Store, fps: float | None) -> str:
    """Ten hexadecimal digits of the source's bytes and of all settings that shape the output."""
    return hashlib.sha256(json.dumps([VERSION, sha256, size, store, fps]).encode()).hexdigest()[:10]


def is_whole(path: Path, found: Survey, size: int, store: Store) -> bool:
    """Whether an output that is there has the frames and the size that it should have; its pixels are not read."""
    width, height = target_size(found.source, size, store)
    try:
        if found.source.kind == "image":
            return video.read_image(path).shape == (height, width, 3)
        if store == "raw":
            return video.raw_shape(path) == ((found.frames, height, width, 3), found.frames)
        with video.open_video(path) as container:
            stream = video.stream_of(container)
            return (stream.frames, stream.width, stream.height) == (found.frames, width, height)
    except UserError:
        return False


def frames_of(job: Job, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The output's frames, one at a time in memory."""
    source, num = job.survey.source, 0
    size = target_size(source, job.size, job.store)
    for index, frame in enumerate(video.read_frames(source.path, num=int(wanted[-1]) + 1, size=size)):
        while num < len(wanted) and wanted[num] == index:
            yield frame
            num += 1
    if num != len(wanted):
        raise UserError(f"expected {len(wanted)} frames, got {num}: the file changed while in use; start again")


def write(path: Path, job: Job) -> None:
    """Write the output in constant memory: frames are appended, so that a full disk is an error and not a crash."""
    wanted, rate = timing(job.survey.source, job.fps)
    if len(wanted) != job.survey.frames:
        raise UserError("the file changed while in use; start again")
    frames = frames_of(job, wanted)
    if job.survey.source.kind == "image":
        write_image(path, next(frames))
    elif job.store == "video":
        with VideoWriter(path, rate, "vp9") as writer:
            for frame in frames:
                writer.write(frame)
    else:
        width, height = target_size(job.survey.source, job.size, job.store)
        shape = (len(wanted), height, width, 3)
        with path.open("wb") as file:
            about = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            for frame in frames:
                file.write(np.ascontiguousarray(frame).data)


def make(job: Job) -> int:
    """Write one output and return its bytes; `job.target` appears whole or not at all, and is never replaced.

    Raises `UserError` where the source is at fault, `OSError` where the disk is.
    """
    source, target = job.survey.source, job.target
    partial = target.with_name(PARTIAL + target.name)
    try:
        write(partial, job)
        if not is_whole(partial, job.survey, job.size, job.store):
            raise UserError("what was written does not read back whole")
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            raise UserError(f"{target} appeared meanwhile; it was left as it is")
        partial.rename(target)
        return target.stat().st_size
    except av.FFmpegError as error:  # of the encoder: as plain exceptions, which travel between processes
        if isinstance(error, OSError):
            raise OSError(error.errno or errno.EIO, error.strerror, str(target)) from None
        raise UserError(f"{source.path}: cannot be encoded: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
