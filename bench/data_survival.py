"""Read damaged files in this process as the commands would, and say what became of each.

    python bench/data_survival.py ORIGINALS SCRATCH < SEEDS

For each seed of a line of stdin (see `data_damage.damaged`) it prints one before it starts, "begin SEED", and one with
the outcome, in JSON. A crash or a hang is left to the process that reads these lines.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from data_damage import damaged

from rlv2v.crop_size import CropSize
from rlv2v.data.damage import Faults
from rlv2v.data.index import index_folder
from rlv2v.data.inspect import Source
from rlv2v.data.prepare.convert import Format, convert_source, survey_source
from rlv2v.data.readers import FrameReader
from rlv2v.data.tracks import Tracks
from rlv2v.data.video import kind_of, probe, timed_frames
from rlv2v.data.writer import VideoWriter
from rlv2v.errors import UserError

MAX_BYTES = 6 * 2**30
"""Address space of this process: what asks for more gets a MemoryError."""
MAX_CPU = 60
"""Seconds of processor time for a file, which takes about one; more ends this process by SIGXCPU."""
MAX_GROWTH_MIB = 1024
"""By which the peak of the memory may grow with one small file."""
MAX_FRAMES = 3000
"""A file with more, which only a lie in its times makes, is not converted: prepare would show what it takes first."""
MAX_PIXELS = 2000 * 2000
"""Nor is a file with larger pictures, which takes long and no other way."""


def index(path: Path) -> Source:
    """Return the source as the index of its folder has it, which a second index must confirm."""
    (path.parent / ".rlv2v-manifest.json").unlink(missing_ok=True)
    (source,) = index_folder(path.parent, frames=1)
    (again,) = index_folder(path.parent, frames=1)
    if again != source:
        raise AssertionError(f"the stored index differs: {source} {again}")
    return source


def read_clips(source: Source) -> None:
    """Read what the index promises: the first frames and the last ones."""
    reader, num = FrameReader(), min(4, source.num_frames)
    for start in {0, source.num_frames // 2, source.num_frames - num}:
        reader.read(source, min(start, source.num_frames - num), num, (32, 24))


def prepare(path: Path, seed: int, out: Path) -> None:
    """Convert a file as `prepare` does, by one of its ways."""
    fps = (None, None, 7.0, 1000.0)[seed % 4]
    item, _ = survey_source(path, fps)
    if not item.usable or item.frames > MAX_FRAMES:
        return
    form = Format(CropSize(32, 32), "video" if seed % 3 == 0 else "raw", fps)
    name = form.output_name(path, item.source, item.source.hash)
    convert_source(replace(item, output=name), out, form)


def translate(path: Path, seed: int, out: Path) -> None:
    """Copy a file as `translate` does, bridging its faults."""
    video, faults = probe(path), Faults()
    suffix = (".mp4", ".mkv", ".webm", ".mp4", ".mov", ".gif")[seed % 6]
    codec = {".gif": "gif", ".webm": "vp9"}.get(suffix, "h264")
    tracks = Tracks(path, video.start) if kind_of(path) == "video" else None
    if video.width * video.height > MAX_PIXELS:
        return
    frames = timed_frames(path, size=(video.width, video.height), faults=faults)
    options = {"preset": "ultrafast"} if codec == "h264" else {}
    with VideoWriter(
        out / f"out{suffix}",
        video.fps,
        codec,
        options=options,
        even=True,
        tick=video.tick,
        aspect=video.pixel_aspect,
        tracks=tracks,
    ) as writer:
        for frame in frames:
            writer.write(frame.rgb, frame.time, frame.duration)
    if not all(faults.lines()):
        raise AssertionError(f"a fault without a word: {faults}")


def outcome(path: Path, seed: int, out: Path) -> dict[str, str]:
    """Return what became of a file: `index`, `reason`, `translate`, and `failure` if something must not happen."""
    result: dict[str, str] = {}
    stage = "index"
    try:
        source = index(path)
        result = {"index": source.status, "reason": source.reason}
        if (source.status == "ok") == bool(source.reason):
            raise AssertionError(f"{source.status} with the reason {source.reason!r}")
        if source.status != "excluded":
            stage = "read"
            read_clips(source)
        stage = "prepare"
        try:
            prepare(path, seed, out)
            result["prepare"] = "ok"
        except UserError as error:
            result["prepare"] = str(error)
        stage = "translate"
        try:
            translate(path, seed, out)
            result["translate"] = "ok"
        except UserError as error:
            result["translate"] = str(error)
    except BaseException:
        result["failure"] = f"{stage}: {traceback.format_exc()}"
    return result


def peak_mib() -> int:
    """Return the most memory that this process has held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def limit_cpu() -> None:
    """Let this process use `MAX_CPU` seconds more of the processor."""
    usage, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 1 + MAX_CPU, most))


def main(originals: Path, scratch: Path) -> None:
    """Go through the seeds of stdin."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, resource.RLIM_INFINITY))
    for line in sys.stdin:
        seed, peak = int(line), peak_mib()
        print(f"begin {seed}", flush=True)
        limit_cpu()
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "set").mkdir(parents=True)
        (scratch / "out").mkdir()
        path, done = damaged(seed, originals, scratch / "set")
        result = {"file": done} | outcome(path, seed, scratch / "out")
        if peak_mib() - peak > MAX_GROWTH_MIB:
            result.setdefault("failure", f"memory: {peak} MiB became {peak_mib()} MiB")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
