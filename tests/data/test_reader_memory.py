"""The memory that loading takes does not grow with the length of a video times the threads (Linux, macOS)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from long_clips import SIDE, write_long

SHORT, LONG = 1000, 200_000
"""Frames; FFmpeg's own table of an open MP4 takes about 40 bytes a frame, and building it as much again."""
PEAK = """
import resource, sys
from pathlib import Path
from rlv2v.data.index import open_dataset
from rlv2v.data.loader import Loader
dataset = open_dataset(Path(sys.argv[1]), frames=4)
if threads := int(sys.argv[2]):
    batch = {"x": 4, "y": 1}
    loader = Loader(dataset, batch=batch, frames=4, size=int(sys.argv[3]), seed=0, threads=threads, cache_mib=0)
    for _ in range(8):
        next(loader)
print(dataset.sets["x"][0].num_frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(root: Path, threads: int, num: int) -> int:
    """Return the peak memory of a process that indexes a dataset and, with `threads`, loads batches of it."""
    line = [sys.executable, "-c", PEAK, str(root), str(threads), str(SIDE)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=True)
    frames, memory = map(int, done.stdout.split())
    assert frames == num
    return memory


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_memory_does_not_grow_with_length_and_threads(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("resource", reason="the peak of a process is known on POSIX alone")
    peaks = {}
    for num in (SHORT, LONG):
        for name in ("trainX", "trainY"):
            (tmp_path / str(num) / name).mkdir(parents=True)
        write_long(tmp_path / str(num) / "trainX" / f"a{suffix}", num, tmp_path)
        write_long(tmp_path / str(num) / "trainY" / "b.mp4", 100, tmp_path)
        peaks[num] = {threads: peak(tmp_path / str(num), threads, num) for threads in (0, 1, 4)}
    assert peaks[LONG][0] <= 1.1 * peaks[SHORT][0], "the index"
    for threads in (1, 4):
        assert peaks[LONG][threads] <= 1.1 * peaks[SHORT][threads], f"the loader with {threads} threads"
