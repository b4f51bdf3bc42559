"""Time the video path beside its peers: clips a second on one core, the index, and how long training waits for data.

    python bench/data.py [--json F] [--quick]

Clips of 16 frames to 64x64 at random (file, start), the same draws for all, from real street footage that is written in
four forms, each frame stamped with its file and number. Every way of reading runs in a process of its own, all on the
same core, and must first return the right frames; the ways take turns, a block of clips each, and a time is a block's
mean per clip. `Loader` is `next(loader)` end to end, `rlv2v` the work of one of its threads for a clip, cache off.
Peers come with `pip install -e '.[bench]'`. Prepared raw is compared with the peers on the original 256x256 files.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from data_peers import FRAMES, PEERS, SIZE, WAYS, Worker, rss_mib, stamp
from harness import Bench, Contender, Row, TimedArgs, rows_of, version, wall_us
from real_pair import street_clip

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.index import MANIFEST, index_folder, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames, resize
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
Files = dict[str, list[Path]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time our ways of reading clips against others."""

    rounds: int = 30
    """Blocks of clips of each way."""


def footage() -> list[np.ndarray]:
    """Return stamped clips of 120 frames, uint8 (256,256,3): windows of a street scene, moved in place and time."""
    scene = np.stack(list(read_frames(street_clip())))
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


def start_workers(bench: Bench, stack: ExitStack, libraries: Path) -> dict[str, Worker]:
    """Return the processes that could import their library."""
    workers = {}
    for name in WAYS:
        worker = stack.enter_context(Worker(name, libraries))
        try:
            worker.ask("import")
            workers[name] = worker
        except RuntimeError as error:
            if name not in PEERS:
                raise
            bench.skip(name, str(error).removeprefix(f"{name}: "))
    return workers


def reading_rows(form: str, files: list[Path], workers: dict[str, Worker], blocks: int) -> list[Row]:
    """Check and time every way that reads a form."""
    names = [name for name in workers if form != RAW or name not in PEERS]
    faults, answers, draws = dict[str, str](), dict[str, list[dict[str, float]]](), random_draws(24, 0)
    for name in names:
        try:
            wrong = workers[name].ask("open", files, draws)["wrong"]
            if wrong:
                faults[name] = f"{wrong} of {len(draws) * FRAMES} frames"
        except RuntimeError as error:
            faults[name] = str(error).removeprefix(f"{name}: ")
        if name not in faults:
            answers[name] = []
    size = 400 if form == RAW else 12
    for block in range(blocks):
        for name, found in answers.items():
            found.append(workers[name].ask("run", (), random_draws(size, 1 + block)))
    contenders, times = list[Contender](), dict[tuple[str, str], list[float]]()
    for name in names:
        ours, fields = name not in PEERS, dict[str, Any](wrong_data=faults.get(name))
        if name in answers:
            seconds = [answer["seconds"] for answer in answers[name]]
            fields["clips_per_s"] = round(size / statistics.median(seconds), 1)
            fields["cpu_ms"] = round(statistics.median(1e3 * answer["cpu"] / size for answer in answers[name]), 3)
            fields["rss_mib"] = round(answers[name][-1]["rss_mib"])
            times[name, "uint8"] = [1e6 * each / size for each in seconds]
        group, valid = "" if ours else "peer", name not in faults
        contenders.append(Contender(name, dtype="uint8", ours=ours, group=group, valid=valid, fields=fields))
    return rows_of(form, "read", contenders, times)


def compare_raw(rows: list[Row]) -> None:
    """Set the ratios of prepared raw to the peers on the original files."""
    peers = [row for row in rows if row["case"] in (VP9_256, H264_256) and not row["ours"] and row["valid"]]
    for row in rows:
        if row["case"] == RAW and row["valid"]:
            ratios = {f"{peer['backend']}, {peer['case']}": peer["median_us"] / row["median_us"] for peer in peers}
            ratios |= {"best peer": min(ratios.values())} if ratios else {}
            row["speedup_over"] = {name: round(ratio, 3) for name, ratio in ratios.items()}


def index_rows(root: Path, files: Files, repeats: int) -> list[Row]:
    """Time the index of 16 files, first and second time, against one plain decode of them, in turns.

    The first time with one file at a time, as the plain decode has it, and by default, one file a core.
    """
    for name in ("trainX", "trainY"):
        (root / name).mkdir(parents=True)
    for form in (VP9_256, H264_256):
        for k in range(2 * NUM_FILES):
            folder = root / ("trainX" if k < NUM_FILES else "trainY")
            (folder / f"{form} {k}.mp4").write_bytes(files[form][k % NUM_FILES].read_bytes())
    paths = sorted(root.glob("*/*.mp4"))

    def decode() -> None:
        for path in paths:
            with av.open(str(path)) as container:
                for _ in container.decode(video=0):
                    pass

    def forget() -> None:
        for manifest in root.rglob(MANIFEST):
            manifest.unlink(missing_ok=True)

    def one_at_a_time() -> None:
        for name in ("trainX", "trainY"):
            index_folder(root / name, frames=FRAMES, workers=1)

    def index() -> None:
        open_dataset(root, frames=FRAMES)

    names = ("plain decode", "one at a time", "first time", "second time")
    times: dict[tuple[str, str], list[float]] = {(name, "uint8"): [] for name in names}
    for _ in range(repeats):
        for name, call in zip(names, (decode, one_at_a_time, index, index), strict=True):
            if name in names[1:3]:
                forget()
            times[name, "uint8"].append(wall_us(call))
    contenders = [Contender(name, dtype="uint8", ours=name != "plain decode") for name in names]
    return rows_of(f"index of {len(paths)} files of {LENGTH} frames, {cores()} cores", "index", contenders, times)


def wait_row(data: Path, out: Path, steps: int) -> Row:
    """Return the share of a training's time that it waits for clips, by its own log, without the first log line."""
    command = [sys.executable, "-m", "rlv2v.train", "--data", str(data), "--out", str(out), "--steps", str(steps)]
    command += ["--warmup-steps", "2", "--no-warmup-cache", "--snapshot-seconds", "1e9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted, seconds = lines[-1]["step"] - lines[0]["step"], lines[-1]["seconds"] - lines[0]["seconds"]
    pairs = itertools.pairwise(lines)
    waited = sum(line["time_data"] * (line["step"] - previous["step"]) for previous, line in pairs)
    row: Row = {"case": "wait in training, default preset", "backend": "Loader", "ours": True, "steps": counted}
    row |= {"wait_percent": round(100 * waited / seconds, 3), "wait_ms": round(1e3 * waited / counted, 3)}
    row |= {"step_ms": round(1e3 * seconds / counted, 1), "first_wait_ms": round(1e3 * lines[0]["time_data"], 1)}
    print(f"{row['case']}: {row['wait_percent']:.3f} % of a step of {row['step_ms']:.0f} ms ({counted} steps)")
    return row


def alone(function: Callable[..., Result], *args: object) -> Result:
    """Return `function(*args)` of a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def loader_memory(root: Path, unprepared: bool, marks: tuple[int, int]) -> list[float]:
    """Return the resident MiB after each of two numbers of steps.

    unprepared: one clip of 16 frames a step, no cache; otherwise the default preset's batches.
    """
    config = Config.of("default")
    torch.set_num_threads(1)
    if unprepared:
        dataset = open_dataset(root, frames=FRAMES)
        loader = Loader(dataset, batch={"x": 1}, frames=FRAMES, size=SIZE, seed=0, cache_mib=0)
    else:
        dataset = open_dataset(root, frames=config.data.frames)
        batch = {"x": config.data.batch_x, "y": config.data.batch_y, "z": config.data.batch_z, "s": config.data.batch_s}
        loader = Loader(dataset, batch=batch, frames=config.data.frames, size=config.data.size, seed=0)
    resident = []
    for step in range(1, marks[1] + 1):
        next(loader)
        if step in marks:
            gc.collect()
            resident.append(rss_mib())
    loader.close()
    return resident


def memory_row(case: str, root: Path, unprepared: bool, marks: tuple[int, int]) -> Row:
    """Return and print the growth of the loader's memory between two numbers of steps."""
    early, late = alone(loader_memory, root, unprepared, marks)
    print(f"loader memory, {case}: {early:.0f} MiB at step {marks[0]}, {late:.0f} MiB at {marks[1]}", flush=True)
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
            versions = {name: version(package) for name, package in PACKAGES.items() if name in workers}
            bench.add([], versions=versions)
            for form, paths in files.items():
                bench.add(reading_rows(form, paths, workers, 3 if quick else args.rounds))
            compare_raw(bench.rows)
        bench.add(index_rows(root / "index", files, 2 if quick else 5))
        write_dataset(root / "synth", size=32, frames=8, seed=0, counts=Counts(val=2, test=2))
        bench.add([wait_row(root / "synth", root / "run", 11 if quick else 31)])
        marks = (100, 300) if quick else (200, 2000)
        bench.add([memory_row("default preset, synthetic set", root / "synth", False, marks)])
        bench.add([memory_row("256x256 files, no cache", root / "index", True, marks)])


if __name__ == "__main__":
    run_command(main, Args)
