"""Carry sound, subtitles, chapters and tags of a video file over to another, in step with its pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.filter import Graph

from rlv2v.data.clock import Timeline
from rlv2v.data.containers import Container
from rlv2v.data.decoding import open_video, stream_of
from rlv2v.errors import get_logger

LEAD = Fraction(1, 10)
"""Seconds of sound kept before the first frame: decoders need them, players skip them."""
MAX_HELD = 1000
AAC_RATES = {96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000}
OF_THE_FILE = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration", "rotate", "handler_name"}
"""Tags that describe the file and not the film."""
log = get_logger(__name__)


class Tracks:
    """Read all but the pictures of `source`, and write them to an output while its pictures are written.

    start: the first frame's place on the file's own clock, seconds, from which all times are counted.
    audio: False leaves the sound out.
    """

    def __init__(self, source: Path, start: Fraction, *, audio: bool = True) -> None:
        self._path, self._start, self._audio = source, start, audio
        self._input = open_video(source)
        self._video: Any = stream_of(self._input)
        self._writers: dict[int, Copy | Transcode | Rewrite] = {}
        self._packets: Iterator[av.Packet[Any]] = iter(())
        self._next: av.Packet[Any] | None = None

    def attach(self, output: av.container.OutputContainer, video: Any, container: Container) -> None:
        """Enter the tracks, chapters and tags into an output of which nothing is written yet but its `video` stream.

        What the container cannot hold is encoded anew, or left out, and said once.
        """
        left_out: list[str] = []
        tracks: list[Any] = list(self._input.streams)
        for track in tracks:
            if (track.type == "audio" and not self._audio) or track.type not in ("audio", "subtitle"):
                continue
            codec = track.codec_context.codec if track.codec_context else None
            name = codec.canonical_name if codec else "unknown codec"
            kind, fits = ("sound", container.audio) if track.type == "audio" else ("subtitles", container.subtitles)
            try:
                if name in fits:
                    writer: Copy | Transcode | Rewrite = Copy(track, output)
                elif codec and track.type == "audio" and container.audio_encoder:
                    writer = Transcode(track, output, container.audio_encoder)
                elif codec and codec.text_sub and container.subtitle_encoder:
                    writer = Rewrite(track, output, container.subtitle_encoder)
                else:
                    raise ValueError
            except (ValueError, av.FFmpegError):
                left_out.append(f"{kind} ({name})")
                continue
            if not isinstance(writer, Copy):
                new = writer.stream.codec_context.codec.canonical_name
                log.warning("%s: the output cannot hold %s (%s); encoded as %s", self._path, kind, name, new)
            copy_tags(track, writer.stream)
            self._writers[track.index] = writer
        if left_out:
            log.warning("%s: left out, since the output cannot hold it: %s", self._path, ", ".join(left_out))
        copy_tags(self._video, video)
        output.metadata.update({k: v for k, v in self._input.metadata.items() if k.lower() not in OF_THE_FILE})
        output.set_chapters(list(self._chapters()))
        self._packets = self._read()
        self._next = next(self._packets, None)

    def _chapters(self) -> Iterator[Any]:
        """Yield the chapters that end after the first frame, counted from it."""
        for chapter in self._input.chapters():
            shift = round(self._start / (chapter["time_base"] or 1))
            if chapter["end"] > shift:
                start = max(0, chapter["start"] - shift)
                yield {**chapter, "start": start, "end": chapter["end"] - shift}

    def _read(self) -> Iterator[av.Packet[Any]]:
        """Yield the packets in the order of the file, counted from the first frame, on one clock."""
        timeline = Timeline(self._input, self._video)
        held: deque[tuple[av.Packet[Any], int]] = deque()
        streams = [self._input.streams[index] for index in self._writers]
        if not streams:
            return
        if timeline.jumps:
            streams.append(self._video)
        with suppress(av.FFmpegError):  # who reads the pictures names the fault
            for packet in self._input.demux(*streams):
                if packet.pts is None and packet.dts is None:
                    continue
                part = timeline.part_of(packet)
                if packet.stream_index in self._writers:
                    held.append((packet, part))
                while held and (timeline.move(*held[0]) or len(held) > MAX_HELD):
                    yield self._counted(*held.popleft(), timeline)
        for packet, part in held:
            yield self._counted(packet, part, timeline)

    def _counted(self, packet: av.Packet[Any], part: int, timeline: Timeline) -> av.Packet[Any]:
        """Return a packet, moved by now if its recording is known, with its times counted from the first frame."""
        if part >= timeline.num_parts:
            timeline.move(packet, timeline.rejoin(packet))
        shift = round(self._start / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - shift
        packet.dts = packet.pts if packet.dts is None else packet.dts - shift
        return packet

    def write_until(self, end: Fraction) -> None:
        """Write what comes before `end`, seconds from the first frame, so that the file stays interleaved."""
        while self._next is not None and time_of(self._next) < end:
            self._write(self._next)
            self._next = next(self._packets, None)

    def finish(self, end: Fraction) -> None:
        """Write what is left before `end`, the end of the pictures."""
        running = set(self._writers)
        while self._next is not None and running:
            if time_of(self._next) < end:
                self._write(self._next)
            else:
                running.discard(self._next.stream_index)
            self._next = next(self._packets, None)
        for writer in self._writers.values():
            writer.finish(end)

    def _write(self, packet: av.Packet[Any]) -> None:
        if time_of(packet) + (packet.duration or 0) * packet.time_base > -LEAD:
            self._writers[packet.stream_index].write(packet)

    def close(self) -> None:
        """Close the source."""
        self._input.close()


class Copy:
    """Copy the packets of a track."""

    def __init__(self, track: Any, output: av.container.OutputContainer) -> None:
        self.stream: Any = output.add_stream_from_template(track)
        self._output, self._last = output, Fraction(-(10**9))

    def write(self, packet: av.Packet[Any]) -> None:
        """Write a packet, unless it is sound whose time is taken: two recordings in one file may overlap by a few."""
        if time_of(packet) <= self._last:
            if self.stream.type == "audio":
                return
            put_after(packet, self._last)
        self._last = time_of(packet)
        packet.stream = self.stream
        self._output.mux(packet)

    def finish(self, end: Fraction) -> None:
        """Do nothing: all is written."""


class Rewrite:
    """Encode a track of subtitles anew, which are text: each shows the same words, in italics and bold where it did."""

    def __init__(self, track: Any, output: av.container.OutputContainer, encoder: str) -> None:
        stream: Any = output.add_stream(encoder)
        self.stream, self._encoder, self._decoder = stream, stream.codec_context, track.codec_context
        self._decoder.open(strict=False)
        self._encoder.subtitle_header = self._decoder.subtitle_header
        self._encoder.time_base = track.time_base
        self._output, self._last = output, Fraction(-(10**9))

    def write(self, packet: av.Packet[Any]) -> None:
        """Decode and encode a packet; one that cannot be decoded, and one without words, is left out."""
        with suppress(av.FFmpegError):
            subtitle = self._decoder.decode2(packet)
            if subtitle is None or not any(text.dialogue for text in subtitle):
                return
            text = self._encoder.encode_subtitle(subtitle)
            shown = Fraction(subtitle.end_display_time - subtitle.start_display_time, 1000)
            text.time_base, text.stream = packet.time_base, self.stream
            text.pts = text.dts = packet.pts
            text.duration = packet.duration or round(shown / packet.time_base)
            if time_of(text) <= self._last:
                put_after(text, self._last)
            self._last = time_of(text)
            self._output.mux(text)

    def finish(self, end: Fraction) -> None:
        """Do nothing: all is written."""


class Transcode:
    """Encode a track of sound anew, from 0 on and without gaps; silence fills what is missing."""

    def __init__(self, track: Any, output: av.container.OutputContainer, encoder: str) -> None:
        context = track.codec_context
        rate = context.sample_rate if encoder == "aac" and context.sample_rate in AAC_RATES else 48000
        self._layout = "mono" if context.channels == 1 else "stereo"
        if context.channels == 6 and encoder == "aac":
            self._layout = "5.1"
        stream: Any = output.add_stream(encoder, rate=rate)
        stream.codec_context.layout = self._layout
        stream.codec_context.bit_rate = 96_000 * stream.codec_context.channels
        self.stream = stream
        self._track, self._output = track, output
        self._form: tuple[str, str, int] | None = None
        """Of the last frame: of its samples, of its channels, samples a second."""
        self._resampler: av.AudioResampler | None = None
        self._graph: Graph | None = None

    def write(self, packet: av.Packet[Any]) -> None:
        """Decode and encode a packet; one that cannot be decoded becomes silence."""
        with suppress(av.FFmpegError, ValueError):
            for frame in self._track.codec_context.decode(packet):
                self._take(frame)

    def finish(self, end: Fraction) -> None:
        """Encode what is left."""
        if self._graph is not None:
            self._flush()
            self._encode(None)
        self._output.mux(self.stream.encode(None))

    def _take(self, frame: av.AudioFrame) -> None:
        """Bring a frame to one form: broadcasts, and files put together, change rate and channels on the way."""
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if self._resampler is None or form != self._form:
            self._flush()
            # whole numbers are clipped: damage decodes to 1e7, at which FFmpeg's encoder of AAC never ends
            self._resampler = av.AudioResampler("s32", self._layout, self.stream.codec_context.sample_rate)
            self._form = form
        for even in self._resampler.resample(frame):
            self._encode(even)

    def _flush(self) -> None:
        """Encode what is left of the frames of one form."""
        if self._resampler is not None:
            for even in self._resampler.resample(None):
                self._encode(even)

    def _encode(self, frame: av.AudioFrame | None) -> None:
        """Close the gap before a frame (None: the end), encode and write what comes of it."""
        if self._graph is None:
            assert frame is not None
            self._graph = self._even(frame)
        self._graph.push(frame)
        while True:
            try:
                even: Any = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            self._output.mux(self.stream.encode(even))

    def _even(self, frame: av.AudioFrame) -> Graph:
        """Return a filter that brings frames like this one to the encoder's form, from 0 on and without gaps."""
        context, graph = self.stream.codec_context, Graph()
        tick: Any = frame.time_base
        source = graph.add(
            "abuffer",
            f"time_base={tick.numerator}/{tick.denominator}:sample_rate={frame.sample_rate}"
            f":sample_fmt={frame.format.name}:channel_layout={frame.layout.name}",
        )
        even = graph.add("aresample", f"{context.sample_rate}:async=1:first_pts=0:min_hard_comp=0.02")
        form = graph.add("aformat", f"sample_fmts={context.format.name}:channel_layouts={self._layout}")
        graph.link_nodes(source, even, form, graph.add("abuffersink")).configure()
        return graph


def time_of(packet: av.Packet[Any]) -> Fraction:
    """Return when a packet is due, seconds; it has a time."""
    return (packet.dts if packet.dts is not None else packet.pts or 0) * packet.time_base


def put_after(packet: av.Packet[Any], last: Fraction) -> None:
    """Let a subtitle begin a tick after `last`, seconds: two people may speak at once, and files hold one at a time."""
    packet.pts = packet.dts = last // packet.time_base + 1


def copy_tags(track: Any, stream: Any) -> None:
    """Give an output's stream the language, the title and the flags of a source's track."""
    stream.metadata.update({name: track.metadata[name] for name in ("language", "title") if name in track.metadata})
    stream.disposition = int(track.disposition)
