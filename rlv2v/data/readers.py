"""Read frames `start .. start+num` of a source in any order, scaled while they are read.

A video is decoded from the key frame before `start`, found by the times of the file's packets. The file stays open from
clip to clip, each wanted frame is scaled and converted in one pass from the decoder's own memory, and frames before
`start` to which no other refers are not decoded. Where the times do not number the frames, it is read from its start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from rlv2v.data import video
from rlv2v.data.decoding import deinterlaced
from rlv2v.data.demux import OwnFile, SharedFiles, Times
from rlv2v.data.images import read_image
from rlv2v.data.inspect import Source
from rlv2v.data.scaling import resize
from rlv2v.data.upright import Upright
from rlv2v.errors import UserError

Size = tuple[int, int]
"""Width and height, pixels."""
MAX_OPEN_FILES = 32
MAX_OPEN_PIXELS = 4 * 1920 * 1080
"""Videos stay open while they are few and their frames small: a decoder holds up to 17 of them."""
MAX_OPEN_FRAMES = 50_000
"""And while they are not long in all, but for those of which the threads share the open file (`rlv2v.data.demux`)."""
SKIPPABLE = {"h264", "hevc"}
"""Codecs of which a decoder can leave out the frames that no other refers to."""


class OpenVideo:
    """Decode a video file that stays open, in one thread."""

    def __init__(self, source: Source, times: Times, size: Size, files: SharedFiles) -> None:
        self.size, self.pixels, self._times = size, source.width * source.height, times
        self._upright, self._interlaced = Upright(size, path=source.path), source.interlaced
        self._skips = source.codec in SKIPPABLE and not source.interlaced
        self._file = files.file(source)
        self.num_frames = source.num_frames if isinstance(self._file, OwnFile) else 0
        """Frames in a table of its own."""
        self._decoder = self._file.new_decoder()
        self._decoder.thread_count = 1

    def close(self) -> None:
        """Close the file, unless others read it too."""
        if isinstance(self._file, OwnFile):
            self._file.close()

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
        self._file.close()
        return None

    def _pictures(self, key: int, window: list[int]) -> Iterator[av.VideoFrame]:
        """Yield the frames shown at the times of `window`, from the key frame shown at `key` on; fewer at a fault."""
        count = 0
        self._decoder.flush_buffers()
        for packet in (*self._file.read(key, window), None):  # None: what the decoder still holds
            if self._skips and packet is not None:
                first = packet.pts is not None and packet.pts < window[0]  # of these only those to which others refer
                self._decoder.skip_frame = "NONREF" if first else "DEFAULT"
            for frame in self._decoder.decode(packet):
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

    files: what the readers of several threads share.
    """

    def __init__(self, files: SharedFiles | None = None) -> None:
        self._files = files or SharedFiles()
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
        times = self._files.times(source)
        if times is not None and start + num <= len(times[0]):
            opened = videos.pop(path, None)
            if opened is None or opened.size != size:
                opened = OpenVideo(source, times, size, self._files)
            frames = opened.read(start, num)
            if frames is not None:
                videos[path] = opened  # the last one used; those not used for the longest time are closed
                while is_too_much(list(videos.values())):
                    videos.popitem(last=False)[1].close()
                return frames
        return np.array(list(video.read_frames(path, start=start, num=num, size=size)), np.uint8)
