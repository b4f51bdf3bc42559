"""Clips that tell timing: black, with a white flash and a beep of 1 kHz together at 1.0 s and 3.0 s, 4 s long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from priority import usual_priority

from rlv2v.data.video import timed_frames

AT, LENGTH, FLASH = (1.0, 3.0), 4.0, 0.2
"""Seconds: of the flashes and beeps, of the clip, of one flash."""
WIDTH, HEIGHT, SAMPLE_RATE = 64, 48, 48000
FPS = 10
EVEN = tuple(Fraction(k, FPS) for k in range(40))
TV = tuple(Fraction(k, 25) for k in range(100))
VARIABLE = tuple(sorted({*(Fraction(k, 50) for k in range(0, 100, 3)), *(Fraction(k, FPS) for k in range(20, 40))}))
"""Times of frames: every 100 ms; every 40 ms, as MPEG-2 needs; in the first half every 60 ms, then every 100 ms."""


def lit(time: float, at: Sequence[float] = AT) -> bool:
    """Return whether there is a flash and a beep at a time."""
    return any(begin <= time < begin + FLASH for begin in at)


def beep(start: float, length: float, at: Sequence[float] = AT, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return the sound from `start` on, float32 (1, samples)."""
    times = start + np.arange(round(length * sample_rate)) / sample_rate
    on = np.zeros(len(times), bool)
    for begin in at:
        if start - FLASH < begin < start + length:
            on |= (begin <= times) & (times < begin + FLASH)
    return (0.8 * on * np.sin(2000 * np.pi * times)).astype(np.float32)[None]


@usual_priority()
def write_flashes(
    path: Path,
    times: Sequence[Fraction] = EVEN,
    *,
    start: Fraction = Fraction(0),
    codec: str = "libx264",
    sounds: Sequence[str] = ("aac",),
    rate: Fraction | int = FPS,
    tick: Fraction = Fraction(1, 90_000),
    setup: Callable[[Any], None] = lambda output: None,
    lacking: tuple[float, float] = (0, 0),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    subtitles: Mapping[str, Path] = {},
    at: Sequence[float] = AT,
    length: float = LENGTH,
    sample_rate: int = SAMPLE_RATE,
    **options: Any,
) -> Path:
    """Write the clip with frames at `times`, from `start` on the file's clock.

    sounds: an audio track of each of these encoders.  setup: what is done to the open output before the first packet.
    lacking: seconds from and to which there is no sound.  subtitles: files by their language.
    at: seconds of the flashes and beeps, of a clip of `length` seconds.
    options: of the pictures' encoder.
    """
    with av.open(str(path), "w", options=options.pop("container", {})) as output:
        stream: Any = output.add_stream(codec, rate=rate, options={"g": "25", **options}, time_base=tick)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.thread_count = 1
        tracks: list[Any] = [output.add_stream(sound, rate=sample_rate) for sound in sounds]
        for track in tracks:
            track.codec_context.layout = "mono"
        texts = [text for name, file in subtitles.items() for text in read_subtitles(output, name, file, start)]
        setup(output)
        output.start_encoding()
        packets: list[Any] = texts
        for time in times:
            picture = np.full((size[1], size[0], 3), 255 if lit(float(time), at) else 0, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((start + time) / tick), tick
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for track in tracks:
            for first in np.arange(0, length, 0.1):
                if lacking[0] <= first < lacking[1]:
                    continue
                samples = beep(first, 0.1, at, sample_rate)
                sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                sound.sample_rate, sound.time_base = sample_rate, Fraction(1, sample_rate)
                sound.pts = round((float(start) + first) * sample_rate)
                packets += track.encode(sound)
            packets += track.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path


def read_subtitles(output: Any, language: str, path: Path, start: Fraction) -> list[Any]:
    """Enter a file with subtitles into an output, and return its packets, moved by `start` seconds."""
    with av.open(str(path)) as source:
        stream: Any = output.add_stream_from_template(source.streams.subtitles[0])
        stream.metadata["language"] = language
        packets = [packet for packet in source.demux() if packet.size]
    for packet in packets:
        packet.stream = stream
        packet.pts = packet.dts = packet.pts + round(start / packet.time_base)
    return packets


def flashes(path: Path) -> list[float]:
    """Return when the picture of a video turns from black to white, seconds from its first frame."""
    found, dark = [], True
    for frame in timed_frames(path):
        bright = frame.rgb.mean() > 127
        if bright and dark:
            found.append(float(frame.time))
        dark = not bright
    return found


def beeps(path: Path, track: int = 0) -> list[float]:
    """Return when the beeps of a video's sound begin, seconds from its first frame."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        origin = float(first.pts * first.time_base)
    found, last = [], -1.0
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.audio[track]):
            samples = np.abs(frame.to_ndarray().astype(float))
            samples = samples.reshape(-1, len(frame.layout.channels)) if not frame.format.is_planar else samples.T
            loud = np.flatnonzero(samples.max(1) > 0.2 * (1 if frame.format.name.startswith("flt") else 32768))
            if len(loud):
                time = frame.pts * float(frame.time_base) - origin
                if time + loud[0] / frame.sample_rate - last > 0.5:
                    found.append(time + loud[0] / frame.sample_rate)
                last = time + loud[-1] / frame.sample_rate
    return found
