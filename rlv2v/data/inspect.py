"""Decode one source to its end and report how much of it is usable; faults are stored in its status, not raised.

A damaged video counts up to the frame that its decoder reports, less one, in which the damage may begin unseen: most
codecs carry no checksum, and a few wrong bits can pass for picture. A file that ends early counts up to the last frame
before which none is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

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
    codec: str = ""
    num_frames: int = 0
    """Frames that decode without damage, from the first on."""
    fps: float = 0.0
    width: int = 0
    """Width of the upright frame, pixels."""
    height: int = 0
    num_bytes: int = 0
    pixels: str = ""
    """FFmpeg's pixel format of a video that is as DALI takes it: upright, of one size, whole, BT.601 limited or RGB."""
    status: Literal["ok", "truncated", "excluded"] = "ok"
    reason: str = ""
    """Why it is truncated or excluded; empty when ok."""
    hash: str = ""
    """SHA-256 of the content, see `content_hash`; empty where it cannot be read."""

    def to_row(self) -> dict[str, Any]:
        """Return the fields as JSON stores them, without the path."""
        return {name: value for name, value in asdict(self).items() if name != "path"}

    @classmethod
    def from_row(cls, path: Path, row: Mapping[str, Any]) -> Source:
        """Return the source of a stored row; what only other versions store is ignored."""
        names = {field.name for field in fields(cls)}
        return cls(**{**{name: value for name, value in row.items() if name in names}, "path": path})


class Stopped(Exception):
    """Report that the index was interrupted: what is being decoded is of no use any more."""


def inspect(path: Path, stop: threading.Event) -> Source:
    """Decode a source of any kind to its end; its faults are not raised. Raises `Stopped` once `stop` is set."""
    try:
        source = decode_video(path, stop) if video.kind_of(path) == "video" else read_stored(path, stop)
    except (UserError, OSError) as error:
        return excluded_source(path, str(error))
    return replace(source, status="truncated", reason=short_reason(source.reason, path)) if source.reason else source


def excluded_source(path: Path, reason: str) -> Source:
    """Return the source of a path that cannot be used."""
    return Source(path, video.kind_of(path), status="excluded", reason=short_reason(reason, path))


def short_reason(reason: object, path: Path) -> str:
    """Return `reason` on one line and without `path`: what stores it stays true when a folder is renamed."""
    name = one_line(path)
    return one_line(reason).removeprefix(f"{name}: ").replace(f"{name}/", "")


def read_stored(path: Path, stop: threading.Event) -> Source:
    """Read a raw clip, frame folder or image to its end or its first fault; `reason` names that."""
    kind, probe, count, damage = video.kind_of(path), video.probe(path), 0, ""
    if kind == "raw":
        (num, *_), count = video.raw_shape(path)
        damage = f"the file ends after {count} of {num} frames" if count < num else ""
    else:
        try:
            for _ in video.stored_frames(path):
                if stop.is_set():
                    raise Stopped
                count += 1
        except UserError as error:
            damage = f"reading stops after frame {count}: {error}"
    return Source(path, kind, probe.codec, count, float(probe.fps), probe.width, probe.height, reason=damage)


def decode_video(path: Path, stop: threading.Event) -> Source:
    """Decode a video file to the end; `reason` says why what is usable of it ends early.

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
        width, height = (first.height, first.width) if round(first.rotation / 90) % 2 else (first.width, first.height)
        trimmed = stream.frames not in (0, num)  # DALI may number what an edit list hides
        if turned or trimmed or damage or len(sizes) > 1 or not (pixels == "gbrp" or is_limited_601(first)):
            pixels = ""
    return Source(path, "video", codec, num, fps, width, height, pixels=pixels or "", reason=damage)


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
        wrong = next((i for i, (time, packet) in enumerate(zip(times, shown, strict=False)) if time != packet), num)
        if wrong < len(shown) == len(set(shown)):
            return max(wrong - 1, 0), f"frame {wrong} cannot be decoded"
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
