"""Tests of the lock on a run's folder: one holder, named to the next, gone with it however it dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlv2v.errors import UserError
from rlv2v.files import lock_folder

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from rlv2v.files import lock_folder
lock = lock_folder(Path(sys.argv[1]))
if sys.argv[2] == "alone":
    print(flush=True)
elif sys.argv[2] == "starts":
    print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
elif os.fork() == 0:
    print(os.getpid(), flush=True)  # the child itself: it has come to run by now
time.sleep(60)
"""


@contextmanager
def holder(run: Path, kind: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a process that holds the lock; yield it and the pids of the children it has made."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    try:
        yield process, pids
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    with holder(tmp_path, "alone") as (process, _):
        with pytest.raises(UserError, match=f"{tmp_path}: another run .*pid {process.pid} on {socket.gethostname()}"):
            lock_folder(tmp_path)
        with pytest.raises(UserError, match=f"pid {process.pid}"):  # being refused has not let go of it
            lock_folder(tmp_path)
    with lock_folder(tmp_path), pytest.raises(UserError, match=rf"pid {os.getpid()} "):
        lock_folder(tmp_path)
    lock = lock_folder(tmp_path)
    lock.close()
    lock.close()
    lock_folder(tmp_path).close()


@pytest.mark.parametrize("kind", ["forks", "starts"])
def test_a_killed_holder_leaves_no_lock_to_its_children(tmp_path: Path, kind: str) -> None:
    with holder(tmp_path, kind) as (process, pids):
        assert len(pids) == 1
        with pytest.raises(UserError):
            lock_folder(tmp_path)
        process.kill()
        process.wait()
        os.kill(pids[0], 0)  # the child lives on
        lock_folder(tmp_path).close()


def test_an_unwritten_or_foreign_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff" * 500)
    lock = lock_folder(tmp_path)
    with pytest.raises(UserError, match=rf"pid {os.getpid()} "):
        lock_folder(tmp_path)
    (tmp_path / ".lock").write_bytes(b"")
    with pytest.raises(UserError, match="its pid is not known yet"):
        lock_folder(tmp_path)
    lock.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_the_run_goes_on_with_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path):
        assert f"{tmp_path}/.lock: no locks here ({os.strerror(number)})" in caplog.text


def test_other_failures_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/\.lock"):
        lock_folder(tmp_path / "nowhere")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=r"\.lock") as caught:
        lock_folder(tmp_path)
    assert caught.value.errno == errno.EIO
