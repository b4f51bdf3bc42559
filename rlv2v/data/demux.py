"""Find and read the packets of a video's frames, so that the memory does not grow with its length times the threads.

FFmpeg's table of an open MP4 takes some 40 bytes a frame, and building it as much again. So the threads that read a
long video share one open file; each has a decoder of its own.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np

from rlv2v.data.clock import Timeline
from rlv2v.data.decoding import decoder_of, open_video, stream_of
from rlv2v.data.inspect import Source

Times = tuple[np.ndarray, np.ndarray]
"""The times at which frames are shown, in the stream's ticks, ascending: of all frames, and of the key frames."""
LONG = 10_000
"""Frames of a video, seven minutes: of one with more the threads share the open file."""
MAX_SHARED_FRAMES = 200_000
"""Of the long videos that stay open, two hours in all."""
OPENER = ThreadPoolExecutor(1, thread_name_prefix="rlv2v-opener")
"""The thread that opens videos: FFmpeg builds its table of a long one there, and what that takes meanwhile is used
again for the next, while each thread that allocates keeps memory of its own."""


def open_file(path: Path) -> av.container.InputContainer:
    """Open a video as `open_video` does, in the thread that opens all."""
    return OPENER.submit(open_video, path).result()


def packet_times(source: Source) -> Times | None:
    """Return the times of the frames that the index counts; None where the file's packets do not number them."""
    shown, keys = array("q"), array("q")
    num = 0
    with open_file(source.path) as container:
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
    times = np.array(shown)
    times.sort()
    if not enough or len(times) != num or (times[1:] == times[:-1]).any() or timeline.num_parts > 1:
        return None
    return times[: source.num_frames].copy() if len(times) > source.num_frames else times, np.sort(np.array(keys))


def read_packets(container: av.container.InputContainer, key: int, window: Sequence[int]) -> list[av.Packet[Any]]:
    """Return the packets from the key frame shown at `key` to the last of those shown at the times of `window`.

    The packets of a frame and of all that it refers to come in the order of decoding, up to its own. There are fewer
    where the file does not hold them.
    """
    stream, missing = stream_of(container), set(window)
    packets: list[av.Packet[Any]] = []
    container.seek(key, stream=stream)
    for packet in container.demux(stream):
        if not packet.size or (packet.dts is not None and packet.dts > window[-1]):
            break
        packets.append(packet)
        missing.discard(packet.pts)
        if not missing:
            break
    return packets


class OwnFile:
    """Read packets by an open file of its own, in one thread."""

    def __init__(self, path: Path) -> None:
        self._container = open_file(path)

    def new_decoder(self) -> av.VideoCodecContext:
        """Return the file's decoder."""
        return decoder_of(stream_of(self._container))

    def read(self, key: int, window: Sequence[int]) -> list[av.Packet[Any]]:
        """Return packets as `read_packets` does."""
        return read_packets(self._container, key, window)

    def close(self) -> None:
        """Close the file; it is not read any more."""
        self._container.close()


class SharedFile:
    """Read packets for several threads, one after the other, by a file that is opened when it is needed."""

    def __init__(self, source: Source, files: SharedFiles) -> None:
        self.num_frames = source.num_frames
        self._path, self._files = source.path, files
        self._lock = threading.Lock()
        self._container: av.container.InputContainer | None = None

    def new_decoder(self) -> av.VideoCodecContext:
        """Return a decoder, which outlives the file that it came with: there is one table at any time."""
        with self._lock:
            self._close()
            with open_file(self._path) as container:
                return decoder_of(stream_of(container))

    def read(self, key: int, window: Sequence[int]) -> list[av.Packet[Any]]:
        """Return packets as `read_packets` does."""
        self._files.keep(self)
        with self._lock:
            if self._container is None:
                self._container = open_file(self._path)
            return read_packets(self._container, key, window)

    def close(self) -> None:
        """Close the file, which the next read opens again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


class SharedFiles:
    """Hold for all threads what is read once of the videos of a set: their packets' times, and long files, open.

    The times take 8 bytes a frame, and 8 a key frame.
    """

    def __init__(self) -> None:
        self._times: dict[Path, Times | None] = {}
        self._lock = threading.Lock()
        self._reading: dict[Path, threading.Lock] = {}
        self._long: dict[Path, SharedFile] = {}
        self._open: OrderedDict[SharedFile, None] = OrderedDict()

    def times(self, source: Source) -> Times | None:
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

    def file(self, source: Source) -> OwnFile | SharedFile:
        """Return where a thread reads the packets of a video."""
        if source.num_frames <= LONG:
            return OwnFile(source.path)
        with self._lock:
            return self._long.setdefault(source.path, SharedFile(source, self))

    def keep(self, file: SharedFile) -> None:
        """Take note that a file is read, and close those that were not for the longest time, if they are too many."""
        with self._lock:
            self._open[file] = None
            self._open.move_to_end(file)
            closing = []
            while len(self._open) > 1 and sum(f.num_frames for f in self._open) > MAX_SHARED_FRAMES:
                closing.append(self._open.popitem(last=False)[0])
        for other in closing:
            with suppress(av.FFmpegError):
                other.close()
