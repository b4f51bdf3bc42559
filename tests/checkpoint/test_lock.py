"""The lock on a run's folder: one holder, named to the next, gone with it however it dies."""

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
def holder(run: Path, how: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that holds the lock, and the children it has made by then."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        yield process, children
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("how", ["forks", "starts"])
def test_a_killed_holder_leaves_no_lock_to_its_children(tmp_path: Path, how: str) -> None:
    with holder(tmp_path, how) as (process, children):
        assert len(children) == 1
        with pytest.raises(UserError):
            lock_folder(tmp_path)
        process.kill()
        process.wait()
        os.kill(children[0], 0)  # the child lives on
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
