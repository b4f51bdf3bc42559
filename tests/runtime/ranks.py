"""Helpers that start several ranks of one run as processes of this machine, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_ranks(
    num: int, arguments: Sequence[object], environment: Mapping[str, str] = {}
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once a rank, with the variables that torchrun would set."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num)
    ]


def run_ranks(num: int, arguments: Sequence[object], environment: Mapping[str, str] = {}) -> list[str]:
    """Run ranks to their end; return the stderr of each. Raises AssertionError if one failed."""
    processes = start_ranks(num, arguments, environment)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return errors
