"""Write videos and images; half a video never stands under the name that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from rlv2v.data.video import kind_of, open_video
from rlv2v.errors import UserError, get_logger
from rlv2v.files import atomic_file

SUFFIXES = (".mp4", ".mov", ".mkv")
MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"}
Codec = Literal["h264", "vp9", "vp9-lossless"]
VP9_OPTIONS = {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0", "auto-alt-ref": "0"}
log = get_logger(__name__)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 RGB (H,W,3) in the format of the suffix, in place; lossless for `.png`."""
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"write_image: {path.suffix} cannot be encoded")
    path.write_bytes(encoded.tobytes())


def check_output(path: Path) -> None:
    """Raise UserError for a path that no `VideoWriter` can write to."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected the suffix {', '.join(SUFFIXES)}, got {path.suffix or 'none'}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a video file")


class VideoWriter:
    """Write uint8 RGB (H,W,3) frames to `path`, which appears only when this context manager ends without an error.

    codec: `h264` plays everywhere (yuv420p, BT.709; odd sizes need yuv444p, which Chromium, VLC and mpv play).
    `vp9` (yuv420p, BT.601 limited range, even sizes only) is what DALI's CPU decoder and NVDEC read.
    `vp9-lossless` gives every RGB value back exactly, with PyAV and with DALI's CPU decoder. Key frames: every 12.
    options: of libx264, on top of crf 16 and the preset fast.
    audio_from: a file whose first audio track is copied along, up to the end of the video; without one, silent.
    Raises `UserError` as `check_output` does, `ValueError` for frames of another size or dtype.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction | float,
        codec: Codec = "h264",
        audio_from: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        check_output(path)
        if not 0 < fps <= 1000:
            raise ValueError(f"VideoWriter: fps must be in (0, 1000], got {fps}")
        self.path, self.fps, self.codec = path, Fraction(fps).limit_denominator(1001 * 60), codec
        self.shape: tuple[int, ...] | None = None
        self.count = 0
        self._options = options or {}
        self._files = ExitStack()
        self._audio = self._open_audio(audio_from) if audio_from is not None else None
        self._packets: Iterator[Any] = iter(())
        self._next_packet: Any = None
        self._output = av.open(self._files.enter_context(atomic_file(path)).resolve().as_posix(), "w")
        self._files.push(self._finish)

    def _open_audio(self, source: Path) -> av.container.InputContainer | None:
        """Open a file with an audio track; None where it has none that MP4 can hold."""
        if kind_of(source) != "video":
            return None
        container = open_video(source)
        codec = container.streams.audio[0].codec_context.name if container.streams.audio else None
        if codec in MP4_AUDIO:
            return self._files.enter_context(container)
        if codec:
            log.warning("%s: audio codec %s does not fit into MP4; the output is silent", source, codec)
        container.close()
        return None

    def _start(self, height: int, width: int) -> None:
        stream: Any = self._output.add_stream("libx264" if self.codec == "h264" else "libvpx-vp9", rate=self.fps)
        context = stream.codec_context
        stream.width, stream.height, context.gop_size = width, height, 12
        if self.codec == "h264":
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": "16", "preset": "fast", **self._options}
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        elif self.codec == "vp9":
            stream.pix_fmt, stream.options = "yuv420p", VP9_OPTIONS | {"crf": "16", "b": "0"}
            context.thread_count, context.bit_rate = 1, 0
            context.colorspace, context.color_range = Colorspace.ITU601, ColorRange.MPEG
        else:
            stream.pix_fmt, stream.options, context.thread_count = "gbrp", VP9_OPTIONS | {"lossless": "1"}, 1
        self._stream = stream
        if self._audio is not None:
            track = self._audio.streams.audio[0]
            self._audio_stream = self._output.add_stream_from_template(track)
            self._packets = (packet for packet in self._audio.demux(track) if packet.dts is not None)
            self._next_packet = next(self._packets, None)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame; the first one fixes the size."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"VideoWriter: frame must be uint8 (H,W,3), got {frame.dtype} {frame.shape}")
        if self.shape is None:
            self._start(*frame.shape[:2])
            self.shape = frame.shape
        if frame.shape != self.shape:
            raise ValueError(f"VideoWriter: frame {self.count} must be {self.shape}, got {frame.shape}")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self.codec != "vp9-lossless":
            matrix = Colorspace.ITU709 if self.codec == "h264" else Colorspace.ITU601
            form, limited = self._stream.pix_fmt, ColorRange.MPEG
            picture = picture.reformat(format=form, dst_colorspace=matrix, dst_color_range=limited)
            picture.colorspace, picture.color_range = matrix, limited
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self._output.mux(self._stream.encode(picture))
        self.count += 1
        # the audio up to the end of this frame, so that the file stays interleaved
        while (packet := self._next_packet) is not None and packet.dts * packet.time_base < self.count / self.fps:
            packet.stream = self._audio_stream
            self._output.mux(packet)
            self._next_packet = next(self._packets, None)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        """Finish the file and give it its name; after an error, drop it: a file that had the name stays as it was."""
        self._files.__exit__(*failure)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self.shape is None:
                    raise ValueError(f"VideoWriter: {self.path} has no frames")
                self._output.mux(self._stream.encode(None))
                self._output.close()
        finally:
            with suppress(av.FFmpegError):  # the end of a file that is thrown away, perhaps because the disk is full
                self._output.close()


def write_clip(path: Path, frames: np.ndarray, fps: Fraction | float, codec: Codec = "h264") -> None:
    """Write (T,H,W,3) as one video file."""
    with VideoWriter(path, fps, codec) as writer:
        for frame in frames:
            writer.write(frame)
