"""Write videos; half a video never stands under the name that was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from rlv2v.data.clock import MAX_FPS
from rlv2v.data.containers import CODECS, container_of
from rlv2v.data.tracks import Tracks
from rlv2v.data.yuv import YuvConverter, made_even
from rlv2v.errors import UserError
from rlv2v.files import atomic_file

FINE_TICK, FINEST_TICK = Fraction(1, 1000), Fraction(1, 1_000_000)


def check_folder(path: Path) -> None:
    """Raise UserError for a file that cannot be written where `path` says."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a video file")


def fine_tick(tick: Fraction) -> Fraction:
    """Return a clock's tick that counts times in `tick` exactly, a millisecond or less; 1/90000 for what is finer."""
    if tick < FINEST_TICK:
        return Fraction(1, 90_000)
    return tick / max(1, -(-tick // FINE_TICK))


class VideoWriter:
    """Write uint8 RGB (H,W,3) frames to `path`, which appears only when this context manager ends without an error.

    fps: frames a second; what `write` is not told about times follows from it.
    codec: a key of `CODECS`. `h264` plays everywhere; its odd sizes need yuv444p, which Chromium, VLC and mpv play,
    unless `even` repeats the last row or column. `vp9-601` (even sizes only) is what DALI's CPU decoder and NVDEC read.
    `vp9-lossless` gives every RGB value back exactly, with PyAV and with DALI's CPU decoder.
    options: of the encoder, on top of the codec's.
    tick: seconds of which the times given to `write` are multiples; None: 1 / fps.
    aspect: how many times as wide as high the pixels are.
    tracks: what to carry along, up to the end of the video.
    Raises `UserError` as `container_of` and `check_folder` do, `ValueError` for frames of another size or dtype.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction | float,
        codec: str = "h264",
        *,
        options: Mapping[str, str] | None = None,
        even: bool = False,
        tick: Fraction | None = None,
        aspect: Fraction = Fraction(1),
        tracks: Tracks | None = None,
    ) -> None:
        self._container = container_of(path)
        check_folder(path)
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"VideoWriter: fps must be in (0, {MAX_FPS}], got {fps}")
        self.path, self.fps = path, Fraction(fps).limit_denominator(1001 * 60)
        self.shape: tuple[int, ...] | None = None
        self.count = 0
        self._codec, self._options, self._even, self._aspect = CODECS[codec], options or {}, even, aspect
        self._tick = self._codec.tick or (1 / self.fps if tick is None else fine_tick(tick))
        self._palette = PaletteFilter() if self._codec.form == "pal8" else None
        self._held: Any = None
        """The last frame: how long it is shown is known with the next."""
        self._durations: dict[int, int] = {}
        self._first_dts: int | None = None
        self._end = Fraction(0)
        self._files = ExitStack()
        self._tracks = tracks
        if tracks is not None:
            self._files.callback(tracks.close)
        self._output = av.open(self._files.enter_context(atomic_file(path)).resolve().as_posix(), "w")
        self._files.push(self._finish)

    def _start(self, height: int, width: int) -> None:
        codec = self._codec
        stream: Any = self._output.add_stream(codec.encoder, rate=self.fps, time_base=self._tick)
        context = stream.codec_context
        height, width = (side + side % 2 if self._even else side for side in (height, width))
        stream.width, stream.height, context.gop_size, context.thread_count = width, height, codec.gop, codec.threads
        odd = codec.encoder in ("libx264", "libx265") and (height % 2 or width % 2)
        stream.pix_fmt = "yuv444p" if odd else codec.form
        stream.options = {**codec.options, **self._options}
        context.bit_rate = 0
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        self._yuv = YuvConverter(stream.pix_fmt, codec.matrix) if stream.pix_fmt.startswith("yuv") else None
        if self._yuv is not None:
            context.colorspace, context.color_range = codec.matrix, ColorRange.MPEG
            if codec.matrix == Colorspace.ITU709:
                context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._stream = stream
        if self._tracks is not None:
            self._tracks.attach(self._output, stream, self._container)

    def write(self, frame: np.ndarray, time: Fraction | None = None, duration: Fraction | None = None) -> None:
        """Append one frame; the first one fixes the size.

        time: seconds from the first frame at which it is shown; None: a frame's step after the last.
        duration: seconds that it is shown if it is the last one; None: a frame's step.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"VideoWriter: frame must be uint8 (H,W,3), got {frame.dtype} {frame.shape}")
        if self.shape is None:
            self._start(*frame.shape[:2])
            self.shape = frame.shape
        if frame.shape != self.shape:
            raise ValueError(f"VideoWriter: frame {self.count} must be {self.shape}, got {frame.shape}")
        time = self._end if time is None else time
        picture = self._picture(frame)
        picture.pts, picture.time_base = round(time / self._tick), self._tick
        if self._held is not None:
            picture.pts = max(picture.pts, self._held.pts + 1)
            self._encode(picture.pts)
        self._held, self._end = picture, time + (duration or 1 / self.fps)
        self.count += 1

    def _picture(self, frame: np.ndarray) -> Any:
        """Return a frame in the encoder's format."""
        if self._even:
            frame = made_even(frame)
        if self._yuv is not None:
            return self._yuv(frame)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return picture if self._palette is None else self._palette(picture)

    def _encode(self, end: int) -> None:
        """Encode the frame held, which is shown up to `end` in ticks, and the other tracks up to there."""
        assert self._held is not None
        self._durations[self._held.pts] = end - self._held.pts
        self._mux(self._encoded(self._held))
        if self._tracks is not None:
            self._tracks.write_until(end * self._tick)

    def _encode_last(self, frame: Any) -> None:
        """Encode the last frame, and let the file end when it does."""
        end = max(round(self._end / self._tick), frame.pts + 1)
        self._durations[frame.pts] = end - frame.pts
        packets: list[Any] = [*self._encoded(frame), *self._encoded(None)]
        self._mux(packets[:-1])
        for packet in packets[-1:]:
            last = self._durations.pop(packet.pts, packet.duration)
            if self._container.in_decoding_order:
                # players take the length from the times of decoding, or from those of showing: both end with the video
                first = packet.dts if self._first_dts is None else self._first_dts
                packet.dts = max(packet.dts, min(packet.pts, packet.pts + first))
                last = max(1, min(end - (packet.dts - first), end - packet.pts))
            packet.duration = last
            self._output.mux(packet)

    def _encoded(self, frame: Any) -> list[Any]:
        """Return what the encoder gives for a frame (None: the end).

        SVT-AV1 makes the thread that calls it real-time if root runs it, which starves others; that is undone.
        """
        if self._codec.encoder != "libsvtav1" or not hasattr(os, "sched_getscheduler"):
            return list(self._stream.encode(frame))
        usual = os.sched_getscheduler(0)
        try:
            return list(self._stream.encode(frame))
        finally:
            if os.sched_getscheduler(0) != usual:
                os.sched_setscheduler(0, usual, os.sched_param(0))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if self._first_dts is None:
                self._first_dts = packet.dts
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._output.mux(packet)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        """Finish the file and give it its name; after an error, drop it: a file that had the name stays as it was."""
        self._files.__exit__(*failure)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._held is None:
                    raise ValueError(f"VideoWriter: {self.path} has no frames")
                self._encode_last(self._held)
                if self._tracks is not None:
                    self._tracks.finish(self._end)
                self._output.close()
        finally:
            with suppress(av.FFmpegError):  # the end of a file that is thrown away, perhaps because the disk is full
                self._output.close()


class PaletteFilter:
    """Bring each frame to the 256 colours that suit it best, by FFmpeg's filters."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._count = 0

    def __call__(self, frame: av.VideoFrame) -> Any:
        """Return an RGB frame with a palette of its own (pal8)."""
        if self._graph is None:
            graph = self._graph = Graph()
            size = f"video_size={frame.width}x{frame.height}:pix_fmt=rgb24:time_base=1/100"
            source, split = graph.add("buffer", size), graph.add("split")
            palette, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1:dither=none")
            graph.link_nodes(source, split)
            split.link_to(use, 0, 0)
            split.link_to(palette, 1, 0)
            palette.link_to(use, 0, 1)
            graph.link_nodes(use, graph.add("buffersink")).configure()
        frame.pts, self._count = self._count, self._count + 1
        self._graph.vpush(frame)
        return self._graph.vpull()


def write_clip(path: Path, frames: np.ndarray, fps: Fraction | float, codec: str = "h264") -> None:
    """Write (T,H,W,3) as one video file."""
    with VideoWriter(path, fps, codec) as writer:
        for frame in frames:
            writer.write(frame)
