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


def read_until(process: subprocess.Popen[str], pattern: str) -> None:
    """Read stderr up to the line or state of a progress bar that has the pattern. It reads past `process.stderr`'s own
    buffer, so that `communicate` gets all the rest. Raises AssertionError, and kills the process, if stderr ends before
    or the pattern does not come within `PATIENCE` seconds."""
    assert process.stderr is not None
    text, end = b"", time.monotonic() + PATIENCE
    while not re.search(pattern.encode(), text):
        if not select.select([process.stderr], [], [], max(0.0, end - time.monotonic()))[0]:
            process.kill()
        part = os.read(process.stderr.fileno(), 2**16)
        assert part, text.decode(errors="replace")
        text += part


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process, and of those that it starts, grow longer: the disk seems full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
