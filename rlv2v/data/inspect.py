"""How much of one source is usable: it is decoded to its end, and what is wrong with it is said, not raised.

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

BT601 = {2, 5, 6}
"""AVColorSpace numbers that mean BT.601 or, untagged, are read as it."""
ONE_PICTURE_A_PACKET = {"h264", "hevc", "vp9", "av1"}
"""Codecs of which a whole file shows each packet once, at the packet's time."""


@dataclass(frozen=True)
class Source:
    """One video (or still image) of a set, as the one full decode found it."""

    path: Path
    kind: Kind
    codec: str
    num_frames: int
    """Frames that decode without damage, from the first on."""
    fps: float
    width: int
    """Of the upright frame, pixels."""
    height: int
    num_bytes: int
    dali: bool
    """Whether DALI's CPU decoder gives the same frames: VP9, upright, constant size, BT.601 limited range or RGB."""
    status: Literal["ok", "truncated", "excluded"]
    reason: str
    """Why it is truncated or excluded; empty when ok."""
    hash: str = ""
    """Of the content, see `content_hash`; empty where it cannot be read."""
    variable: bool = False
    """Whether the time from frame to frame varies by more than a tenth."""


class Stopped(Exception):
    """The index was interrupted: what is being decoded is of no use any more."""


def decode_all(path: Path, stop: threading.Event) -> tuple[Source, str]:
    """Decode a video file to the end; return what is usable of it and why it ends early (empty: it does not).

    Raises `UserError` when no frame is usable, `Stopped` once `stop` is set.
    """
    times: list[int | None] = []
    packets: list[tuple[int | None, int | None]] = []
    sizes, turned, damage, first, skipped = set(), False, "", None, 0
    with video.open_video(path) as container:
        stream = video.stream_of(container)
        codec = stream.codec_context.codec.canonical_name
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        pixels = stream.codec_context.pix_fmt
        try:
            for packet in container.demux(stream):
                if stop.is_set():
                    raise Stopped
                skipped += packet.is_discard
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
            count, damage = before_the_end(container, path, times, packets, skipped)
        except (av.FFmpegError, OSError, UserError) as error:
            damage = f"decoding stops after frame {len(times)}: {one_line(getattr(error, 'strerror', None) or error)}"
            count = max(len(times) - 1, 0)
        if first is None or count == 0:
            raise UserError(f"{path}: no frame can be decoded{': ' + damage if damage else ''}")
        lying = round(first.rotation / 90) % 2 == 1
        width, height = (first.height, first.width) if lying else (first.width, first.height)
        limited_601 = first.colorspace in BT601 and first.color_range != ColorRange.JPEG
        same_colour = pixels == "gbrp" or (pixels in ("yuv420p", "yuv444p") and limited_601)
        trimmed = stream.frames not in (0, count)  # DALI may number what an edit list hides
        dali = codec == "vp9" and same_colour and not turned and not trimmed and len(sizes) == 1
    found = Source(path, "video", codec, count, fps, width, height, 0, dali and not damage, "ok", "")
    return replace(found, variable=varies(known(times[:count]))), damage


def before_the_end(
    container: av.container.InputContainer,
    path: Path,
    times: Sequence[int | None],
    packets: Sequence[tuple[int | None, int | None]],
    skipped: int,
) -> tuple[int, str]:
    """How many frames of a video that was decoded without an error can be trusted, and why no more (empty: all).

    times: of the frames as decoded; packets: (time to show, time to decode) as read; skipped: packets that an edit
    list takes out.
    """
    stream = video.stream_of(container)
    num, missing = len(times), seconds_missing(container, known(times))
    if stream.codec_context.codec.canonical_name in ONE_PICTURE_A_PACKET and times and times[0] is not None:
        shown = sorted(p for p, _ in packets if p is not None and p >= times[0])
        same = next((i for i, pair in enumerate(zip(times, shown, strict=False)) if pair[0] != pair[1]), num)
        if same < len(shown) == len(set(shown)):
            return max(same - 1, 0), f"frame {same} cannot be decoded"
    read, declared = len(packets), stream.frames
    if "mp4" in container.format.name and stream.index_entries:  # without what the edit list of a trimmed file cuts off
        read, declared = read + skipped, min(declared, len(stream.index_entries))
    if container.format.name == "avi" and packets and packets[-1][1] is not None:
        # AVI counts ticks: a frame may take several of them, and the last one is as long as the longest
        read = packets[-1][1] + max((int(s) for s in np.diff(known([d for _, d in packets]))), default=1)
    if read < declared:
        damage = f"the file ends after {read} of {declared} frames"
    elif missing:
        damage = f"the file ends {missing:.1f} s before the length that it declares"
    elif not has_end(container.format.name, path):
        num, damage = max(num - 1, 0), "the file is cut off"
    else:
        return num, ""
    decoded = packets[-1][1] if packets else None
    if decoded is not None:  # what is still to come would be shown later than it is decoded
        num = min(num, sum(t is None or t <= decoded for t in times))
    return num, damage


def has_end(container: str, path: Path) -> bool:
    """Whether a GIF has its last byte and an MPEG-TS whole packets: both can be cut without an error."""
    if container == "gif":
        return path.read_bytes().rstrip(b"\0").endswith(b";")
    return container != "mpegts" or any(path.stat().st_size % packet == 0 for packet in (188, 192, 204))


def known(times: Sequence[int | None]) -> list[int]:
    """The times without those that the file does not tell."""
    return [time for time in times if time is not None]


def seconds_missing(container: av.container.InputContainer, times: list[int]) -> float:
    """By how much the frames shown at `times` end before what a Matroska or WebM file declares, s; 0: they do not.

    Such a file has no count of its frames, and a cut one ends without an error. Where it has sound as well, the length
    that it declares may be the sound's: then a second less counts as none.
    """
    stream = video.stream_of(container)
    if "matroska" not in container.format.name or not container.duration or not times or stream.time_base is None:
        return 0.0
    steps = np.diff(times)
    last = times[-1] + (int(steps.max()) if steps.size else 0)
    missing = container.duration / av.time_base - float(last * stream.time_base)
    step = float((steps.max() if steps.size else 0) * stream.time_base)
    return missing if missing > (1.0 if len(container.streams) > 1 else 0.5 * step + 0.01) else 0.0


def varies(times: list[int]) -> bool:
    """Whether steps between frames differ by more than a tenth and more than the one tick that rounding makes."""
    steps = np.diff(times)
    return bool(steps.size and np.ptp(steps) > max(1.0, 0.1 * steps.mean()))


def inspect(path: Path, stop: threading.Event) -> Source:
    """Decode a source of any kind to its end; what is wrong with the file is not raised but said in `status`.

    Raises `Stopped` once `stop` is set.
    """
    kind, damage = video.kind_of(path), ""
    try:
        if kind == "video":
            source, damage = decode_all(path, stop)
        else:
            about = video.probe(path)
            count, damage = count_raw(path) if kind == "raw" else count_images(path, stop)
            source = Source(
                path, kind, about.codec, count, float(about.fps), about.width, about.height, 0, False, "ok", ""
            )
    except (UserError, OSError) as error:
        return excluded(path, str(error))
    return replace(source, status="truncated" if damage else "ok", reason=local(damage, path))


def excluded(path: Path, reason: str) -> Source:
    """The source that `path` would be if it could be used."""
    return Source(path, video.kind_of(path), "", 0, 0.0, 0, 0, 0, False, "excluded", local(reason, path))


def local(reason: str, path: Path) -> str:
    """`reason` without the folders above the source: the manifest stays true when they are renamed."""
    name = one_line(path)
    return one_line(reason).removeprefix(f"{name}: ").replace(f"{name}/", "")


def count_raw(path: Path) -> tuple[int, str]:
    """How many frames a raw clip holds whole, and why not all that it declares."""
    (num, *_), held = video.raw_shape(path)
    return held, f"the file ends after {held} of {num} frames" if held < num else ""


def count_images(path: Path, stop: threading.Event) -> tuple[int, str]:
    """How many images of a frame folder (or 1) can be read from the first on, and why no more."""
    count = 0
    try:
        for _ in video.stored_frames(path):
            if stop.is_set():
                raise Stopped
            count += 1
    except UserError as error:
        return count, f"reading stops after frame {count}: {error}"
    return count, ""
