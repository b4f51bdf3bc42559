"""Say what is wrong with a video: frames that cannot be decoded, and a file that ends early.

The index, the training and `translate` find faults by these rules and name them by these words.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from rlv2v.errors import UserError

ONE_PICTURE_A_PACKET = {"h264", "hevc", "vp9", "av1"}
"""Codecs of which an intact file shows each packet once, at the packet's time."""
MAX_LISTED, MAX_KEPT = 8, 1000
CUT_OFF = "the file is cut off"
BLOCK = 2**16
"""Bytes of a file that are searched at a time."""


@dataclass
class Tally:
    """Count what was read of a file's pictures, as far as its end tells; in constant memory."""

    num_packets: int = 0
    """Packets that hold a picture, without those that an edit list takes out."""
    num_discarded: int = 0
    """Packets that an edit list takes out."""
    last_dts: int | None = None
    longest_packet: int = 1
    """Longest time from packet to packet, ticks."""
    last_shown: int | None = None
    longest_frame: int = 0
    """Longest time from frame to frame, ticks."""

    def add_packet(self, packet: av.Packet[Any]) -> None:
        """Count a packet of the pictures."""
        self.num_discarded += packet.is_discard
        if packet.size and not packet.is_discard:
            self.num_packets += 1
            if packet.dts is not None and self.last_dts is not None:
                self.longest_packet = max(self.longest_packet, packet.dts - self.last_dts)
            self.last_dts = packet.dts

    def add_frame(self, ticks: int | None) -> None:
        """Count a frame shown at `ticks`."""
        if ticks is not None:
            if self.last_shown is not None:
                self.longest_frame = max(self.longest_frame, ticks - self.last_shown)
            self.last_shown = ticks


def ending(container: av.container.InputContainer, stream: av.VideoStream, path: Path, tally: Tally) -> str:
    """Return how a file that was read to its end is cut off; empty where it seems complete."""
    form = container.format.name
    read, declared = tally.num_packets, stream.frames
    if "mp4" in form and stream.index_entries:  # the index lacks what the edit list of a trimmed file cuts off
        read, declared = read + tally.num_discarded, min(declared, len(stream.index_entries))
    if form == "avi" and tally.num_packets and tally.last_dts is not None:
        # AVI counts ticks: a frame may take several of them, and the last one is as long as the longest
        read = tally.last_dts + tally.longest_packet
    if read < declared:
        return f"the file ends after {read} of {declared} frames"
    if missing := seconds_missing(container, stream, tally):
        return f"the file ends {missing:.1f} s before the length that it declares"
    return "" if has_end(form, path) else CUT_OFF


def has_end(form: str, path: Path) -> bool:
    """Return whether a GIF has its last byte and an MPEG-TS complete packets: both can be cut without an error.

    Of what is no file, such as stdin, nobody can tell.
    """
    if not path.is_file():
        return True
    if form == "gif":
        return last_byte(path) == b";"
    return form != "mpegts" or any(path.stat().st_size % packet == 0 for packet in (188, 192, 204))


def last_byte(path: Path) -> bytes:
    """Return the last byte of a file that is not 0, empty if there is none; a block at a time is in memory."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            if block := file.read(end - start).rstrip(b"\0"):
                return block[-1:]
            end = start
    return b""


def seconds_missing(container: av.container.InputContainer, stream: av.VideoStream, tally: Tally) -> float:
    """Return the seconds by which a Matroska or WebM file ends before its declared length, else 0.

    Such a file has no count of its frames, and a cut one ends without an error. With sound, the declared length may be
    the sound's: then less than a second is ignored.
    """
    if "matroska" not in container.format.name or not container.duration or tally.last_shown is None:
        return 0.0
    tick, step = float(stream.time_base or 0), tally.longest_frame
    missing = container.duration / av.time_base - (tally.last_shown + step) * tick
    tolerance = 1.0 if len(container.streams) > 1 else 0.5 * step * tick + 0.01
    return missing if missing > tolerance else 0.0


@dataclass
class Faults:
    """Collect what is wrong with a video while it is read on."""

    strict: bool = False
    """Raise a `UserError` at the first fault instead."""

    frames: list[int] = field(default_factory=list)
    """Numbers of the frames that show the last good one instead, the first thousand of them."""
    num_frames: int = 0
    """How many there are."""
    ending: str = ""
    """How the file is cut off; empty where it is complete."""

    def add(self, path: Path, number: int) -> None:
        """Note a frame of `path` that could not be decoded."""
        if self.strict:
            raise UserError(f"{path}: frame {number} cannot be decoded")
        self.num_frames += 1
        if len(self.frames) < MAX_KEPT:
            self.frames.append(number)

    def end(self, path: Path, reason: str) -> None:
        """Note how the file ends, "" if as it should."""
        if reason and self.strict:
            raise UserError(f"{path}: {reason}")
        self.ending = self.ending or reason

    def lines(self) -> list[str]:
        """Return a line for the damaged frames and one for the end of the file, without what is intact."""
        lines = []
        if self.num_frames:
            runs = [f"{a}-{b}" if b > a else f"{a}" for a, b in spans(self.frames)]
            more = ", ..." if len(runs) > MAX_LISTED or self.num_frames > len(self.frames) else ""
            which = "frame" if self.num_frames == 1 else f"{self.num_frames} frames:"
            lines.append(f"{which} {', '.join(runs[:MAX_LISTED])}{more} cannot be decoded; the last good one is shown")
        return [*lines, *([self.ending] if self.ending else [])]


def spans(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as (first, last) of each run without a hole."""
    result: list[tuple[int, int]] = []
    for number in numbers:
        if result and number == result[-1][1] + 1:
            result[-1] = (result[-1][0], number)
        else:
            result.append((number, number))
    return result


class Gaps:
    """Find the packets whose pictures never came, by the times of both; for `ONE_PICTURE_A_PACKET` only."""

    def __init__(self, codec: str) -> None:
        self.counts = codec in ONE_PICTURE_A_PACKET
        self._waiting: list[int] = []
        self._begun = False

    def add(self, packet: av.Packet[Any]) -> None:
        """Expect the picture of a packet."""
        if self.counts and packet.size and not packet.is_discard and packet.pts is not None:
            heapq.heappush(self._waiting, packet.pts)

    def none_before(self, ticks: int | None) -> bool:
        """Return whether no picture is missing before the one shown at `ticks`."""
        return not self._begun or ticks is None or not self._waiting or self._waiting[0] >= ticks

    def before(self, ticks: int | None) -> Iterator[int]:
        """Yield the times of the pictures that should have come before the one shown at `ticks` (None: the end)."""
        while self._waiting and (ticks is None or self._waiting[0] <= ticks):
            missing = heapq.heappop(self._waiting)
            if self._begun and missing != ticks:
                yield missing
        self._begun = True
