"""Convert one source to one prepared clip: decode it again, resize, time evenly, write under a hidden name, rename.

Stores. `raw`: a `.npy`, uint8 (T,H,W,3), short side `size`. `video`: VP9 in MP4, yuv420p, BT.601 limited range and
tagged so, constant rate, key frames at most 12 apart, short side max(size, 128) and both sides even: what DALI's CPU
decoder and NVDEC (VP9: at least 128x128) read. Style images become PNG, short side `size`. The aspect stays.

Time. Output frame k is the source frame nearest to t = k / F, the earlier one of two, for k < duration * F. F is `fps`.
Without it F is the file's rate if every frame lies within half a step of that rate's grid (each frame is then used
once), else the average rate (N-1) / (t_last - t_first). Folders of frames and `.npy` have no clock: every frame is used
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
from rlv2v.data.index import examine
from rlv2v.data.inspect import Source, excluded_source
from rlv2v.data.readers import packet_times
from rlv2v.data.video import fit_size
from rlv2v.data.writer import VideoWriter, write_image
from rlv2v.errors import UserError

VERSION = 1
"""Part of every output's hash: a change of what is written takes a new name."""
PARTIAL = ".rlv2v-partial-"
"""How the names of files that are being written begin."""
MIN_VIDEO_SIDE = 128
VIDEO_BYTES_PER_PIXEL = 0.15
"""A generous estimate for prepared VP9: a street at 128 px takes 0.06, an animated film with grain 0.12."""
MAX_FPS = 1000
MAX_NAME_BYTES = 120
Store = Literal["raw", "video"]


@dataclass(frozen=True)
class Survey:
    """Hold a source and the length and rate of its output."""

    source: Source
    frames: int
    """Frames of the output."""
    fps: float
    """Rate of the output; 25 where neither the source nor `--fps` says."""


@dataclass(frozen=True)
class Format:
    """Hold the settings that shape every output of one command."""

    size: int
    """Short side, pixels."""
    store: Store
    fps: float | None
    """Frames a second; None: the rate of each source."""

    def target_size(self, source: Source) -> tuple[int, int]:
        """Return (width, height) of the output."""
        if self.store == "raw" or source.kind == "image":
            return fit_size(source.width, source.height, self.size)
        width, height = fit_size(source.width, source.height, max(self.size, MIN_VIDEO_SIDE))
        return width + width % 2, height + height % 2

    def estimate_bytes(self, survey: Survey) -> int:
        """Estimate the output's size: exact for `raw`, generous for most `video` and for images."""
        width, height = self.target_size(survey.source)
        per_pixel = 3.0 if self.store == "raw" or survey.source.kind == "image" else VIDEO_BYTES_PER_PIXEL
        return 4096 + int(width * height * survey.frames * per_pixel)

    def output_name(self, path: Path, source: Source, sha256: str) -> str:
        """Return the output's file name: the source's name made safe, ten digits of a hash, and a suffix.

        The hash covers `sha256`, which identifies the source's bytes, and all settings. Letters and digits of every
        script stay, everything else becomes `_`, and the name is cut at 120 bytes.
        """
        stem = re.sub(r"[^\w.-]+", "_", path.name if path.is_dir() else path.stem).strip("._-")
        stem = stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "clip"
        settings = json.dumps([VERSION, sha256, self.size, self.store, self.fps])
        suffix = ".png" if source.kind == "image" else {"raw": ".npy", "video": ".mp4"}[self.store]
        return f"{stem}-{hashlib.sha256(settings.encode()).hexdigest()[:10]}{suffix}"

    def is_complete(self, path: Path, survey: Survey) -> bool:
        """Return whether an output has the frames and the size that it should have; its pixels are not read."""
        width, height = self.target_size(survey.source)
        try:
            if survey.source.kind == "image":
                return video.read_image(path).shape == (height, width, 3)
            if self.store == "raw":
                return video.raw_shape(path) == ((survey.frames, height, width, 3), survey.frames)
            with video.open_video(path) as container:
                stream = video.stream_of(container)
                return (stream.frames, stream.width, stream.height) == (survey.frames, width, height)
        except UserError:
            return False


@dataclass(frozen=True)
class Job:
    """Hold one output to write; it travels to a worker process."""

    survey: Survey
    target: Path
    format: Format


def survey_source(path: Path, fps: float | None) -> Survey:
    """Decode a source to its end, hash it and time it. A fault is not raised: `source.status` and `.reason` hold it."""
    source = examine(path, None, threading.Event()).source
    if source.status == "excluded":
        return Survey(source, 0, 0.0)
    try:
        if source.num_frames < 1:
            raise UserError(source.reason or "no frame can be read")
        wanted, rate = time_frames(source, fps)
        return Survey(source, len(wanted), float(rate))
    except (UserError, OSError) as error:
        return unusable(path, str(error))


def unusable(path: Path, reason: str) -> Survey:
    """Return the survey of a source that cannot be used."""
    return Survey(excluded_source(path, reason), 0, 0.0)


def frame_times(source: Source) -> np.ndarray:
    """Return the seconds from the first to each usable frame of a video, float64 (N,), ascending.

    They come from the packets where those number the frames, else from a decode (hidden frames, edit lists, damage);
    even steps of the file's rate where frames have no times or times run back.
    """
    num, known = source.num_frames, packet_times(source)
    with video.open_video(source.path) as container:
        stream = video.stream_of(container)
        stamps = [f.pts for f in islice(container.decode(stream), num)] if known is None else known[0]
        times = np.array([pts for pts in stamps if pts is not None], np.float64) * float(stream.time_base or 0)
    if len(times) != num or (np.diff(times) <= 0).any():
        return np.arange(num) / source.fps
    return times - times[0]


def time_frames(source: Source, fps: float | None) -> tuple[np.ndarray, Fraction]:
    """Return the source frame of each output frame, int (T,), and the output's rate, by the rule of this module."""
    num = source.num_frames
    if source.kind != "video":
        return np.arange(num), as_rate(fps or source.fps)
    times = frame_times(source)
    even = np.abs(times * source.fps - np.arange(num)).max() < 0.45  # half a step, less the rounding of the clock
    own = source.fps if even or num == 1 else (num - 1) / times[-1]
    rate = as_rate(fps or own)
    output_times = np.arange(max(1, round((times[-1] + 1 / own) * float(rate)))) / float(rate)
    later = np.minimum(np.searchsorted(times, output_times), num - 1)
    earlier = np.maximum(later - 1, 0)
    return np.where(output_times - times[earlier] <= times[later] - output_times + 1e-6, earlier, later), rate


def as_rate(fps: float) -> Fraction:
    """Return frames a second as a fraction that a container can hold. Raises `UserError` outside (0, 1000]."""
    rate = Fraction(fps).limit_denominator(60060)
    if not 0 < rate <= MAX_FPS:
        raise UserError(f"expected a rate of up to {MAX_FPS} frames a second, got {fps:g}; give --fps")
    return rate


def output_frames(job: Job, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the output's frames; one at a time is in memory."""
    source, num = job.survey.source, 0
    size = job.format.target_size(source)
    for index, frame in enumerate(video.read_frames(source.path, num=int(wanted[-1]) + 1, size=size)):
        while num < len(wanted) and wanted[num] == index:
            yield frame
            num += 1
    if num != len(wanted):
        raise UserError(f"expected {len(wanted)} frames, got {num}: the file changed while in use; start again")


def write_output(path: Path, job: Job) -> None:
    """Write the output in constant memory: frames are appended, so that a full disk is an error and not a crash."""
    wanted, rate = time_frames(job.survey.source, job.format.fps)
    if len(wanted) != job.survey.frames:
        raise UserError("the file changed while in use; start again")
    frames = output_frames(job, wanted)
    if job.survey.source.kind == "image":
        write_image(path, next(frames))
    elif job.format.store == "video":
        with VideoWriter(path, rate, "vp9") as writer:
            for frame in frames:
                writer.write(frame)
    else:
        width, height = job.format.target_size(job.survey.source)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(wanted), height, width, 3)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for frame in frames:
                file.write(np.ascontiguousarray(frame).data)


def convert_source(job: Job) -> int:
    """Write one output and return its bytes; `job.target` appears complete or not at all, and is never replaced.

    Raises:
        UserError: the source is at fault.
        OSError: the disk is.
    """
    source, target = job.survey.source, job.target
    partial = target.with_name(PARTIAL + target.name)
    try:
        write_output(partial, job)
        if not job.format.is_complete(partial, job.survey):
            raise UserError("what was written does not read back complete")
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            raise UserError(f"{target} appeared meanwhile; it was left as it is")
        partial.rename(target)
        return target.stat().st_size
    except av.FFmpegError as error:  # raised by the encoder; plain exceptions travel between processes
        if isinstance(error, OSError):
            raise OSError(error.errno or errno.EIO, error.strerror, str(target)) from None
        raise UserError(f"{source.path}: cannot be encoded: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
