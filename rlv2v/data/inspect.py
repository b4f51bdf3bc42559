"""Decode one source to its end and report how much of it is usable; faults are stored in its status, not raised.

A damaged video counts up to the frame that its decoder reports, less one, in which the damage may begin unseen: most
codecs carry no checksum, and a few wrong bits can pass for picture. A file that ends early counts up to the last frame
before which none is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorRange

from rlv2v.data import video
from rlv2v.data.video import Kind
from rlv2v.errors import UserError, one_line

ONE_PICTURE_A_PACKET = {"h264", "hevc", "vp9", "av1"}
"""Codecs of which an intact file shows each packet once, at the packet's time."""


@dataclass(frozen=True)
class Source:
    """Hold one video (or still image) of a set, as one full decode found it."""

    path: Path
    kind: Kind
    codec: str
    num_frames: int
    """Frames that decode without damage, from the first on."""
    fps: float
    width: int
    """Width of the upright frame, pixels."""
    height: int
    num_bytes: int
    dali: bool
    """Whether DALI's CPU decoder gives the same frames: VP9, upright, constant size, BT.601 limited range or RGB."""
    status: Literal["ok", "truncated", "excluded"]
    reason: str
    """Why it is truncated or excluded; empty when ok."""
    hash: str = ""
    """SHA-256 of the content, see `content_hash`; empty where it cannot be read."""
    variable: bool = False
    """Whether the time from frame to frame varies by more than a tenth."""


class Stopped(Exception):
    """Report that the index was interrupted: what is being decoded is of no use any more."""


def inspect(path: Path, stop: threading.Event) -> Source:
    """Decode a source of any kind to its end; its faults are not raised. Raises `Stopped` once `stop` is set."""
    kind, damage = video.kind_of(path), ""
    try:
        if kind == "video":
            source, damage = decode_all(path, stop)
        else:
            probe = video.probe(path)
            num, damage = count_frames(path, stop)
            size = probe.width, probe.height
            source = Source(path, kind, probe.codec, num, float(probe.fps), *size, 0, False, "ok", "")
    except (UserError, OSError) as error:
        return excluded_source(path, str(error))
    return replace(source, status="truncated" if damage else "ok", reason=short_reason(damage, path))


def excluded_source(path: Path, reason: str) -> Source:
    """Return the source of a path that cannot be used."""
    return Source(path, video.kind_of(path), "", 0, 0.0, 0, 0, 0, False, "excluded", short_reason(reason, path))


def short_reason(reason: object, path: Path) -> str:
    """Return `reason` on one line and without `path`: what stores it stays true when a folder is renamed."""
    name = one_line(path)
    return one_line(reason).removeprefix(f"{name}: ").replace(f"{name}/", "")


def count_frames(path: Path, stop: threading.Event) -> tuple[int, str]:
    """Return how many frames of a raw clip, frame folder or image can be read from the first on, and why no more."""
    if video.kind_of(path) == "raw":
        (num, *_), complete = video.raw_shape(path)
        return complete, f"the file ends after {complete} of {num} frames" if complete < num else ""
    count = 0
    try:
        for _ in video.stored_frames(path):
            if stop.is_set():
                raise Stopped
            count += 1
    except UserError as error:
        return count, f"reading stops after frame {count}: {error}"
    return count, ""


def decode_all(path: Path, stop: threading.Event) -> tuple[Source, str]:
    """Decode a video file to the end; return what is usable of it and why it ends early (empty: it does not).

    Raises:
        UserError: no frame is usable.
        Stopped: `stop` is set.
    """
    times: list[int | None] = []
    packets: list[tuple[int | None, int | None]] = []
    sizes, turned, damage, first, num_discarded = set(), False, "", None, 0
    with video.open_video(path) as container:
        stream = video.stream_of(container)
        codec = stream.codec_context.codec.canonical_name
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        pixels = stream.codec_context.pix_fmt
        try:
            for packet in container.demux(stream):
                if stop.is_set():
                    raise Stopped
                num_discarded += packet.is_discard
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.dts))
                if packet.is_corrupt:
                    raise UserError("the file is cut off or damaged there")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise UserError(f"frame {len(times)} is damaged")
                    first = first or frame
                    sizes.add((frame.width, frame.height))
                    turned |= frame.rotation != 0
                    times.append(frame.pts)
            num, damage = trusted_frames(container, path, times, packets, num_discarded)
        except (av.FFmpegError, OSError, UserError) as error:
            damage = f"decoding stops after frame {len(times)}: {getattr(error, 'strerror', None) or error}"
            num = max(len(times) - 1, 0)
        if first is None or num == 0:
            raise UserError(f"{path}: no frame can be decoded{': ' + damage if damage else ''}")
        sideways = round(first.rotation / 90) % 2 == 1
        width, height = (first.height, first.width) if sideways else (first.width, first.height)
        same_colour = pixels == "gbrp" or (pixels in ("yuv420p", "yuv444p") and is_limited_601(first))
        trimmed = stream.frames not in (0, num)  # DALI may number what an edit list hides
        dali = codec == "vp9" and same_colour and not turned and not trimmed and len(sizes) == 1
    source = Source(path, "video", codec, num, fps, width, height, 0, dali and not damage, "ok", "")
    return replace(source, variable=varies(known(times[:num]))), damage


def is_limited_601(frame: av.VideoFrame) -> bool:
    """Return whether a frame is BT.601 limited range, or untagged: what DALI assumes of every file."""
    return frame.colorspace in {2, 5, 6} and frame.color_range != ColorRange.JPEG  # AVColorSpace: untagged, BT.601


def trusted_frames(
    container: av.container.InputContainer,
    path: Path,
    times: Sequence[int | None],
    packets: Sequence[tuple[int | None, int | None]],
    num_discarded: int,
) -> tuple[int, str]:
    """Return how many frames of a video that decoded without an error can be trusted, and why no more (empty: all).

    times: of the frames as decoded.  packets: (time to show, time to decode) as read.  num_discarded: packets that an
    edit list takes out.
    """
    stream, form = video.stream_of(container), container.format.name
    num, missing = len(times), seconds_missing(container, known(times))
    if stream.codec_context.codec.canonical_name in ONE_PICTURE_A_PACKET and times and times[0] is not None:
        shown = sorted(p for p, _ in packets if p is not None and p >= times[0])
        first_difference = next(
            (i for i, pair in enumerate(zip(times, shown, strict=False)) if pair[0] != pair[1]), num
        )
        if first_difference < len(shown) == len(set(shown)):
            return max(first_difference - 1, 0), f"frame {first_difference} cannot be decoded"
    read, declared = len(packets), stream.frames
    if "mp4" in form and stream.index_entries:  # the index lacks what the edit list of a trimmed file cuts off
        read, declared = read + num_discarded, min(declared, len(stream.index_entries))
    if form == "avi" and packets and packets[-1][1] is not None:
        # AVI counts ticks: a frame may take several of them, and the last one is as long as the longest
        read = packets[-1][1] + max((int(s) for s in np.diff(known([d for _, d in packets]))), default=1)
    if read < declared:
        damage = f"the file ends after {read} of {declared} frames"
    elif missing:
        damage = f"the file ends {missing:.1f} s before the length that it declares"
    elif not has_end(form, path):
        num, damage = max(num - 1, 0), "the file is cut off"
    else:
        return num, ""
    decoded = packets[-1][1] if packets else None
    if decoded is not None:  # what is still to come would be shown later than it is decoded
        num = min(num, sum(t is None or t <= decoded for t in times))
    return num, damage


def has_end(form: str, path: Path) -> bool:
    """Return whether a GIF has its last byte and an MPEG-TS complete packets: both can be cut without an error."""
    if form == "gif":
        return path.read_bytes().rstrip(b"\0").endswith(b";")
    return form != "mpegts" or any(path.stat().st_size % packet == 0 for packet in (188, 192, 204))


def known(times: Sequence[int | None]) -> list[int]:
    """Return the times without those that the file does not hold."""
    return [time for time in times if time is not None]


def seconds_missing(container: av.container.InputContainer, times: list[int]) -> float:
    """Return the seconds by which a Matroska or WebM file, shown at `times`, ends before its declared length, else 0.

    Such a file has no count of its frames, and a cut one ends without an error. With sound, the declared length may be
    the sound's: then less than a second is ignored.
    """
    stream = video.stream_of(container)
    if "matroska" not in container.format.name or not container.duration or not times or stream.time_base is None:
        return 0.0
    step = max((int(s) for s in np.diff(times)), default=0)
    missing = container.duration / av.time_base - float((times[-1] + step) * stream.time_base)
    tolerance = 1.0 if len(container.streams) > 1 else 0.5 * float(step * stream.time_base) + 0.01
    return missing if missing > tolerance else 0.0


def varies(times: list[int]) -> bool:
    """Return whether steps between frames differ by more than a tenth, and by more than one tick, which is rounding."""
    steps = np.diff(times)
    return bool(steps.size and np.ptp(steps) > max(1.0, 0.1 * steps.mean()))
