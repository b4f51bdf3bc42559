"""How long the index takes beside a plain PyAV decode of the same files, and how long when nothing has changed.

`python tests/index_speed.py` makes the clips in a temporary folder and prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from rlv2v.data.index import MANIFEST, index_folder

CODECS = (
    ("libx264", {"preset": "veryfast"}),
    ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0", "auto-alt-ref": "0"}),
)


def write_moving_clips(folder: Path, *, num: int = 20, frames: int = 250, size: int = 256) -> None:
    """H.264 and VP9 in turn, GOP 16: a coarse pattern that moves by (1,2) pixels a frame."""
    tile = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    ground = np.tile(tile, (2 + size // 256, 2 + size // 256, 1))
    for n in range(num):
        codec, options = CODECS[n % 2]
        with av.open(str(folder / f"{n}.mp4"), "w") as output:
            stream = output.add_stream(codec, rate=25, options={"g": "16", **options})
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for t in range(frames):
                y, x = t % 256, (2 * t + 9 * n) % 256
                part = np.ascontiguousarray(ground[y : y + size, x : x + size])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24")))
            output.mux(stream.encode(None))


def decode_plainly(folder: Path) -> None:
    """Every frame of every MP4, by PyAV as it comes."""
    for path in sorted(folder.glob("*.mp4")):
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                pass


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_index(folder: Path, *, rounds: int = 5, workers: int | None = 1) -> dict[str, float]:
    """Medians over interleaved rounds; with 1 worker both sides decode file after file with PyAV's own settings."""
    rows = []
    for _ in range(rounds):
        (folder / MANIFEST).unlink(missing_ok=True)
        plain = seconds(lambda: decode_plainly(folder))
        first = seconds(lambda: index_folder(folder, frames=8, workers=workers))
        second = seconds(lambda: index_folder(folder, frames=8, workers=workers))
        rows.append((plain, first, second, first / plain, first / second))
    names = ("plain_s", "index_s", "again_s", "index_over_plain", "again_times_faster")
    return {
        name: round(statistics.median(column), 4) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_moving_clips(Path(folder))
        print(
            json.dumps({"one worker": measure_index(Path(folder)), "auto": measure_index(Path(folder), workers=None)})
        )
