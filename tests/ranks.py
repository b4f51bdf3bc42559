"""Helpers that start several ranks of one run as processes of this machine, over gloo."""

from __future__ import annotations

import socket
import subprocess

from processes import finish, start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_ranks(num: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once a rank, with the variables that torchrun would set."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]
    return [start(*arguments, environment=rank, stdout=subprocess.DEVNULL) for rank in ranks]


def run_ranks(num: int, *arguments: object) -> list[str]:
    """Run ranks to their end; return the stderr of each. Raises AssertionError if one failed."""
    codes, errors = finish(*start_ranks(num, *arguments))
    assert not any(codes), "\n".join(errors)
    return errors
