"""Files that a kill cannot break: atomic writes, and a lock that the kernel releases with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import socket
import weakref
from pathlib import Path

from rlv2v.errors import UserError

NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
log = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside `path`, flush to the disk, and rename into place; nothing is left on failure.

    Raises:
        OSError: with the number the system gave, naming `path`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: what was renamed in it stays renamed after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do it of themselves only
            raise
    finally:
        os.close(descriptor)


class Lock:
    """A held lock; `close()` or the end of a `with` block releases it, and so does any death of this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        # A forked child shares the open file, and would hold the lock on after its parent's death.
        os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(self)))

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_folder(run: Path) -> Lock:
    """Hold `RUN/.lock` by flock, with the pid and the host of this process in it for others to name.

    Children inherit nothing: neither a forked one nor a program that is started keeps the lock. The file stays. On a
    file system that has no locks the run goes on with a warning.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be opened or written; `run` must exist.
    """
    path = run / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise UserError(
            f"{run}: another run is at work in it ({holder}); wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            os.close(descriptor)
            raise OSError(error.errno, error.strerror, str(path)) from error
        log.warning("%s: no locks here (%s); see to it that no other run uses the folder", path, error.strerror)
        return Lock(descriptor)
    lock = Lock(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:
        lock.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return lock


def _close(held: weakref.ref[Lock]) -> None:
    lock = held()
    if lock is not None:
        lock.close()


def _holder(descriptor: int) -> str:
    """What the lock's file says of who holds it; it may be between taking the lock and writing this."""
    try:
        told = json.loads(os.pread(descriptor, 1000, 0))
        return f"pid {told['pid']} on {told['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "its pid is not known yet"
