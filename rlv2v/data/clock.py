"""Say when the frames of a video are shown, and how many there are a second: the one place that knows.

A time is in seconds from the first frame shown, an exact fraction of the file's own ticks. A header's rate counts only
where the frames keep to it: screen recordings and phones vary, browsers write no rate, and FFmpeg then guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

DEFAULT_FPS = Fraction(25)
"""Of what has no clock: folders of images, raw clips, one picture."""
MAX_FPS = 1000
MIN_FPS = Fraction(1, 3600)
MIN_STEP = Fraction(1, 1000)
"""Seconds between two frames, at least: where times repeat or run back."""
RESET, GAP = 1, 10
"""Seconds back, or forth in a stream format, that mean that another recording starts there."""
STREAM_FORMATS = {"mpegts", "mpeg"}
"""Formats whose clock may start anew within a file: broadcasts, DVDs, files put together by `cat`."""
DECODING_CLOCK = {"avi"}
"""Formats that say when a picture is decoded; FFmpeg guesses, often too late, when it is shown."""
MISGUESSED = {"h264", "hevc"}
"""Codecs whose B-frames FFmpeg then guesses in the order of decoding."""
MAX_GAP = 3600
"""Seconds from one frame to the next: more, forth or back, is damage, such as a time of 2^62."""


def declared_rate(stream: av.VideoStream) -> Fraction | None:
    """Return the frames a second that a file declares or FFmpeg guesses; None where that is none from `MIN_FPS` on."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate and MIN_FPS <= rate <= MAX_FPS else None


def without_leaps(seconds: np.ndarray, step: float) -> np.ndarray:
    """Return times, float64 (N,) in seconds, moved so that a frame after a leap of `MAX_GAP` follows the last one."""
    steps = np.diff(seconds)
    leaps = np.abs(steps) > MAX_GAP
    return seconds[0] + np.cumsum([0.0, *np.where(leaps, step, steps)]) if leaps.any() else seconds


def measured_rate(times: np.ndarray | Sequence[Fraction], declared: Fraction | None) -> Fraction:
    """Return the frames a second of frames shown at `times`, in seconds and ascending; at most `MAX_FPS`.

    It is the `declared` rate if every frame lies within half a step of that rate's grid, else (N-1) / (last - first).
    """
    seconds = without_leaps(np.asarray(times, np.float64), float(1 / (declared or DEFAULT_FPS)))
    length = seconds[-1] - seconds[0] if len(seconds) else 0.0
    if length <= 0:
        return declared or DEFAULT_FPS
    off = np.abs((seconds - seconds[0]) * float(declared or 0) - np.arange(len(seconds)))
    if declared and off.max() < 0.45:  # half a step, less the rounding of the clock
        return declared
    return min(Fraction((len(seconds) - 1) / length).limit_denominator(60060), Fraction(MAX_FPS))


class Clock:
    """Return the time of each decoded frame, seconds from the first one as a fraction; times always grow."""

    def __init__(self, stream: av.VideoStream) -> None:
        self._tick = Fraction(stream.time_base or MIN_STEP)
        self._step = 1 / (declared_rate(stream) or DEFAULT_FPS)
        self.start: Fraction | None = None
        """The first frame's place on the file's own clock, seconds; None before it."""
        self._moved = Fraction(0)
        """By what the file's times are moved where they leapt."""
        self._last = self._before = Fraction(0)
        """Times of the last frame and of the one before it."""

    def time_of(self, frame: av.VideoFrame) -> Fraction:
        """Return the next frame's time; without one in the file, or after a leap, a step after the last."""
        ticks = frame.dts if frame.pts is None else frame.pts
        if self.start is None:
            self.start = (ticks or 0) * self._tick
            return self._last
        following = self._last + self._step
        time = following if ticks is None else ticks * self._tick - self.start + self._moved
        if abs(time - self._last) > MAX_GAP:
            self._moved += following - time
            time = following
        time = max(time, self._last + MIN_STEP)
        self._last, self._before = time, self._last
        return time

    def duration_of(self, frame: av.VideoFrame) -> Fraction:
        """Return how long the frame timed last is shown, seconds, as far as the file says.

        What FFmpeg makes of a wrong rate does not count: then it is as long as the frame before it.
        """
        duration, step = frame.duration * self._tick, self._last - self._before
        if not 0 <= duration <= MAX_GAP:
            return max(step, self._step)
        made_up = duration < self._step + self._tick and step > 2 * duration
        return step if made_up else duration


class Timeline:
    """Put the packets of a file on one clock that never starts anew, in the order of the file.

    Where the clock of the pictures jumps back by more than a second, or by ten seconds forth, another recording starts:
    it is moved to follow the last one. The other tracks move as the pictures do, so that they stay in step.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.jumps = container.format.name in STREAM_FORMATS
        """Whether the clock of this format can start anew at all."""
        context = stream.codec_context
        self.misguessed = bool(
            container.format.name in DECODING_CLOCK
            and context.has_b_frames
            and context.codec.canonical_name in MISGUESSED
        )
        """Whether it is not known when the pictures are shown: then their packets lose that time."""
        self._video = stream.index
        self._step = 1 / (declared_rate(stream) or DEFAULT_FPS)
        self._last: dict[int, Fraction] = {}
        self._part: dict[int, int] = {}
        self._moves: list[Fraction] = [Fraction(0)]

    @property
    def num_parts(self) -> int:
        """How many recordings there are so far."""
        return len(self._moves)

    def part_of(self, packet: av.Packet[Any]) -> int:
        """Return the number of the recording that a packet belongs to; call it once for each packet, in file order."""
        index, part = packet.stream_index, self._part.get(packet.stream_index, 0)
        if self.misguessed and index == self._video:
            packet.pts = None
        if not self.jumps or packet.dts is None:
            return part
        time = packet.dts * packet.time_base
        last = self._last.get(index, time)
        if not -RESET < time - last < GAP:
            part += 1
            if index == self._video:
                self._moves.append(self._moves[-1] + last + self._step - time)
        self._last[index], self._part[index] = time, part
        return part

    def move(self, packet: av.Packet[Any], part: int) -> bool:
        """Move a packet's times by what its recording is moved; False where the pictures have not come to it yet."""
        if part >= len(self._moves):
            return False
        ticks = round(self._moves[part] / packet.time_base) if self._moves[part] else 0
        if ticks:
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
        return True

    def rejoin(self, packet: av.Packet[Any]) -> int:
        """Return the recording of the pictures, for a track that jumped alone, and go on with it."""
        self._part[packet.stream_index] = len(self._moves) - 1
        return len(self._moves) - 1
