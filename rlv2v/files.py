"""Files that a kill cannot break: atomic writes, and a lock that the kernel releases with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import re
import shutil
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from rlv2v.errors import UserError

PARTIAL = ".partial-"
"""How the names of files that are being written begin."""
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # on this file system
log = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same suffix to write to; then flush it to the disk and rename it to `path`.

    A failure leaves the old file, and nothing beside it.

    Raises:
        OSError: with the number the system gave, naming `path`.
    """
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is at all times the old one or the complete new one; raises as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush by themselves only
            raise
    finally:
        os.close(descriptor)


def lock_folder(run: Path) -> FileIO:
    """Lock `RUN/.lock` by flock, and return it open: its `close()`, or any death of this process, releases the lock.

    It holds this process's pid and host, for an error that names the holder, and stays. Neither a forked child nor
    a program that is started inherits the lock. On a file system without locks the run goes on with a warning.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be opened or written; `run` must exist.
    """
    return _lock(run / ".lock", f"{run}: another run is at work in it", "choose another --out")[0]


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Let nobody else write the file or folder `out` while the block runs; the lock, `.lock-NAME` beside it, goes then.

    What a writer of `out` that was killed has left half-written is removed.

    Raises:
        UserError: another process writes it.
        OSError: the folder cannot be written to, naming `out`.
    """
    path = out.with_name(f".lock-{out.name}")
    refusal = f"{out}: another run is writing it", "choose another name"
    try:
        lock, is_held = _lock(path, *refusal)
        while not (path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))):
            lock.close()  # its holder has ended and removed it meanwhile
            lock, is_held = _lock(path, *refusal)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from error
    try:
        if is_held:
            _remove_partial(out)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever has it open finds that it is not there any more
        lock.close()


def _remove_partial(out: Path) -> None:
    """Remove half-written forms of `out`, which nobody else is writing."""
    for path in out.parent.iterdir():
        if re.fullmatch(rf"{re.escape(PARTIAL)}\d+-{re.escape(out.name)}", path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _lock(path: Path, refusal: str, remedy: str) -> tuple[FileIO, bool]:
    """Return the file `path`, open, and whether it is locked: some file systems have no locks.

    refusal, remedy: how the error for a file that another process has locked begins and ends.
    """
    lock = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    # A forked child shares the open file, and would hold the lock after its parent's death.
    os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(lock)))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    except BlockingIOError:
        with lock:
            holder = _holder(lock.read(1000))
        raise UserError(f"{refusal} ({holder}); wait for it, stop it, or {remedy}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise OSError(error.errno, error.strerror, str(path)) from error
        log.warning("%s: no locks here (%s); see to it that no other run writes there", path, error.strerror)
        return lock, False
    return lock, True


def _close(reference: weakref.ref[FileIO]) -> None:
    lock = reference()
    if lock is not None:
        lock.close()


def _holder(content: bytes) -> str:
    """Return who holds a lock by the content of its file, which is empty until the holder has written it."""
    try:
        holder = json.loads(content)
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):
        return "its pid is not known yet"
