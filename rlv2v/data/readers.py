"""Reading frames `start .. start+num` of a source: DALI's CPU decoder for VP9 clips, PyAV for everything else.

Both give uint8 RGB (num,H,W,3). Raw `.npy` sources are sliced from a memory map, which copies only the asked bytes
(0.16 ms a 16-frame 64x150 clip, where DALI's `readers.numpy` takes 1.1 ms). Which reader serves a source depends on the
source alone, never on the draw, so that the same draw gives the same bits with and without a cache.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import av
import numpy as np

from rlv2v.data import video
from rlv2v.data.index import Source
from rlv2v.data.video import one_line
from rlv2v.errors import UserError

DALI_MAX_FRAMES = 64
"""DALI's decoder takes a file as bytes and decodes from frame 0: longer videos are left to PyAV, which seeks."""
log = logging.getLogger(__name__)


class Reader(Protocol):
    """Frames `start .. start+num` of a source as uint8 (num,H,W,3); `UserError` names a file that cannot be read."""

    def read(self, source: Source, start: int, num: int) -> np.ndarray: ...


def whole(source: Source, start: int, num: int, frames: np.ndarray) -> np.ndarray:
    """`frames` if they are what the index promised."""
    expected = (num, source.height, source.width, 3)
    if frames.shape != expected:
        raise UserError(
            f"{one_line(source.path)}: expected {expected} from frame {start} on, got {frames.shape}; "
            "the file changed while in use: start again to index it anew"
        )
    return frames


class PyAVReader:
    """Every kind of source. In a video it seeks the key frame before `start`, by the times of the file's packets."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[list[int], list[int]] | None] = {}

    def read(self, source: Source, start: int, num: int) -> np.ndarray:
        if source.kind == "raw":
            frames: np.ndarray = np.array(video.open_raw(source.path)[start : start + num])
        elif source.kind == "frames":
            shape = (source.height, source.width, 3)
            images = map(video.read_image, video.images_in(source.path)[start : start + num])
            frames = stack(i if i.shape == shape else video.resize(i, source.width, source.height) for i in images)
        elif source.kind == "video" and start > 0:
            frames = self._seek(source, start, num)
        else:
            frames = stack(video.read_frames(source.path, start=start, num=num))
        return whole(source, start, num, frames)

    def _seek(self, source: Source, start: int, num: int) -> np.ndarray:
        """Decode from the last key frame shown at or before `start`; from frame 0 where times cannot be trusted."""
        key = str(source.path)
        if key not in self._times:
            self._times[key] = packet_times(source)
        times = self._times[key]
        if times is not None:
            shown, keys = times
            at = max((k for k in keys if k <= shown[start]), default=None)
            frames = decode_from(source, at, shown[start : start + num]) if at is not None else None
            if frames is not None:
                return frames
        return stack(video.read_frames(source.path, start=start, num=num))


def stack(frames: Iterable[np.ndarray]) -> np.ndarray:
    """(T,H,W,3) of frames (H,W,3); shape (0,) of none."""
    found = list(frames)
    return np.stack(found) if found else np.empty(0, np.uint8)


def packet_times(source: Source) -> tuple[list[int], list[int]] | None:
    """Presentation times of all frames and of the key frames, ascending; None where they do not number the frames."""
    with video.open_video(source.path) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    shown = sorted(p.pts for p in packets if p.pts is not None)
    if len(shown) != source.num_frames or len(set(shown)) != len(packets):
        return None
    return shown, sorted(p.pts for p in packets if p.is_keyframe)


def decode_from(source: Source, at: int, wanted: list[int]) -> np.ndarray | None:
    """The frames shown at the times `wanted`, decoded from key frame `at`; None if the seek landed behind it."""
    frames: list[np.ndarray] = []
    with video.open_video(source.path) as container:
        stream = container.streams.video[0]
        size = (stream.codec_context.width, stream.codec_context.height)
        try:
            container.seek(at, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or (not frames and frame.pts > wanted[0]) or frame.is_corrupt:
                    return None
                if frame.pts == wanted[len(frames)]:
                    frames.append(video.upright(frame, *size))
                if len(frames) == len(wanted):
                    return np.stack(frames)
        except av.FFmpegError:
            return None  # the sequential read that follows names the fault
    return None


class DaliReader:
    """DALI's CPU video decoder on the bytes of one file. Not for two threads at once: one reader a thread."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def read(self, source: Source, start: int, num: int) -> np.ndarray:
        try:
            encoded = np.fromfile(source.path, np.uint8)
            if self._pipeline is None:
                self._pipeline = dali_pipeline()
            self._pipeline.feed_input("encoded", [encoded])
            self._pipeline.feed_input("start", [np.array(start, np.int32)])
            self._pipeline.feed_input("num", [np.array(num, np.int32)])
            frames: np.ndarray = np.array(self._pipeline.run()[0].at(0))
        except (OSError, RuntimeError) as error:
            self._pipeline = None  # an error in a DALI pipeline is sticky: the next read builds a new one
            raise UserError(f"{one_line(source.path)}: cannot be decoded by DALI: {one_line(error)[:300]}") from error
        return whole(source, start, num, frames)


def dali_pipeline() -> Any:
    """encoded bytes, start, num -> frames start .. start+num, on the CPU, one file a run."""
    from nvidia.dali import fn, pipeline, types

    new_graph: Any = pipeline.Pipeline
    graph = new_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=0)
        num = fn.external_source(name="num", dtype=types.DALIDataType.INT32, ndim=0)
        frames = fn.decoders.video(encoded, device="cpu", start_frame=start, sequence_length=num, pad_mode="none")
        graph.set_outputs(frames)
    graph.build()
    return graph


class AutoReader:
    """DALI for what it decodes like PyAV does, PyAV for the rest. `dali=False` leaves all to PyAV."""

    def __init__(self, *, dali: bool) -> None:
        self._pyav = PyAVReader()
        self._dali = DaliReader() if dali else None

    def read(self, source: Source, start: int, num: int) -> np.ndarray:
        if self._dali is not None and source.dali and source.num_frames <= DALI_MAX_FRAMES:
            return self._dali.read(source, start, num)
        return self._pyav.read(source, start, num)


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


_logged = itertools.count()


def open_reader(backend: Literal["auto", "dali", "pyav"]) -> AutoReader:
    """The reader for `backend`; `dali` where DALI is missing raises, `auto` falls back to PyAV and says so once."""
    if backend not in ("auto", "dali", "pyav"):
        raise UserError(f"backend: expected auto, dali or pyav, got {backend}")
    found = backend != "pyav" and has_dali()
    if backend == "dali" and not found:
        raise UserError("backend dali: DALI is not installed; install nvidia-dali-cuda130 or use backend auto")
    if backend == "auto" and not found and next(_logged) == 0:
        log.info("DALI is not installed: every video is decoded by PyAV")
    return AutoReader(dali=found)
