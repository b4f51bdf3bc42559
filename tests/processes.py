"""Processes that tests start, how a test waits for what they say, and a disk that seems full."""

from __future__ import annotations

import os
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0
"""Seconds that a test waits for what a process is to say."""


def start(*arguments: object, environment: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` on one thread, with a pipe for its stderr."""
    line = [sys.executable, *map(str, arguments)]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env=shared | dict(environment), stderr=subprocess.PIPE, text=True, **options)


def finish(*processes: subprocess.Popen[str]) -> tuple[list[int], list[str]]:
    """Wait for the ends of processes; return their exit codes and what is left of their stderr."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors


def read_until(process: subprocess.Popen[str], pattern: str, *others: subprocess.Popen[str]) -> int:
    """Read stderr up to the line or state of a progress bar that has the pattern; return whose it was, 0 for `process`.

    It reads past `process.stderr`'s own buffer, so that `communicate` gets all the rest. Raises AssertionError, and
    kills the processes, if one's stderr ends before or the pattern does not come within `PATIENCE` seconds.
    """
    processes, end = (process, *others), time.monotonic() + PATIENCE
    texts = {p.stderr: b"" for p in processes}
    while True:
        ready = select.select(list(texts), [], [], max(0.0, end - time.monotonic()))[0]
        if not ready:
            for each in processes:
                each.kill()
        for stream in ready or texts:
            assert stream is not None
            part = os.read(stream.fileno(), 2**16)
            assert part, texts[stream].decode(errors="replace")
            texts[stream] += part
            if re.search(pattern.encode(), texts[stream]):
                return list(texts).index(stream)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process, and of those that it starts, grow longer: the disk seems full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
