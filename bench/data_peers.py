"""The ways to read 16 frames at a random start, each in a process of its own on one core, for bench/data.py.

`python bench/data_peers.py NAME` imports NAME's library alone, so that its memory is its own, and answers JSON lines.
Every peer is used in its fastest documented form on one thread, with its files kept open from clip to clip where it can
seek. The frames show which they are: 16 squares of 8x8 pixels at 64x64 are the bits of `file * 1024 + frame`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]
FRAMES, SIZE, BITS = 16, 64, 16
DARK, BRIGHT = 40, 215


def stamp(frame: Array, file: int, index: int) -> Array:
    """Return a copy of uint8 (S,S,3) whose top quarter shows `file` and `index` in two rows of eight squares."""
    bits = np.array([(file * 1024 + index) >> k & 1 for k in range(BITS)], np.uint8).reshape(2, 8)
    side = frame.shape[0] // 8
    stamped = frame.copy()
    stamped[: 2 * side] = (DARK + (BRIGHT - DARK) * bits).repeat(side, 0).repeat(side, 1)[..., None]
    return stamped


def read_stamps(clip: Array) -> Array:
    """Return `file * 1024 + frame`, int (T,), of uint8 (T,64,64,3), from the middle of each square."""
    squares = clip[:, :16].astype(np.float32).mean(-1).reshape(-1, 2, 8, 8, 8)[:, :, 2:6, :, 2:6].mean((2, 4))
    codes: Array = (squares.reshape(-1, BITS) > (DARK + BRIGHT) / 2) @ (1 << np.arange(BITS))
    return codes


def shrink(frames: Iterable[Array]) -> Array:
    """Resize by area average to 64x64, for the libraries that do not resize."""
    import cv2

    return np.stack([cv2.resize(f, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for f in frames])


class Way(ABC):
    """Read the clips of a folder in one way; `files` are in natural order."""

    module: ClassVar[str]

    def open(self, files: list[str]) -> None:
        """Get ready for the files of a case, and close those of the last one."""
        self.files = files

    @abstractmethod
    def read(self, file: int, start: int) -> Array:
        """Return the frames `start .. start+16` as uint8 RGB (16,64,64,3)."""

    def clips(self, draws: list[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        """Yield (file, start, frames) of each draw."""
        for file, start in draws:
            yield file, start, self.read(file, start)

    def wrong(self, draws: list[tuple[int, int]]) -> int:
        """Return how many frames are not those asked for."""
        count = 0
        for file, start, clip in self.clips(draws):
            asked = file * 1024 + start + np.arange(FRAMES)
            right = clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8
            count += int((read_stamps(clip) != asked).sum()) if right else FRAMES
        return count


class Ours(Way):
    """Do what a thread of the loader does for one draw, cache off."""

    module = "rlv2v"

    def open(self, files: list[str]) -> None:
        from rlv2v.data.index import index_folder
        from rlv2v.data.loader import ClipReader

        super().open(files)
        self.sources = [s for s in index_folder(Path(files[0]).parent, frames=FRAMES) if s.status == "ok"]
        if [str(s.path) for s in self.sources] != files:
            raise RuntimeError(f"index: expected {files}, got {[str(s.path) for s in self.sources]}")
        self.reader = ClipReader(SIZE, cache_bytes=0)

    def read(self, file: int, start: int) -> Array:
        from rlv2v.data.sampler import ClipSample

        return self.reader.clip(ClipSample(self.sources[file], start, (0.5, 0.5), (False, False, False)), FRAMES)


class OursEndToEnd(Ours):
    """Call `next(loader)`: one background thread, one clip a batch, and the loader's own draws."""

    def open(self, files: list[str]) -> None:
        from rlv2v.data.index import Dataset
        from rlv2v.data.loader import Loader

        super().open(files)
        dataset = Dataset(Path(files[0]).parent, {"x": self.sources, "y": [], "z": [], "s": []}, [], "")
        self.loader = Loader(dataset, batch={"x": 1}, frames=FRAMES, size=SIZE, seed=0, augment="none", cache_mib=0)

    def clips(self, draws: list[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        for _ in draws:
            (sample,) = self.loader.sampler.samples("x", self.loader.step)
            clip = next(self.loader).x
            assert clip is not None
            yield self.sources.index(sample.source), sample.start, clip[0].numpy()


class Peer(Way):
    """Keep files open from clip to clip."""

    def open(self, files: list[str]) -> None:
        super().open(files)
        self.readers: dict[int, Any] = {}

    def reader(self, file: int) -> Any:
        """Return a file's reader, opened the first time."""
        if file not in self.readers:
            self.readers[file] = self.opened(self.files[file])
        return self.readers[file]

    @abstractmethod
    def opened(self, path: str) -> Any:
        """Return a new reader of one file."""


class PyAV(Peer):
    """Seek to the last key frame, decode on; one reformatter scales and converts the wanted frames alone."""

    module = "av"

    def opened(self, path: str) -> Any:
        import av

        container = av.open(path)
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        scale = Fraction(stream.average_rate or 0) * Fraction(stream.time_base or 0)
        return container, stream, scale, av.video.reformatter.VideoReformatter()

    def read(self, file: int, start: int) -> Array:
        container, stream, scale, reformatter = self.reader(file)
        container.seek(round(start / scale), stream=stream)
        frames: list[Array] = []
        for frame in container.decode(stream):
            if round(frame.pts * scale) >= start:
                frames.append(reformatter.reformat(frame, SIZE, SIZE, "rgb24", interpolation="AREA").to_ndarray())
                if len(frames) == FRAMES:
                    break
        return np.stack(frames)


class OpenCV(Peer):
    """Set the position of a `VideoCapture` by frame number."""

    module = "cv2"

    def opened(self, path: str) -> Any:
        import cv2

        cv2.setNumThreads(1)
        return cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])

    def read(self, file: int, start: int) -> Array:
        import cv2

        capture = self.reader(file)
        capture.set(cv2.CAP_PROP_POS_FRAMES, start)
        return shrink(capture.read()[1] for _ in range(FRAMES))[..., ::-1]


class Decord(Peer):
    """Use `VideoReader.get_batch`, which scales by itself."""

    module = "decord"

    def opened(self, path: str) -> Any:
        return importlib.import_module("decord").VideoReader(path, num_threads=1, width=SIZE, height=SIZE)

    def read(self, file: int, start: int) -> Array:
        frames: Array = self.reader(file).get_batch(range(start, start + FRAMES)).asnumpy()
        return frames


class TorchCodec(Peer):
    """Use `VideoDecoder.get_frames_in_range`; its own `Resize` is slower than OpenCV's (6.8 against 5.9 ms a clip)."""

    module = "torchcodec"

    def opened(self, path: str) -> Any:
        decoders = importlib.import_module("torchcodec.decoders")
        return decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)

    def read(self, file: int, start: int) -> Array:
        return shrink(self.reader(file).get_frames_in_range(start, start + FRAMES).data.numpy())


WAYS: dict[str, type[Way]] = {
    "rlv2v": Ours,
    "Loader": OursEndToEnd,
    "PyAV": PyAV,
    "OpenCV": OpenCV,
    "decord": Decord,
    "torchcodec": TorchCodec,
}
PEERS = tuple(WAYS)[2:]


def serve(name: str) -> None:
    """Answer requests, one JSON line each: `import`, `open` or `run`; pinned to one core."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    way = WAYS[name]()
    for line in sys.stdin:
        try:
            answers.write(json.dumps(answer(way, **json.loads(line))) + "\n")
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            answers.write(json.dumps({"error": f"{type(error).__name__}: {text}"}) + "\n")


def answer(way: Way, do: str, files: list[str], draws: list[tuple[int, int]]) -> dict[str, Any]:
    """Return nothing for `import`, the number of wrong frames for `open`, seconds and memory for `run`."""
    if do == "import":
        importlib.import_module(way.module)
        return {}
    if do == "open":
        way.open(files)
        return {"wrong": way.wrong(draws)}
    start, cpu = time.perf_counter(), time.process_time()
    for _ in way.clips(draws):
        pass
    seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return seconds | {"rss_mib": rss_mib()}


def rss_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def plain_names(folder: Path) -> str:
    """Return a library search path with PyAV's FFmpeg under the names that torchcodec looks for."""
    import av

    bundled = Path(av.__file__).parents[1] / "av.libs"
    for library in bundled.glob("lib[as][vw]*.so.*"):
        match = re.fullmatch(r"(lib\w+)-[0-9a-f]+(\.so\.\d+)\..*", library.name)
        if match and not (folder / "".join(match.groups())).exists():
            (folder / "".join(match.groups())).symlink_to(library)
    return f"{folder}:{bundled}"


class Worker:
    """Run one way in a process, as a context manager; `libraries` is an empty folder for it to use."""

    def __init__(self, name: str, libraries: Path) -> None:
        environment = dict(os.environ)
        if WAYS[name].module == "torchcodec":
            own = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = f"{own}:{plain_names(libraries)}" if own else plain_names(libraries)
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, text=True,
        )  # fmt: skip

    def ask(self, do: str, files: Sequence[Path] = (), draws: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """Return the answer to a request; RuntimeError if the process or the way failed."""
        request = {"do": do, "files": [str(f) for f in files], "draws": list(draws)}
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it died, which the missing answer shows
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}")
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
