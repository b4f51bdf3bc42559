"""Write videos; half a video never stands under the name that was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from rlv2v.data.clock import MAX_FPS
from rlv2v.data.containers import CODECS, container_of
from rlv2v.data.packets import PacketLog
from rlv2v.data.tracks import Tracks
from rlv2v.data.yuv import YuvConverter, made_even
from rlv2v.errors import UserError
from rlv2v.files import atomic_file

FINE_TICK, FINEST_TICK, TV_TICK = Fraction(1, 1000), Fraction(1, 1_000_000), Fraction(1, 90_000)


def check_folder(path: Path) -> None:
    """Raise UserError for a file that cannot be written where `path` says."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a video file")


def fine_tick(tick: Fraction) -> Fraction:
    """Return a clock's tick that counts times in `tick` exactly, a millisecond or less.

    It is 1/90000 for what is finer than a microsecond, or would make an MP4 count in less than 1/10000000.
    """
    fine = tick / max(1, -(-tick // FINE_TICK))
    return fine if fine >= FINEST_TICK and fine.denominator <= 10**7 else TV_TICK


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
    keep: a folder in which encoded pictures are kept besides, for another writer to go on from.
    position: what `cut` of that one returned. The file is then the one that it would have written, byte for byte.
    Raises `UserError` as `container_of` and `check_folder` do and for kept pictures that are damaged, `ValueError` for
    frames of another size or dtype.
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
        keep: Path | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self._container = container_of(path)
        check_folder(path)
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"VideoWriter: fps must be in (0, {MAX_FPS}], got {fps}")
        self.path, self.fps = path, Fraction(fps).limit_denominator(1001 * 60)
        self.shape: tuple[int, ...] | None = None
        self.count = position["count"] if position else 0
        self._last = position["last"] if position else -1
        """When the last frame is shown, ticks."""
        self._codec, self._options, self._even, self._aspect = CODECS[codec], options or {}, even, aspect
        self._tick = self._codec.tick or (1 / self.fps if tick is None else fine_tick(tick))
        self._palette = PaletteFilter() if self._codec.form == "pal8" else None
        self._held: Any = None
        """The last frame: how long it is shown is known with the next."""
        self._durations: dict[int, int] = {}
        self._first_dts: int | None = None
        self._last_dts: int | None = None
        self._end = Fraction(0)
        self._files = ExitStack()
        self._tracks = tracks
        if tracks is not None:
            self._files.callback(tracks.close)
        self._log = None
        if keep is not None:
            self._log = PacketLog(keep / "packets", self._tick, position)
            self._files.callback(self._log.close)
        self._output = av.open(self._files.enter_context(atomic_file(path)).resolve().as_posix(), "w")
        self._files.push(self._finish)

    def _start(self, height: int, width: int) -> None:
        """Enter the streams into the file, and the pictures that were kept."""
        stream: Any = self._output.add_stream(self._codec.encoder, rate=self.fps, time_base=self._tick)
        self._stream, self._encoder, self._flags = stream, stream.codec_context, stream.codec_context.flags
        self._size = tuple(side + side % 2 if self._even else side for side in (height, width))
        self._configure(self._encoder)
        form = stream.pix_fmt
        self._yuv = YuvConverter(form, self._codec.matrix) if form.startswith("yuv") else None
        if self._tracks is not None:
            self._tracks.attach(self._output, stream, self._container)
        if self._log is not None:
            with usual_priority(self._codec.encoder):
                for packet in self._log.packets():
                    self._put(packet)

    def _configure(self, context: Any) -> None:
        """Set an encoder up that is not open yet."""
        codec, (height, width) = self._codec, self._size
        context.width, context.height, context.gop_size, context.thread_count = width, height, codec.gop, codec.threads
        context.framerate, context.time_base, context.flags = self.fps, self._tick, self._flags
        odd = codec.encoder in ("libx264", "libx265") and (height % 2 or width % 2)
        context.pix_fmt = "yuv444p" if odd else codec.form
        context.options = {**codec.options, **self._options}
        context.bit_rate = 0
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        if context.pix_fmt.startswith("yuv"):
            context.colorspace, context.color_range = codec.matrix, ColorRange.MPEG
            if codec.matrix == Colorspace.ITU709:
                context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

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
        picture.pts, picture.time_base = self._ticks(time), self._tick
        if self._held is not None:
            self._encode(picture.pts)
        self._held, self._last, self._end = picture, picture.pts, time + (duration or 1 / self.fps)
        self.count += 1

    def _ticks(self, time: Fraction) -> int:
        """Return when a frame is shown that is due at `time` and follows the last one."""
        return max(round(time / self._tick), self._last + 1)

    def cut(self, time: Fraction) -> dict[str, Any]:
        """Bring the frames so far, of which there are some, to the disk in `keep`; return the `position` after them.

        The next frame, shown at `time`, is a key frame of an encoder that knows nothing of those before.
        """
        assert self._log is not None and self._held is not None
        self._encode(self._ticks(time))
        self._held = None
        for packet in self._encoded(None):
            self._mux(packet)
        self._encoder = av.CodecContext.create(self._codec.encoder, "w")
        self._configure(self._encoder)
        return {"count": self.count, "last": self._last, **self._log.flush()}

    def _picture(self, frame: np.ndarray) -> Any:
        """Return a frame in the encoder's format."""
        if self._even:
            frame = made_even(frame)
        if self._yuv is not None:
            return self._yuv(frame)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return picture if self._palette is None else self._palette(picture)

    def _encode(self, end: int) -> None:
        """Encode the frame held, which is shown up to `end` in ticks."""
        assert self._held is not None
        self._durations[self._held.pts] = end - self._held.pts
        for packet in self._encoded(self._held):
            self._mux(packet)

    def _encode_last(self, frame: Any) -> None:
        """Encode the last frame, and let the file end when it does."""
        end = max(round(self._end / self._tick), frame.pts + 1)
        self._durations[frame.pts] = end - frame.pts
        packets: list[Any] = [*self._encoded(frame), *self._encoded(None)]
        for packet in packets[:-1]:
            self._mux(packet)
        for packet in packets[-1:]:
            last = self._durations.pop(packet.pts, packet.duration)
            if self._container.in_decoding_order:
                # players take the length from the times of decoding, or from those of showing: both end with the video
                first = packet.dts if self._first_dts is None else self._first_dts
                packet.dts = max(packet.dts, min(packet.pts, packet.pts + first))
                last = max(1, min(end - (packet.dts - first), end - packet.pts))
            packet.duration = last
            self._put(packet)

    def _encoded(self, frame: Any) -> list[Any]:
        """Return what the encoder gives for a frame (None: the end)."""
        with usual_priority(self._codec.encoder), named(self.path):
            return list(self._encoder.encode(frame))

    def _mux(self, packet: Any) -> None:
        """Write a packet whose duration is known, and keep it."""
        packet.duration = self._durations.pop(packet.pts, packet.duration)
        self._put(packet if self._log is None else self._log.add(packet))

    def _put(self, packet: Any) -> None:
        """Write a packet, after what the other tracks hold before it, so that the file stays interleaved."""
        if self._first_dts is None:
            self._first_dts = packet.dts
        elif self._last_dts is not None and packet.dts <= self._last_dts:
            packet.dts = self._last_dts + 1  # an encoder that starts anew counts back from its first frame
        self._last_dts = packet.dts
        packet.stream = self._stream
        with named(self.path):
            if self._tracks is not None:
                self._tracks.write_until(packet.dts * self._tick)
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
                with named(self.path):
                    if self._tracks is not None:
                        self._tracks.finish(self._end)
                    self._output.close()
        finally:
            with suppress(av.FFmpegError):  # the end of a file that is thrown away, perhaps because the disk is full
                self._output.close()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise `UserError` for what the container refuses to hold, such as a pixel aspect or times that are out of range.

    What the disk refuses stays an `OSError`.
    """
    try:
        yield
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        reason = f"{(error.strerror or '').lower()}; its times or its shape are out of range"
        raise UserError(f"{path}: this kind of file cannot hold the video: {reason}") from None


@contextmanager
def usual_priority(encoder: str) -> Iterator[None]:
    """Undo what SVT-AV1 does to the thread that opens it: if root runs it, it is real-time, which starves others."""
    if encoder != "libsvtav1" or not hasattr(os, "sched_getscheduler"):
        yield
        return
    usual = os.sched_getscheduler(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != usual:
            os.sched_setscheduler(0, usual, os.sched_param(0))


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
