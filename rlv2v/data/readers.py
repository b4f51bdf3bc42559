"""Read frames `start .. start+num` of a source in any order, scaled while they are read.

A video is decoded from the key frame before `start`, found by the times of the file's packets. The file stays open from
clip to clip, each wanted frame is scaled and converted in one pass from the decoder's own memory, and frames before
`start` to which no other refers are not decoded. Where the times do not number the frames, it is read from its start.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from rlv2v.data import video
from rlv2v.data.clock import Timeline
from rlv2v.data.decoding import decoder_of, deinterlaced, open_video, stream_of
from rlv2v.data.images import read_image
from rlv2v.data.inspect import Source
from rlv2v.data.scaling import resize
from rlv2v.data.upright import Upright
from rlv2v.errors import UserError

Size = tuple[int, int]
"""Width and height, pixels."""
Times = tuple[np.ndarray, np.ndarray]
"""The times at which frames are shown, in the stream's ticks, ascending: of all frames, and of the key frames."""
MAX_OPEN_FILES = 32
MAX_OPEN_PIXELS = 4 * 1920 * 1080
"""Videos stay open while they are few and their frames small: a decoder holds up to 17 of them."""
MAX_OPEN_FRAMES = 200_000
"""And while they are not long, two hours in all: FFmpeg's table of an open file takes 30 to 60 bytes a frame."""
OPENER = ThreadPoolExecutor(1, thread_name_prefix="rlv2v-opener")
"""The thread that opens videos: FFmpeg builds its table of a long one there, and what that takes meanwhile is used
again for the next, while each thread that allocates keeps memory of its own."""
SKIPPABLE = {"h264", "hevc"}
"""Codecs of which a decoder can leave out the frames that no other refers to."""


def packet_times(source: Source) -> Times | None:
    """Return the times of the frames that the index counts; None where the file's packets do not number them."""
    shown, keys = array("q"), array("q")
    num = 0
    with OPENER.submit(open_video, source.path).result() as container:
        stream = stream_of(container)
        timeline = Timeline(container, stream)
        try:
            for packet in container.demux(stream):
                timeline.part_of(packet)
                if not packet.size:
                    continue
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(packet.pts)
                if packet.is_discard:  # by the edit list of a trimmed file: decoded, not shown
                    continue
                num += 1
                if packet.pts is not None:
                    shown.append(packet.pts)
        except av.FFmpegError:
            return None  # the sequential read that follows names the fault
    enough = len(shown) >= source.num_frames if source.status == "truncated" else len(shown) == source.num_frames
    times = np.sort(np.asarray(shown, np.int64))
    if not enough or len(times) != num or (np.diff(times) == 0).any() or timeline.num_parts > 1:
        return None
    return times[: source.num_frames].copy(), np.sort(np.asarray(keys, np.int64))


class PacketTimes:
    """Hold the packet times of the videos of a set for all threads, so that each file's packets are read once.

    They take 8 bytes a frame, and 8 a key frame.
    """

    def __init__(self) -> None:
        self._times: dict[Path, Times | None] = {}
        self._lock = threading.Lock()
        self._reading: dict[Path, threading.Lock] = {}

    def of(self, source: Source) -> Times | None:
        """Return what `packet_times` does; a thread that needs them while another reads them waits for it."""
        path = source.path
        with self._lock:
            if path in self._times:
                return self._times[path]
            lock = self._reading.setdefault(path, threading.Lock())
        with lock:
            if path not in self._times:
                self._times[path] = packet_times(source)
        with self._lock:
            self._reading.pop(path, None)
            return self._times[path]


class OpenVideo:
    """Decode a video file that stays open, in one thread."""

    def __init__(self, source: Source, times: Times, size: Size) -> None:
        self.size, self.pixels, self.num_frames = size, source.width * source.height, source.num_frames
        self._times, self._upright, self._interlaced = times, Upright(size), source.interlaced
        self._skips = source.codec in SKIPPABLE and not source.interlaced
        self.container = OPENER.submit(open_video, source.path).result()
        self._stream = stream_of(self.container)
        self._decoder = decoder_of(self._stream)
        self._decoder.thread_count = 1

    def read(self, start: int, num: int) -> np.ndarray | None:
        """Return frames `start .. start+num`, uint8 (num,H,W,3); None where the file no longer holds exactly them."""
        shown, keys = self._times
        more = int(self._interlaced)  # a deinterlaced frame depends on its neighbours
        window = shown[max(0, start - more) : start + num + more].tolist()
        wanted = shown[start : start + num].tolist()
        key = int(np.searchsorted(keys, window[0], "right")) - 1
        if key < 0:
            return None
        clip, count = np.empty((num, self.size[1], self.size[0], 3), np.uint8), 0
        with suppress(av.FFmpegError):  # here too
            frames = self._pictures(int(keys[key]), window)
            for frame in deinterlaced(frames, "auto") if self._interlaced else frames:
                if frame.pts == wanted[count]:
                    clip[count] = self._upright(frame)
                    count += 1
                    if count == num:
                        return clip
        return None

    def _pictures(self, key: int, window: list[int]) -> Iterator[av.VideoFrame]:
        """Yield the frames shown at the times of `window`, from the key frame shown at `key` on; fewer at a fault."""
        count = 0
        self.container.seek(key, stream=self._stream)
        self._decoder.flush_buffers()
        for packet in self.container.demux(self._stream):
            if self._skips:
                first = packet.pts is not None and packet.pts < window[0]  # of these only those to which others refer
                self._decoder.skip_frame = "NONREF" if first else "DEFAULT"
            for frame in self._decoder.decode(packet if packet.size else None):
                if frame.pts is None or frame.is_corrupt or frame.pts > window[count]:
                    return
                if frame.pts == window[count]:
                    yield frame
                    count += 1
                    if count == len(window):
                        return


def is_too_much(videos: Sequence[OpenVideo]) -> bool:
    """Return whether fewer of these should stay open."""
    pixels, frames = sum(v.pixels for v in videos), sum(v.num_frames for v in videos)
    return len(videos) > MAX_OPEN_FILES or pixels > MAX_OPEN_PIXELS or frames > MAX_OPEN_FRAMES


class FrameReader:
    """Read any source, and leave videos open. Not for two threads at once: one reader a thread.

    times: the videos' packet times, which the readers of several threads share.
    """

    def __init__(self, times: PacketTimes | None = None) -> None:
        self._times = times or PacketTimes()
        self._videos: OrderedDict[Path, OpenVideo] = OrderedDict()

    def read(self, source: Source, start: int, num: int, size: Size | None = None) -> np.ndarray:
        """Return frames `start .. start+num`, uint8 RGB (num,H,W,3), scaled to `size` (None: the source's own).

        The same call gives the same bits, whatever was read before. Raises `UserError` naming a file that cannot be
        read or no longer has these frames.
        """
        size = size or (source.width, source.height)
        if source.kind == "video":
            frames = self._read_video(source, start, num, size)
        elif source.kind == "raw":
            frames = video.read_raw(source.path, start, num)
            if frames.shape[2:0:-1] != size:
                frames = np.array([resize(frame, *size) for frame in frames], np.uint8)
        else:
            files = video.files_of(source.path)[start : start + num]
            frames = np.array([resize(read_image(file), *size) for file in files], np.uint8)
        expected = (num, size[1], size[0], 3)
        if frames.shape != expected:
            raise UserError(
                f"{source.path}: expected {expected} from frame {start} on, got {frames.shape}; "
                "the file changed while in use: start again to index it anew"
            )
        return frames

    def _read_video(self, source: Source, start: int, num: int, size: Size) -> np.ndarray:
        path, videos = source.path, self._videos
        times = self._times.of(source)
        if times is not None and start + num <= len(times[0]):
            opened = videos.pop(path, None)
            if opened is None or opened.size != size:
                opened = OpenVideo(source, times, size)
            frames = opened.read(start, num)
            if frames is not None:
                videos[path] = opened  # the last one used; those not used for the longest time are closed
                while is_too_much(list(videos.values())):
                    videos.popitem(last=False)[1].container.close()
                return frames
            opened.container.close()
        return np.array(list(video.read_frames(path, start=start, num=num, size=size)), np.uint8)
