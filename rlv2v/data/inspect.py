"""Decode one source to its end and report how much of it is usable; faults are stored in its status, not raised.

A damaged video counts up to the frame that its decoder reports, less one, in which the damage may begin unseen: most
codecs carry no checksum, and a few wrong bits can pass for picture. A file that ends early counts up to the last frame
before which none is missing.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from rlv2v.data import video
from rlv2v.data.clock import Timeline, declared_rate, measured_rate
from rlv2v.data.damage import CUT_OFF, ONE_PICTURE_A_PACKET, Tally, ending
from rlv2v.data.decoding import decoder_of, open_video, stream_of
from rlv2v.data.hdr import CURVES
from rlv2v.data.upright import Upright, has_alpha, is_limited_601, matrix_of, pixel_aspect, square_size, turn_of
from rlv2v.data.video import Kind
from rlv2v.errors import UserError, one_line

UNKNOWN = -(2**63)
"""The time of a frame that has none, as FFmpeg writes it."""
PROBE_SIZE = (64, 64)
"""Width and height to which a frame of each shape is converted, to see that it can be."""


@dataclass(frozen=True)
class Source:
    """Hold one video (or still image) of a set, as one full decode found it."""

    path: Path
    kind: Kind
    codec: str = ""
    num_frames: int = 0
    """Frames that decode without damage, from the first on."""
    fps: float = 0.0
    """Frames a second, see `rlv2v.data.clock`."""
    width: int = 0
    """Width of the upright frame in square pixels."""
    height: int = 0
    num_bytes: int = 0
    pixels: str = ""
    """FFmpeg's pixel format of a video that is as DALI takes it: upright, of one size, whole, BT.601 limited or RGB."""
    status: Literal["ok", "truncated", "excluded"] = "ok"
    reason: str = ""
    """Why it is truncated or excluded; empty when ok."""
    hash: str = ""
    """SHA-256 of the content, see `content_hash`; empty where it cannot be read."""
    interlaced: bool = False
    """Whether a frame is flagged as interlaced: readers then deinterlace."""

    @property
    def is_still(self) -> bool:
        """Whether it is a single picture, and not the numbered frames of a video."""
        return self.kind == "image" and self.num_frames == 1

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
    times, expected = array("q"), array("q")
    shapes: set[tuple[int, int, str, int]] = set()
    plain, interlaced, damage, first, tally = True, False, "", None, Tally()
    with open_video(path) as container:
        stream = stream_of(container)
        decoder, timeline, aspect = decoder_of(stream), Timeline(container, stream), pixel_aspect(stream)
        codec = stream.codec_context.codec.canonical_name
        check = codec in ONE_PICTURE_A_PACKET and not timeline.misguessed
        pixels = stream.codec_context.pix_fmt
        try:
            for packet in container.demux(stream):
                if stop.is_set():
                    raise Stopped
                timeline.move(packet, timeline.part_of(packet))
                tally.add_packet(packet)
                if packet.size and not packet.is_discard and packet.pts is not None and check:
                    expected.append(packet.pts)
                if packet.is_corrupt:
                    raise UserError("the file is cut off or damaged there")
                for frame in decoder.decode(packet if packet.size else None):
                    if frame.is_corrupt:
                        raise UserError(f"frame {len(times)} is damaged")
                    shape = frame.width, frame.height, frame.format.name, matrix_of(frame)
                    if shape not in shapes:
                        Upright(PROBE_SIZE)(frame)  # what cannot be converted cannot be read
                        shapes.add(shape)
                    first = first or frame
                    interlaced |= frame.interlaced_frame
                    plain &= not any(turn_of(frame)) and frame.color_trc not in CURVES
                    ticks = frame.dts if timeline.misguessed else frame.pts
                    times.append(UNKNOWN if ticks is None else ticks)
                    tally.add_frame(frame.pts)
            cut = ending(container, stream, path, tally)
            num, damage = trusted_frames(np.asarray(times), np.asarray(expected), tally.last_dts, cut)
        except (av.FFmpegError, OSError, UserError) as error:
            damage = f"decoding stops after frame {len(times)}: {getattr(error, 'strerror', None) or error}"
            num = max(len(times) - 1, 0)
        if first is None or num == 0:
            raise UserError(f"{path}: no frame can be decoded{': ' + damage if damage else ''}")
        ticks_shown = np.asarray(times)[:num]
        seconds = ticks_shown[ticks_shown != UNKNOWN] * float(stream.time_base or 0)
        fps = measured_rate(seconds, declared_rate(stream))
        trimmed = stream.frames not in (0, num) or timeline.num_parts > 1  # DALI may number what an edit list hides
        plain &= len({(width, height) for width, height, *_ in shapes}) == 1 and aspect == 1
        plain &= not (interlaced or trimmed or damage or has_alpha(first))
        sides = square_size(first.width, first.height, aspect)
        width, height = sides[::-1] if turn_of(first)[0] else sides
    plain &= pixels == "gbrp" or is_limited_601(first)
    form = pixels or "" if plain else ""
    return Source(
        path, "video", codec, num, float(fps), width, height, pixels=form, reason=damage, interlaced=interlaced
    )


def trusted_frames(times: np.ndarray, shown: np.ndarray, last_decoded: int | None, cut: str) -> tuple[int, str]:
    """Return how many frames of a video that decoded without an error can be trusted, and why no more (empty: all).

    times: int64 (N,), of the frames as decoded.  shown: int64 (P,), of the packets as read; empty where not each of
    them is a picture.  last_decoded: when the last packet is decoded.  cut: how the file ends early.
    """
    num = len(times)
    if num and times[0] != UNKNOWN:
        shown = np.sort(shown[shown >= times[0]])
        both = min(num, len(shown))
        differing = np.flatnonzero(times[:both] != shown[:both])
        wrong = int(differing[0]) if len(differing) else num
        if wrong < len(shown) and (np.diff(shown) > 0).all():
            return max(wrong - 1, 0), f"frame {wrong} cannot be decoded"
    if not cut:
        return num, ""
    num = max(num - 1, 0) if cut == CUT_OFF else num
    if last_decoded is not None:  # what is still to come would be shown later than it is decoded
        num = min(num, int((times <= last_decoded).sum()))
    return num, cut
