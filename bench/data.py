"""The video path beside its peers: clips a second and CPU ms a clip on one core, the index, and what training waits.

    python bench/data.py [--json F] [--quick]

Clips of 16 frames to 64x64 at random (file, start), the same draws for all, from real street footage that is written
here in four forms, each frame stamped with its file and number. Every way of reading runs in a process of its own, all
on the same core, and must first return the right frames; the ways take turns, a block of clips each. `Loader` is
`next(loader)` end to end, `rlv2v` what one of its threads does for a clip, cache off. Peers come with
`pip install -e '.[bench]'`. A ratio is of medians of clips/s, to the best peer that returns the right frames on the
same files; for prepared raw, on either of the original 256x256 files.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace
from data_loader import alone, memory, waits
from data_peers import FRAMES, PEERS, SIZE, WAYS, Worker, stamp
from machine import commit, machine, version
from real_pair import street_clip

from rlv2v.cli import run_command
from rlv2v.data.index import MANIFEST, index_folder, open_dataset
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames, resize
from rlv2v.data.workers import cores
from rlv2v.errors import UserError

NUM_FILES, LENGTH = 4, 120
VP9 = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0"}
FORMS: dict[str, tuple[str, int, dict[str, str]]] = {
    "prepared raw 64": ("", SIZE, {}),
    "prepared video VP9 128": ("libvpx-vp9", 128, {"crf": "20", "g": "12", **VP9}),
    "unprepared VP9 256": ("libvpx-vp9", 256, {"crf": "32", "g": "16", **VP9}),
    "unprepared H.264 256": ("libx264", 256, {"crf": "23"}),
}
RAW, PREPARED, VP9_256, H264_256 = FORMS
Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """Time our ways of reading clips against others."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    quick: bool = False
    """A few turns, 6 training steps and 300 loader steps instead of 30 and 2,000."""


def footage() -> list[np.ndarray]:
    """Stamped clips of 120 frames, uint8 (256,256,3) each: windows of a street scene, moved in place and time."""
    scene = np.stack(list(read_frames(street_clip())))
    clips = []
    for file in range(NUM_FILES):
        left = file * (scene.shape[2] - 256) // NUM_FILES
        frames = (scene[(file * 37 + t) % len(scene), 8:264, left : left + 256] for t in range(LENGTH))
        clips.append(np.stack([stamp(frame, file, t) for t, frame in enumerate(frames)]))
    return clips


def write_video(path: Path, clip: np.ndarray, codec: str, options: dict[str, str]) -> None:
    """uint8 (T,H,W,3) as yuv420p, BT.601 limited range, constant quality, 30 frames a second."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.codec_context.bit_rate = 0
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def write_forms(root: Path) -> dict[str, list[Path]]:
    """The files of each form."""
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
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(NUM_FILES)), int(rng.integers(LENGTH - FRAMES + 1))) for _ in range(count)]


def start(stack: ExitStack, libraries: Path) -> tuple[dict[str, Worker], dict[str, str]]:
    """The processes that could import their library, and why the others could not."""
    workers, missing = {}, {}
    for name in WAYS:
        worker = stack.enter_context(Worker(name, libraries))
        try:
            worker.ask("import")
            workers[name] = worker
        except RuntimeError as error:
            if name not in PEERS:
                raise
            missing[name] = str(error).removeprefix(f"{name}: ")
    return workers, missing


def case_rows(form: str, files: list[Path], workers: dict[str, Worker], blocks: int) -> list[Row]:
    """One row for each way that reads the form."""
    names = [name for name in workers if form != RAW or name not in PEERS]
    faults: dict[str, str] = {}
    for name in names:
        try:
            asked = random_draws(24, 0)
            wrong = workers[name].ask("open", files, asked)["wrong"]
            if wrong:
                faults[name] = f"{wrong} of {len(asked) * FRAMES} frames"
        except RuntimeError as error:
            faults[name] = str(error).removeprefix(f"{name}: ")
    size = 400 if form == RAW else 12
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in names if name not in faults}
    for block in range(blocks):
        for name, found in answers.items():
            found.append(workers[name].ask("run", (), random_draws(size, 1 + block)))
    rows = []
    for name in names:
        row: Row = {"case": form, "backend": name, "pass": "read", "dtype": "uint8", "valid": name not in faults}
        row["wrong_data"] = faults.get(name)
        if name in answers:
            p20, p50, p80 = quantiles([size / a["seconds"] for a in answers[name]], n=10)[1::3]
            row |= {"clips_per_s": round(p50, 1), "p20": round(p20, 1), "p80": round(p80, 1)}
            row["cpu_ms"] = round(median(1e3 * a["cpu"] / size for a in answers[name]), 3)
            row["rss_mib"] = round(answers[name][-1]["rss_mib"])
        rows.append(row)
    return rows


def compare(rows: list[Row]) -> None:
    """Add to each valid row its ratio to the best valid peer, by clips/s and by CPU time."""
    valid = [row for row in rows if row["valid"]]
    for row in valid:
        forms = (VP9_256, H264_256) if row["case"] == RAW else (row["case"],)
        peers = [p for p in valid if p["backend"] in PEERS and p["backend"] != row["backend"] and p["case"] in forms]
        if peers:
            best = max(peers, key=lambda p: p["clips_per_s"])
            row |= {"best_peer": best["backend"], "ratio": round(row["clips_per_s"] / best["clips_per_s"], 3)}
            row["cpu_ratio"] = round(min(p["cpu_ms"] for p in peers) / row["cpu_ms"], 3)


def print_rows(rows: list[Row]) -> None:
    print("case | way | clips/s p50 p20 p80 | CPU ms | x best peer, by CPU | RSS MiB | wrong frames")
    for row in rows:
        head = f"{row['case']:22} | {row['backend']:10}"
        if not row["valid"]:
            print(f"{head} | not counted: {row['wrong_data']}")
            continue
        rate = f"{row['clips_per_s']:8.1f} {row['p20']:8.1f} {row['p80']:8.1f} | {row['cpu_ms']:7.2f}"
        ratio = f"{row['ratio']:6.2f} {row['cpu_ratio']:6.2f} {row['best_peer']}" if "ratio" in row else ""
        print(f"{head} | {rate} | {ratio:24} | {row['rss_mib']:4} |", flush=True)


def took(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def index_rows(root: Path, files: dict[str, list[Path]], repeats: int) -> list[Row]:
    """Indexing of 16 files, first and second time, against one plain decode of them, in turns.

    The first time with one file at a time, as the plain decode has it, and as it is by default, one a core.
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

    times: dict[str, list[float]] = {"plain decode": [], "one at a time": [], "first run": [], "second run": []}
    for _ in range(repeats):
        times["plain decode"].append(took(decode))
        forget()
        times["one at a time"].append(took(one_at_a_time))
        forget()
        times["first run"].append(took(lambda: open_dataset(root, frames=FRAMES)))
        times["second run"] += [took(lambda: open_dataset(root, frames=FRAMES)) for _ in range(3)]
    plain, one, first, second = (median(found) for found in times.values())
    row: Row = {"case": f"index of {len(paths)} files of {LENGTH} frames", "backend": "rlv2v", "repeats": repeats}
    row |= {"plain_decode_ms": round(1e3 * plain), "one_at_a_time_ms": round(1e3 * one), "first_ms": round(1e3 * first)}
    row |= {"second_ms": round(1e3 * second, 2), "cores": cores(), "one_at_a_time_over_plain": round(one / plain, 3)}
    row |= {"first_over_plain": round(first / plain, 3), "first_over_second": round(first / second, 1)}
    print(
        f"{row['case']}: plain decode {1e3 * plain:.0f} ms, one at a time {1e3 * one:.0f} ms ({one / plain:.2f} x), "
        f"on {cores()} cores {1e3 * first:.0f} ms ({first / plain:.2f} x), again {1e3 * second:.1f} ms "
        f"({first / second:.0f} x faster)",
        flush=True,
    )
    return [row]


def loader_rows(root: Path, unprepared: Path, quick: bool) -> list[Row]:
    """What a training step waits, and the loader's memory."""
    write_dataset(root / "synth", size=32, frames=8, seed=0, counts=Counts(val=2, test=2))
    wait = alone(waits, root / "synth", root / "run", 6 if quick else 30)
    rows: list[Row] = [{"case": "wait in training, default preset", "backend": "Loader", **wait}]
    print(
        f"wait in training, default preset: {wait['wait_percent']:.3f}% of a step of {wait['step_ms']:.0f} ms "
        f"({wait['steps']} steps; the first waits {wait['first_wait_ms']:.0f} ms)"
    )
    marks = (100, 300) if quick else (200, 2000)
    for case, folder, plain in (
        ("default preset, synthetic set", root / "synth", False),
        ("256x256 files, no cache", unprepared, True),
    ):
        early, late = alone(memory, folder, plain, marks)
        rows.append({"case": f"loader memory, {case}", "backend": "Loader", "steps": marks})
        rows[-1] |= {"rss_mib": [round(early, 1), round(late, 1)], "growth_percent": round(100 * (late / early - 1), 2)}
        print(f"{rows[-1]['case']}: {early:.0f} MiB at step {marks[0]}, {late:.0f} MiB at {marks[1]}", flush=True)
    return rows


def main(args: Args) -> None:
    """Check, time, print the tables and the JSON line; exit code 1 when a way of ours returned wrong frames."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        (root / "libraries").mkdir()
        files = write_forms(root)
        workers, missing = start(stack, root / "libraries")
        for name, why in missing.items():
            print(f"{name}: not measured, {why}")
        rows: list[Row] = []
        for form, paths in files.items():
            rows += case_rows(form, paths, workers, 3 if args.quick else 30)
        compare(rows)
        print_rows(rows)
        stack.close()  # before anything else is timed
        rows += index_rows(root / "index", files, 2 if args.quick else 5)
        rows += loader_rows(root, root / "index", args.quick)

    versions = {name: version(package) for name, package in PACKAGES.items() if name not in missing}
    told = {"bench": "data", "commit": commit(), "machine": machine(1), "versions": versions, "missing": missing}
    text = json.dumps(told | {"rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if any(not row.get("valid", True) and row["backend"] not in PEERS for row in rows):
        raise SystemExit(1)


PACKAGES = {"PyAV": "av", "OpenCV": "opencv-python-headless", "decord": "decord", "torchcodec": "torchcodec"}

if __name__ == "__main__":
    run_command(main, Args)
