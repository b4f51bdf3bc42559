"""Frames in, frames out: one reader for every kind of source, one writer that never leaves half a file.

A source is a video file that PyAV reads, a folder of numbered images, a raw `.npy` of uint8 (T,H,W,3), or one image.
Frames are uint8 RGB (H,W,3), upright (rotation metadata and EXIF are applied); a stream that changes size on the way
is scaled to the size of its first frame. Colours follow the file's tags, BT.601 where it has none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from rlv2v.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
MP4_AUDIO = {"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"}
Kind = Literal["video", "frames", "raw", "image"]
Codec = Literal["h264", "vp9", "vp9-lossless"]
log = logging.getLogger(__name__)


def one_line(text: object) -> str:
    """`text` on one line, so that a file name with a newline cannot break a message."""
    return str(text).replace("\n", "\\n").replace("\r", "\\r")


def kind_of(path: Path) -> Kind:
    """What `path` is read as, by its name alone: a folder is `frames`, `.npy` is `raw`, else `image` or `video`."""
    if path.is_dir():
        return "frames"
    suffix = path.suffix.lower()
    return "raw" if suffix == ".npy" else "image" if suffix in IMAGE_SUFFIXES else "video"


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which frame2 comes before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts if part]


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in natural order, hidden files left out."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(found, key=natural_key)


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 RGB (H,W,3), upright by its EXIF tag; transparency is dropped."""
    try:
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    except (OSError, cv2.error) as error:
        raise UserError(f"{one_line(path)}: cannot be read as an image: {one_line(error)}") from error
    if image is None:
        raise UserError(f"{one_line(path)}: cannot be read as an image; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    rgb: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 RGB (H,W,3) as the format of the suffix; lossless for `.png`."""
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"write_image: {path.suffix} cannot be encoded")
    path.write_bytes(encoded.tobytes())


def open_raw(path: Path) -> np.ndarray:
    """A raw clip as a read-only memory map, uint8 (T,H,W,3)."""
    try:
        frames: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{one_line(path)}: cannot be read as .npy: {one_line(error)}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(f"{one_line(path)}: expected uint8 (T,H,W,3), got {frames.dtype} {frames.shape}")
    return frames


def open_video(path: Path) -> av.container.InputContainer:
    """Open with PyAV and make sure that there is a video stream; the caller closes it."""
    try:
        container = av.open(path.as_posix() if path.is_absolute() else f"./{path.as_posix()}")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"{one_line(path)}: cannot be opened as a video: {reason}") from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{one_line(path)}: no video stream; expected a file with pictures")
    return container


def upright(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """A decoded frame as RGB, scaled to `width` x `height` (as coded), then turned by its display matrix."""
    rgb = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def decode(path: Path) -> Iterator[np.ndarray]:
    """All frames of a video file in display order; stops at the first damaged one with a `UserError` naming it."""
    count, size = 0, None
    with open_video(path) as container:
        stream = container.streams.video[0]
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise UserError(f"{one_line(path)}: frame {count} is damaged")
                size = size or (frame.width, frame.height)
                yield upright(frame, *size)
                count += 1
        except (av.FFmpegError, OSError) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            raise UserError(f"{one_line(path)}: cannot be decoded after frame {count}: {reason}") from error


def all_frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a source of any kind, in order."""
    kind = kind_of(path)
    if kind == "video":
        yield from decode(path)
    elif kind == "raw":
        yield from open_raw(path)
    else:
        images = images_in(path) if kind == "frames" else [path]
        if not images:
            raise UserError(f"{one_line(path)}: a folder without images; expected numbered frames")
        first = read_image(images[0])
        yield first
        for other in images[1:]:
            image = read_image(other)
            yield image if image.shape == first.shape else resize(image, first.shape[1], first.shape[0])


def read_frames(path: Path, *, start: int = 0, num: int | None = None) -> Iterator[np.ndarray]:
    """Frames `start .. start+num` (`num=None`: to the end) of any source, uint8 RGB (H,W,3), one at a time.

    Sequential: a video is decoded from its beginning (`rlv2v.data.pipeline` seeks). Fewer frames than asked for are
    given where the source ends. Raises `UserError` naming the file when it cannot be opened or decoded.
    """
    if not path.exists():
        raise UserError(f"{one_line(path)}: no such file or folder")
    yield from islice(all_frames(path), start, None if num is None else start + num)


@dataclass(frozen=True)
class Probe:
    """What a source says of itself before it is decoded; `num_frames` is None where the container does not say."""

    kind: Kind
    codec: str
    width: int
    """Of the upright frame, pixels."""
    height: int
    fps: Fraction
    """Frames a second; 25 where the source has no clock (folders, raw, images)."""
    num_frames: int | None
    has_audio: bool


def probe(path: Path) -> Probe:
    """Open a source, read its first frame and describe it."""
    kind = kind_of(path)
    first = next(read_frames(path, num=1), None)
    if first is None:
        raise UserError(f"{one_line(path)}: no frame can be decoded")
    height, width = first.shape[:2]
    if kind != "video":
        count = len(open_raw(path)) if kind == "raw" else len(images_in(path)) if kind == "frames" else 1
        suffix = images_in(path)[0].suffix if kind == "frames" else path.suffix
        return Probe(kind, suffix.lstrip(".").lower(), width, height, Fraction(25), count, has_audio=False)
    with open_video(path) as container:
        stream = container.streams.video[0]
        fps = stream.average_rate or stream.guessed_rate or Fraction(25)
        name = stream.codec_context.codec.canonical_name
        return Probe(kind, name, width, height, Fraction(fps), stream.frames or None, bool(container.streams.audio))


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale (H,W,3) to exactly `width` x `height`: area average when it shrinks, bilinear when it grows."""
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, (width, height), interpolation=method)
    return scaled


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) scaled so that the short side is `size`, aspect kept."""
    short = min(width, height)
    return max(size, round(width * size / short)), max(size, round(height * size / short))


def fit(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize (T,H,W,3) so that the short side is `size`."""
    height, width = frames.shape[1:3]
    if min(height, width) == size:
        return np.ascontiguousarray(frames)
    target = fit_size(width, height, size)
    return np.stack([resize(frame, *target) for frame in frames])


def centre_crop(frames: np.ndarray, size: int) -> np.ndarray:
    """The middle `size` x `size` of (T,H,W,3)."""
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


class VideoWriter:
    """Write uint8 RGB (H,W,3) frames to `path`; a context manager, `path` appears only when it closes without error.

    codec: `h264` plays everywhere (yuv420p, BT.709; odd sizes need yuv444p, which Chromium, VLC and mpv play).
    `vp9` (yuv420p, BT.601 limited range, even sizes only) is what DALI's CPU decoder and NVDEC read.
    `vp9-lossless` gives every RGB value back exactly, with PyAV and with DALI's CPU decoder. Key frames: every 12.
    audio_from: a file whose first audio track is copied along, up to the end of the video; without one, silent.
    Raises `UserError` for a missing folder, `ValueError` for frames of another size or dtype.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction | float,
        codec: Codec = "h264",
        audio_from: Path | None = None,
    ) -> None:
        if not path.parent.is_dir():
            raise UserError(f"{one_line(path)}: folder {one_line(path.parent)} does not exist; create it first")
        if path.is_dir():
            raise UserError(f"{one_line(path)}: is a folder; expected the name of a video file")
        if path.suffix.lower() not in {".mp4", ".mov", ".mkv"}:
            raise UserError(
                f"{one_line(path)}: cannot write {path.suffix or 'a name without suffix'}; expected .mp4, .mov or .mkv"
            )
        if not 0 < fps <= 1000:
            raise ValueError(f"VideoWriter: fps must be in (0, 1000], got {fps}")
        self.path, self.fps, self.codec = path, Fraction(fps).limit_denominator(1001 * 60), codec
        self.shape: tuple[int, ...] | None = None
        self.count = 0
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._audio = self._open_audio(audio_from) if audio_from is not None else None
        self._output = av.open(self._partial.resolve().as_posix(), "w")

    def _open_audio(self, source: Path) -> tuple[av.container.InputContainer, Iterator[Any]] | None:
        """The packets of the first audio track of `source`, or None where there is none that MP4 can hold."""
        if kind_of(source) != "video":
            return None
        container = open_video(source)
        codec = container.streams.audio[0].codec_context.name if container.streams.audio else None
        if codec not in MP4_AUDIO:
            if codec:
                log.warning("%s: audio codec %s does not fit into MP4; the output is silent", source, codec)
            container.close()
            return None
        return container, (p for p in container.demux(container.streams.audio[0]) if p.dts is not None)

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
            stream.options = {
                **({"crf": "16", "b": "0"} if self.codec == "vp9" else {"lossless": "1"}),
                "cpu-used": "8",
                "deadline": "realtime",
                "lag-in-frames": "0",
                "auto-alt-ref": "0",
            }
            context.thread_count = 1
            if self.codec == "vp9":
                context.bit_rate = 0
                context.colorspace, context.color_range = Colorspace.ITU601, ColorRange.MPEG
        self._stream = stream
        self._audio_out = None
        if self._audio is not None:
            self._audio_out = self._output.add_stream_from_template(self._audio[0].streams.audio[0])
            self._audio_next = next(self._audio[1], None)

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
        while self._audio_out is not None and self._audio_next is not None:
            packet = self._audio_next
            if packet.dts * packet.time_base >= self.count / self.fps:
                return
            packet.stream = self._audio_out
            self._output.mux(packet)
            self._audio_next = next(self._audio[1], None) if self._audio else None

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
            self._audio[0].close()

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
