"""How a test waits for what a process that it has started says."""

from __future__ import annotations

import os
import re
import subprocess


def read_until(process: subprocess.Popen[str], pattern: str) -> None:
    """Read stderr up to the line or state of a progress bar that has the pattern. It reads past `process.stderr`'s own
    buffer, so that `communicate` gets all the rest. Raises AssertionError if stderr ends before."""
    assert process.stderr is not None
    text = b""
    while not re.search(pattern.encode(), text):
        part = os.read(process.stderr.fileno(), 2**16)
        assert part, text.decode(errors="replace")
        text += part
