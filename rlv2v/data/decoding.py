"""Decode a video file from its start: frames with their times, deinterlaced, and damage either raised or bridged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.stream import Disposition

from rlv2v.data.clock import Clock, Timeline
from rlv2v.data.damage import Faults, Gaps, Tally, ending
from rlv2v.data.upright import Upright, matrix_of, pixel_aspect
from rlv2v.errors import UserError

Deinterlace = Literal["auto", "on", "off"]
MAX_PIXELS = 2**27
"""Of a picture, 16384x8192: FFmpeg takes memory for what a header says, a frame for each of its threads."""
MAX_LATE = 4
"""After damage a decoder may give frames out of order; so many are waited for."""
TEXT_FORMATS = {"tty", "bin", "xbin", "adf", "idf", "concat", "hls", "dash", "sdp", "svg_pipe"}
"""Formats that FFmpeg draws as a picture (a README.txt) or follows to other files and hosts (a playlist)."""


class TimedFrame(NamedTuple):
    """Hold a frame as it is shown."""

    rgb: np.ndarray
    """uint8 (H,W,3)."""
    time: Fraction
    """Seconds from the first frame of its source."""
    duration: Fraction
    """Seconds that it is shown, as far as the source says."""


def open_video(path: Path) -> av.container.InputContainer:
    """Open with PyAV and check that there is a video in it (see `stream_of`); the caller closes it."""
    return open_named(file_name(path), path)


def file_name(path: Path) -> str:
    """Return what FFmpeg calls a file, whose name may have a colon."""
    return path.as_posix() if path.is_absolute() else f"./{path.as_posix()}"


def open_named(name: str, path: Path, form: str | None = None) -> av.container.InputContainer:
    """Open what FFmpeg calls `name` as `open_video` does; errors call it `path`.

    form: FFmpeg's name of the format or device; None: found by the content.
    """
    try:
        container = av.open(name, format=form, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be opened as a video: {reason}") from error
    if container.format.name in TEXT_FORMATS:
        fault = "a text file or a playlist; expected a video"
    elif not container.streams.video:
        fault = "no video stream; expected a file with pictures"
    elif stream_of(container).disposition & Disposition.attached_pic:
        fault = "no video stream but a cover picture; expected a video"
    elif stream_of(container).disposition & Disposition.dependent:
        fault = "a picture stored in tiles; expected one in a piece: convert it to PNG or JPEG"
    elif getattr(stream_of(container), "codec_context", None) is None:
        fault = "PyAV does not know its codec; expected H.264, VP9 or another common one"
    elif (width := stream_of(container).width) * (height := stream_of(container).height) > MAX_PIXELS:
        fault = f"pictures of {width}x{height}; expected at most {MAX_PIXELS} pixels, as of 16384x8192"
    else:
        return container
    container.close()
    raise UserError(f"{path}: {fault}")


def stream_of(container: av.container.InputContainer) -> av.VideoStream:
    """Return the first video stream with more than a still or a cover picture, the first one if there is none."""
    streams = container.streams.video
    moving = [s for s in streams if not s.disposition & Disposition.attached_pic]
    return next((s for s in moving if s.frames != 1), (moving or streams)[0])


def decoder_of(stream: av.VideoStream) -> av.VideoCodecContext:
    """Return the decoder of a stream: its own, or the one that reads the transparency of VP8 and VP9."""
    codec = stream.codec_context.codec.canonical_name
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(codec)
    context = stream.codec_context
    if decoder is not None and stream.metadata.get("alpha_mode") == "1" and decoder in av.codecs_available:
        created = av.CodecContext.create(decoder, "r")
        assert isinstance(created, av.VideoCodecContext)
        context = created
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return context


def decode(
    path: Path,
    size: tuple[int, int] | None = None,
    *,
    deinterlace: Deinterlace = "auto",
    faults: Faults | None = None,
) -> Iterator[TimedFrame]:
    """Yield all frames of a video file in display order.

    size: (width, height) to scale to; None: those of the first frame in square pixels.  deinterlace: `auto` those
    frames that are flagged as interlaced, `on` all, `off` none.  faults: without it, the first damaged frame raises a
    `UserError` naming it; else the last good frame takes its place, and `faults` says so, and at the end whether the
    file is cut off; if `faults.strict`, the first fault raises.
    """
    with open_video(path) as container:
        stream = stream_of(container)
        upright, clock = Upright(size, pixel_aspect(stream), path), Clock(stream)
        for frame in deinterlaced(pictures(path, container, faults), deinterlace):
            yield TimedFrame(upright(frame), clock.time_of(frame), clock.duration_of(frame))


def pictures(
    path: Path, container: av.container.InputContainer, faults: Faults | None = None
) -> Iterator[av.VideoFrame]:
    """Yield the decoded frames of a file on one clock (see `Timeline`); faults as in `decode`."""
    stream = stream_of(container)
    decoder, timeline, tally = decoder_of(stream), Timeline(container, stream), Tally()
    codec = stream.codec_context.codec.canonical_name
    mender, gaps = Mender(path, faults), Gaps("" if timeline.misguessed else codec)
    waiting: list[av.VideoFrame] = []
    spoiled: set[int] = set()

    def shown(now: bool) -> Iterator[av.VideoFrame]:
        """Yield those waiting frames, at once if `now`, before which none is missing or will still come."""
        waiting.sort(key=lambda frame: -1 if frame.pts is None else frame.pts)
        while waiting and (now or faults is None or len(waiting) > MAX_LATE or gaps.none_before(waiting[0].pts)):
            frame = waiting.pop(0)
            if faults is not None:
                for ticks in gaps.before(frame.pts):
                    yield from mender.lost(ticks)
            tally.add_frame(frame.pts)
            if frame.is_corrupt or (faults is not None and frame.pts in spoiled):
                yield from mender.damaged(frame)
            else:
                yield mender.good(frame)

    try:
        for packet in container.demux(stream):
            timeline.move(packet, timeline.part_of(packet))
            tally.add_packet(packet)
            gaps.add(packet)
            frames: list[av.VideoFrame] = []
            try:
                frames = decoder.decode(packet if packet.size else None)
            except (av.FFmpegError, OSError) as error:
                yield from mender.lost(packet.pts, error, known=not gaps.counts and packet.size > 0)
            if packet.is_corrupt and packet.pts is not None:
                spoiled.add(packet.pts)
            for frame in frames:
                waiting.append(frame)
                yield from shown(frame.pts is None)
        yield from shown(True)
    except (av.FFmpegError, OSError) as error:
        if faults is None:
            raise mender.undecodable(error) from error
        faults.end(path, f"reading stops after frame {mender.count}: {getattr(error, 'strerror', None) or error}")
    if faults is not None:
        for ticks in gaps.before(None):
            yield from mender.lost(ticks)
        faults.end(path, ending(container, stream, path, tally))


class Mender:
    """Show the last good frame in place of those that cannot be decoded, and note their numbers in `faults`.

    Without `faults`, the first one raises a `UserError`.
    """

    def __init__(self, path: Path, faults: Faults | None) -> None:
        self._path, self._faults = path, faults
        self._last: av.VideoFrame | None = None
        self.count = 0
        """Frames that were shown."""

    def good(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return a frame as it is."""
        self._last = frame
        self.count += 1
        return frame

    def damaged(self, frame: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Yield what is shown in place of a damaged frame: itself if it is the first."""
        if self._faults is None:
            raise UserError(f"{self._path}: frame {self.count} is damaged")
        if self._last is None:
            self._faults.add(self._path, self.count)
            yield self.good(frame)
        else:
            yield from self.lost(frame.pts)

    def lost(self, ticks: int | None, error: Exception | None = None, *, known: bool = True) -> Iterator[av.VideoFrame]:
        """Yield the last good frame for one that was to be shown at `ticks`; not `known`: `Gaps` will find it."""
        if self._faults is None:
            raise self.undecodable(error)
        if known:
            self._faults.add(self._path, self.count)
            last = self._last
            if last is not None and (ticks is None or last.pts is None or ticks > last.pts):
                last.pts = ticks
                self.count += 1
                yield last

    def undecodable(self, error: Exception | None) -> UserError:
        """Return the error for a decoder that fails here."""
        reason = getattr(error, "strerror", None) or error
        return UserError(f"{self._path}: cannot be decoded after frame {self.count}: {reason}")


def deinterlaced(frames: Iterator[av.VideoFrame], mode: Deinterlace) -> Iterator[av.VideoFrame]:
    """Yield as many frames, deinterlaced as in `decode`; each depends on itself and its two neighbours only."""
    filtering: Deinterlacer | None = None
    previous = None
    for frame in frames:
        if filtering is not None and not filtering.takes(frame):
            yield from filtering.feed(None)
            filtering = previous = None
        if filtering is None and (mode == "on" or (mode == "auto" and frame.interlaced_frame)):
            filtering = Deinterlacer(frame, mode)
            if previous is not None:
                filtering.prime(previous)
        if filtering is not None:
            yield from filtering.feed(frame)
        else:
            yield frame
            previous = frame
    if filtering is not None:
        yield from filtering.feed(None)


class Deinterlacer:
    """Run FFmpeg's filter bwdif over frames of one size and format; it gives a frame for each, one frame later."""

    def __init__(self, frame: av.VideoFrame, mode: Deinterlace) -> None:
        self._shape = frame.width, frame.height, frame.format.name
        self._times: deque[tuple[int | None, int]] = deque()
        self._dropped = 0
        self._graph = Graph()
        source = self._graph.add(
            "buffer",
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
            f":colorspace={matrix_of(frame)}:range={frame.color_range}",
        )
        deint = "all" if mode == "on" else "interlaced"
        bwdif = self._graph.add("bwdif", f"mode=send_frame:parity=auto:deint={deint}")
        shape = self._graph.add("format", f"pix_fmts={frame.format.name}")
        self._graph.link_nodes(source, bwdif, shape, self._graph.add("buffersink")).configure()

    def takes(self, frame: av.VideoFrame) -> bool:
        """Return whether a frame has the size and format of the first."""
        return (frame.width, frame.height, frame.format.name) == self._shape

    def prime(self, frame: av.VideoFrame) -> None:
        """Show the filter the frame before the first; nothing comes out for it."""
        self._dropped = 1
        self._graph.vpush(frame)

    def feed(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Yield what comes out for a frame, with the times that went in; None: what is left."""
        if frame is not None:
            self._times.append((frame.pts, frame.duration))
        self._graph.vpush(frame)
        while True:
            try:
                result = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            if self._dropped:
                self._dropped = 0
            else:
                result.pts, result.duration = self._times.popleft()
                yield result
