"""Write videos and images; half a video never stands under the name that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from rlv2v.data.video import kind_of, open_video
from rlv2v.errors import UserError, get_logger

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


class VideoWriter:
    """Write uint8 RGB (H,W,3) frames to `path`, which appears only when this context manager ends without an error.

    codec: `h264` plays everywhere (yuv420p, BT.709; odd sizes need yuv444p, which Chromium, VLC and mpv play).
    `vp9` (yuv420p, BT.601 limited range, even sizes only) is what DALI's CPU decoder and NVDEC read.
    `vp9-lossless` gives every RGB value back exactly, with PyAV and with DALI's CPU decoder. Key frames: every 12.
    audio_from: a file whose first audio track is copied along, up to the end of the video; without one, silent.
    Raises `UserError` for a missing folder, `ValueError` for frames of another size or dtype.
    """

    def __init__(
        self, path: Path, fps: Fraction | float, codec: Codec = "h264", audio_from: Path | None = None
    ) -> None:
        if not path.parent.is_dir():
            raise UserError(f"{path}: folder {path.parent} does not exist; create it first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected the name of a video file")
        if path.suffix.lower() not in {".mp4", ".mov", ".mkv"}:
            suffix = path.suffix or "a name without suffix"
            raise UserError(f"{path}: cannot write {suffix}; expected .mp4, .mov or .mkv")
        if not 0 < fps <= 1000:
            raise ValueError(f"VideoWriter: fps must be in (0, 1000], got {fps}")
        self.path, self.fps, self.codec = path, Fraction(fps).limit_denominator(1001 * 60), codec
        self.shape: tuple[int, ...] | None = None
        self.count = 0
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._audio = self._open_audio(audio_from) if audio_from is not None else None
        self._packets: Iterator[Any] = iter(())
        self._next_packet: Any = None
        self._output = av.open(self._partial.resolve().as_posix(), "w")

    def _open_audio(self, source: Path) -> av.container.InputContainer | None:
        """Open a file with an audio track; None where it has none that MP4 can hold."""
        if kind_of(source) != "video":
            return None
        container = open_video(source)
        codec = container.streams.audio[0].codec_context.name if container.streams.audio else None
        if codec in MP4_AUDIO:
            return container
        if codec:
            log.warning("%s: audio codec %s does not fit into MP4; the output is silent", source, codec)
        container.close()
        return None

    def _start(self, height: int, width: int) -> None:
        name = {"h264": "libx264", "vp9": "libvpx-vp9", "vp9-lossless": "libvpx-vp9"}[self.codec]
        stream: Any = self._output.add_stream(name, rate=self.fps)
        context = stream.codec_context
        stream.width, stream.height = width, height
        context.gop_size = 12
        if self.codec == "h264":
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": "16", "preset": "fast"}
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        else:
            stream.pix_fmt = "yuv420p" if self.codec == "vp9" else "gbrp"
            stream.options = VP9_OPTIONS | ({"crf": "16", "b": "0"} if self.codec == "vp9" else {"lossless": "1"})
            context.thread_count = 1
            if self.codec == "vp9":
                context.bit_rate = 0
                context.colorspace, context.color_range = Colorspace.ITU601, ColorRange.MPEG
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
            picture = picture.reformat(
                format=self._stream.pix_fmt, dst_colorspace=matrix, dst_color_range=ColorRange.MPEG
            )
            picture.colorspace, picture.color_range = matrix, ColorRange.MPEG
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self._output.mux(self._stream.encode(picture))
        self.count += 1
        self._copy_audio()

    def _copy_audio(self) -> None:
        """Mux the audio up to the end of the last written frame, so that the file stays interleaved."""
        while (packet := self._next_packet) is not None and packet.dts * packet.time_base < self.count / self.fps:
            packet.stream = self._audio_stream
            self._output.mux(packet)
            self._next_packet = next(self._packets, None)

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self.shape is None:
            self.discard()
            raise ValueError(f"VideoWriter: {self.path} has no frames")
        try:
            self._output.mux(self._stream.encode(None))
            self._output.close()
        except BaseException:
            self.discard()
            raise
        self._close_audio()
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Drop what was written; a file that already had the name stays as it was."""
        self._close_audio()
        with suppress(av.FFmpegError):  # the end of a file that is thrown away, perhaps because the disk is full
            self._output.close()
        self._partial.unlink(missing_ok=True)

    def _close_audio(self) -> None:
        if self._audio is not None:
            self._audio.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_clip(path: Path, frames: np.ndarray, fps: Fraction | float, codec: Codec = "h264") -> None:
    """Write (T,H,W,3) as one video file."""
    with VideoWriter(path, fps, codec) as writer:
        for frame in frames:
            writer.write(frame)
