"""What the loader costs a training: the share of a step spent in `next(loader)`, and memory over many steps.

Each function runs in a process of its own (`alone`), so that the memory is its own.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import torch
from data_peers import FRAMES, SIZE, rss_mib

from rlv2v import train
from rlv2v.config import Config
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import Batch, Loader

Result = TypeVar("Result")


def alone(function: Callable[..., Result], *args: object) -> Result:
    """`function(*args)` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def waits(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """A training of the default preset with a clock around `next(loader)`; the first step fills the queue and is apart.

    share: sum of waits / sum of steps, each from one `next(loader)` to the one after; the snapshots lie outside.
    """
    began: list[float] = []
    ended: list[float] = []

    class Timed(Loader):
        def __next__(self) -> Batch:
            began.append(time.perf_counter())
            batch = super().__next__()
            ended.append(time.perf_counter())
            return batch

    train.Loader = Timed  # type: ignore[attr-defined]
    short: dict[str, Any] = {"warmup_steps": 2, "snapshot_seconds": 1e9}
    with redirect_stderr(io.StringIO()):  # progress bars
        train.train(Config.of("default", data=data, out=out, steps=steps, **short))
    waited = sum(end - begin for begin, end in zip(began[1:-1], ended[1:-1], strict=True))
    total = began[-1] - began[1]
    counted = len(began) - 2
    return {
        "steps": counted,
        "wait_percent": round(100 * waited / total, 3),
        "wait_ms": round(1e3 * waited / counted, 3),
        "step_ms": round(1e3 * total / counted, 1),
        "first_wait_ms": round(1e3 * (ended[0] - began[0]), 1),
    }


def memory(root: Path, unprepared: bool, marks: tuple[int, int]) -> list[float]:
    """MiB resident after each of two numbers of steps.

    unprepared: one clip of 16 frames a step, no cache; else the default preset's batches.
    """
    config = Config.of("default")
    torch.set_num_threads(1)
    if unprepared:
        dataset: Dataset = open_dataset(root, frames=FRAMES)
        loader = Loader(dataset, batch={"x": 1}, frames=FRAMES, size=SIZE, seed=0, cache_mib=0)
    else:
        dataset = open_dataset(root, frames=config.data.frames)
        batch = {"x": config.data.batch_x, "y": config.data.batch_y, "z": config.data.batch_z, "s": config.data.batch_s}
        loader = Loader(dataset, batch=batch, frames=config.data.frames, size=config.data.size, seed=0)
    found = []
    for step in range(1, marks[1] + 1):
        next(loader)
        if step in marks:
            gc.collect()
            found.append(rss_mib())
    loader.close()
    return found
