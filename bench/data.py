"""Time the video path beside its peers: clips a second on one core, the index, and how long training waits for data.

    python bench/data.py [--json F] [--quick]

Clips of 16 frames to 64x64 at random (file, start), the same draws for all, from street footage in four forms, each
frame stamped with its file and number. Every way of reading runs in a process of its own, all on the same core, and
must first return the right frames; the ways take turns, a block of clips each. `Loader` is `next(loader)` end to end,
`rlv2v` the work of one of its threads for a clip, cache off. Peers come with `pip install -e '.[bench]'`. Prepared raw
is compared with the peers on the original 256x256 files.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import shutil
import statistics
import tempfile
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from data_peers import FRAMES, PEERS, SIZE, WAYS, load, open_files, plain_names, stamp, time_clips
from harness import (
    Bench,
    Contender,
    Row,
    TimedArgs,
    fault_of,
    process_of_its_own,
    rows_of,
    run_python,
    version,
    wall_us,
)
from tasks import wheel_clip

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.index import MANIFEST, index_folder, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.scaling import resize
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.data.workers import cores

NUM_FILES, LENGTH = 4, 120
VP9 = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0"}
FORMS: dict[str, tuple[str, int, dict[str, str]]] = {
    "prepared raw 64": ("", SIZE, {}),
    "prepared video VP9 128": ("libvpx-vp9", 128, {"crf": "20", "g": "12", **VP9}),
    "unprepared VP9 256": ("libvpx-vp9", 256, {"crf": "32", "g": "16", **VP9}),
    "unprepared H.264 256": ("libx264", 256, {"crf": "23"}),
}
RAW, PREPARED, VP9_256, H264_256 = FORMS
PACKAGES = {"PyAV": "av", "OpenCV": "opencv-python-headless", "decord": "decord", "torchcodec": "torchcodec"}
NO_CACHE = {"batch": {"x": 1}, "frames": FRAMES, "size": SIZE, "cache_mib": 0}
"""Settings of a loader of one clip a step."""
Files = dict[str, list[Path]]


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time our ways of reading clips against others."""

    rounds: int = 30
    """Blocks of clips of each way."""


def footage() -> list[np.ndarray]:
    """Return stamped clips of 120 frames, uint8 (256,256,3): windows of a street scene, moved in place and time."""
    scene = np.stack(list(read_frames(wheel_clip("bikes.mp4"))))
    clips = []
    for file in range(NUM_FILES):
        left = file * (scene.shape[2] - 256) // NUM_FILES
        frames = (scene[(file * 37 + t) % len(scene), 8:264, left : left + 256] for t in range(LENGTH))
        clips.append(np.stack([stamp(frame, file, t) for t, frame in enumerate(frames)]))
    return clips


def write_video(path: Path, clip: np.ndarray, codec: str, options: dict[str, str]) -> None:
    """Write uint8 (T,H,W,3) as yuv420p, BT.601 limited range, constant quality, 30 frames a second."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.codec_context.bit_rate = 0
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def write_forms(root: Path) -> Files:
    """Write the footage in each form; return the files."""
    clips, files = footage(), {}
    for form, (codec, size, options) in FORMS.items():
        folder = root / form
        folder.mkdir()
        for k, clip in enumerate(clips):
            scaled = clip if size == clip.shape[1] else np.stack([resize(frame, size, size) for frame in clip])
            if codec:
                write_video(folder / f"{k}.mp4", scaled, codec, options)
            else:
                np.save(folder / f"{k}.npy", scaled)
        files[form] = sorted(folder.iterdir())
    return files


def random_draws(count: int, seed: int) -> list[tuple[int, int]]:
    """Return (file, start) of random clips."""
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(NUM_FILES)), int(rng.integers(LENGTH - FRAMES + 1))) for _ in range(count)]


def start_workers(bench: Bench, stack: ExitStack, libraries: Path) -> dict[str, Executor]:
    """Return the processes that could import their library; `libraries` is an empty folder for them to use."""
    workers = dict[str, Executor]()
    paths = filter(None, (os.environ.get("LD_LIBRARY_PATH"), plain_names(libraries)))
    with patch.dict(os.environ, LD_LIBRARY_PATH=":".join(paths)):
        for name in WAYS:
            worker = stack.enter_context(process_of_its_own())
            try:
                worker.submit(load, name).result()
                workers[name] = worker
            except Exception as error:
                if name not in PEERS:
                    raise
                bench.skip(name, error)
    return workers


def reading_rows(form: str, files: list[Path], workers: dict[str, Executor], blocks: int) -> list[Row]:
    """Check and time every way that reads a form."""
    faults, draws = dict[str, str](), random_draws(24, 0)
    names = [name for name in workers if form != RAW or name not in PEERS]
    for name in names:
        try:
            wrong = workers[name].submit(open_files, name, [str(file) for file in files], draws).result()
            if wrong:
                faults[name] = f"{wrong} of {len(draws) * FRAMES} frames"
        except Exception as error:
            faults[name] = fault_of(error)
    size = 400 if form == RAW else 12
    seconds: dict[str, list[float]] = {name: [] for name in names if name not in faults}
    for block in range(blocks):
        for name, times in seconds.items():
            times.append(workers[name].submit(time_clips, name, random_draws(size, 1 + block)).result())
    contenders = []
    for name in names:
        ours, fields = name not in PEERS, dict[str, Any](wrong_data=faults.get(name))
        if name in seconds:
            fields["clips_per_s"] = round(size / statistics.median(seconds[name]), 1)
        group, valid = "" if ours else "peer", name not in faults
        contenders.append(Contender(name, dtype="uint8", ours=ours, group=group, valid=valid, fields=fields))
    us = {(name, "uint8"): [1e6 * wall / size for wall in times] for name, times in seconds.items()}
    return rows_of(form, "read", contenders, us)


def compare_raw(rows: list[Row]) -> None:
    """Set the ratios of prepared raw to the peers on the original files."""
    peers = [row for row in rows if row["case"] in (VP9_256, H264_256) and not row["ours"] and row["valid"]]
    for row in rows:
        if row["case"] == RAW and row["valid"]:
            ratios = {f"{peer['backend']}, {peer['case']}": peer["median_us"] / row["median_us"] for peer in peers}
            ratios |= {"best peer": min(ratios.values())} if ratios else {}
            row["speedup_over"] = {name: round(ratio, 3) for name, ratio in ratios.items()}


def index_row(root: Path, files: Files, repeats: int) -> Row:
    """Return the medians of the index of 16 files, first and second time, and of one plain decode, in turns.

    The first time with one file at a time, as the plain decode has it, and by default, one file a core.
    """
    folders = root / "trainX", root / "trainY"
    for folder, copies in zip(folders, ("first", "second"), strict=True):
        folder.mkdir(parents=True)
        for form in (VP9_256, H264_256):
            for path in files[form]:
                shutil.copy(path, folder / f"{form} {copies} {path.name}")
    paths = sorted(root.glob("*/*.mp4"))

    def decode() -> None:
        for path in paths:
            with av.open(str(path)) as container:
                for _ in container.decode(video=0):
                    pass

    def one_at_a_time() -> None:
        for folder in folders:
            index_folder(folder, frames=FRAMES, workers=1)

    def index() -> None:
        open_dataset(root, frames=FRAMES)

    ways = {"plain_decode": decode, "one_at_a_time": one_at_a_time, "first": index, "second": index}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            for manifest in root.rglob(MANIFEST) if name != "second" else ():
                manifest.unlink()
            times[name].append(wall_us(call) / 1e3)
    plain, one, first, second = (statistics.median(values) for values in times.values())
    row: Row = {"case": f"index of {len(paths)} files of {LENGTH} frames", "backend": "rlv2v", "ours": True}
    row |= {"cores": cores(), "plain_decode_ms": round(plain), "second_ms": round(second, 2)}
    row |= {"one_at_a_time_over_plain": round(one / plain, 3), "first_over_plain": round(first / plain, 3)}
    return row | {"first_over_second": round(first / second, 1)}


def wait_row(data: Path, out: Path, steps: int) -> Row:
    """Return the share of a training's time that it waits for clips, by its own log, without the first log line."""
    flags = ("--steps", steps, "--warmup-steps", 2, "--snapshot-seconds", "1e9")
    run_python("-m", "rlv2v.train", "--data", data, "--out", out, *flags)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted, seconds = lines[-1]["step"] - lines[0]["step"], lines[-1]["seconds"] - lines[0]["seconds"]
    waited = sum(line["time_data"] * (line["step"] - last["step"]) for last, line in itertools.pairwise(lines))
    row: Row = {"case": "wait in training, default preset", "backend": "Loader", "ours": True, "steps": counted}
    row |= {"wait_percent": round(100 * waited / seconds, 3), "wait_ms": round(1e3 * waited / counted, 3)}
    return row | {"step_ms": round(1e3 * seconds / counted, 1), "first_wait_ms": round(1e3 * lines[0]["time_data"], 1)}


def loader_memory(root: Path, settings: dict[str, Any], marks: tuple[int, int]) -> list[float]:
    """Return the resident MiB after each of two numbers of steps of a loader."""
    torch.set_num_threads(1)
    loader = Loader(open_dataset(root, frames=settings["frames"]), seed=0, **settings)
    resident = []
    for step in range(1, marks[1] + 1):
        next(loader)
        if step in marks:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    loader.close()
    return resident


def memory_row(case: str, root: Path, settings: dict[str, Any], marks: tuple[int, int]) -> Row:
    """Return the growth of the loader's memory between two numbers of steps."""
    with process_of_its_own() as process:
        early, late = process.submit(loader_memory, root, settings, marks).result()
    row: Row = {"case": f"loader memory, {case}", "backend": "Loader", "ours": True, "steps": list(marks)}
    return row | {"rss_mib": [round(early, 1), round(late, 1)], "growth_percent": round(100 * (late / early - 1), 2)}


def main(args: Args) -> None:
    """Check, time, print the tables and the JSON line; exit code 1 if a way of ours returned wrong frames."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    quick = args.quick
    with Bench("data", args) as bench, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "libraries").mkdir()
        files = write_forms(root)
        with ExitStack() as stack:  # its processes end before anything else is timed
            workers = start_workers(bench, stack, root / "libraries")
            bench.add([], versions={name: version(package) for name, package in PACKAGES.items() if name in workers})
            for form, paths in files.items():
                bench.add(reading_rows(form, paths, workers, 3 if quick else args.rounds))
            compare_raw(bench.rows)
            for row in bench.rows:
                row["ratio"] = row["speedup_over"].get("best peer")
        bench.add([index_row(root / "index", files, 2 if quick else 5)])
        write_dataset(root / "synth", size=32, frames=8, seed=0, counts=Counts(val=2, test=2))
        bench.add([wait_row(root / "synth", root / "run", 11 if quick else 31)])
        marks = (100, 300) if quick else (200, 2000)
        data = Config.of("default").data
        batch = {name: getattr(data, f"batch_{name}") for name in "xyzs"}
        preset = {"batch": batch, "frames": data.frames, "size": data.size}
        bench.add([memory_row("default preset, synthetic set", root / "synth", preset, marks)])
        bench.add([memory_row("256x256 files, no cache", root / "index", NO_CACHE, marks)])


if __name__ == "__main__":
    run_command(main, Args)
