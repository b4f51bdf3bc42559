"""Read frames `start .. start+num` of a source in any order, scaled while they are read.

A video is decoded from the key frame before `start`, found by the times of the file's packets. The file stays open from
clip to clip, each wanted frame is scaled and converted in one pass from the decoder's own memory, and frames before
`start` to which no other refers are not decoded. Where the times do not number the frames, it is read from its start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
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
SKIPPABLE = {"h264", "hevc"}
"""Codecs of which a decoder can leave out the frames that no other refers to."""


def packet_times(source: Source) -> Times | None:
    """Return the times of the frames that the index counts; None where the file's packets do not number them."""
    shown: list[int] = []
    keys: list[int] = []
    num = 0
    with open_video(source.path) as container:
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
    if not enough or len(set(shown)) != num or timeline.num_parts > 1:
        return None
    return np.array(sorted(shown)[: source.num_frames], np.int64), np.array(sorted(keys), np.int64)


class OpenVideo:
    """Decode a video file that stays open, in one thread."""

    def __init__(self, source: Source, times: Times, size: Size) -> None:
        self.size, self.pixels = size, source.width * source.height
        self._times, self._upright, self._interlaced = times, Upright(size), source.interlaced
        self._skips = source.codec in SKIPPABLE and not source.interlaced
        self.container = open_video(source.path)
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


class FrameReader:
    """Read any source, and leave videos open. Not for two threads at once: one reader a thread.

    times: the videos' packet times; readers that share this dictionary read each file's packets once.
    """

    def __init__(self, times: dict[Path, Times | None] | None = None) -> None:
        self._times = {} if times is None else times
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
        if path not in self._times:
            self._times[path] = packet_times(source)
        times = self._times[path]
        if times is not None and start + num <= len(times[0]):
            opened = videos.pop(path, None)
            if opened is None or opened.size != size:
                opened = OpenVideo(source, times, size)
            frames = opened.read(start, num)
            if frames is not None:
                videos[path] = opened  # the last one used; those not used for the longest time are closed
                while len(videos) > MAX_OPEN_FILES or sum(v.pixels for v in videos.values()) > MAX_OPEN_PIXELS:
                    videos.popitem(last=False)[1].container.close()
                return frames
            opened.container.close()
        return np.array(list(video.read_frames(path, start=start, num=num, size=size)), np.uint8)
