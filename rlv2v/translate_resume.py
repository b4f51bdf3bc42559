"""Keep what a translation has done beside its output, so that `translate --resume` goes on from it after any stop.

The folder `.resume-NAME` beside the output NAME holds the encoded pictures (`packets`) or images (`images`), and
`state`, which is replaced atomically every `PIECE` frames: what the writer and the model need to go on, and what the
translation is made of. It is removed when the output is complete.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

from rlv2v import __version__
from rlv2v.checkpoint.state_files import parse_state
from rlv2v.config import Config
from rlv2v.data.index import file_key
from rlv2v.data.live import is_pipe
from rlv2v.data.sequence import is_sequence
from rlv2v.data.y4m import is_stdout
from rlv2v.errors import UserError, get_logger
from rlv2v.files import PARTIAL, write_atomically
from rlv2v.method.translation import Stream
from rlv2v.model import Generator
from rlv2v.runtime.interrupt import Stop

PIECE = 480
"""Frames from state to state: 40 times the 12 from key frame to key frame."""
STATE, REPLACES = "state", "replaces"
"""The second, an empty file, says that the output was there before and is to be replaced."""
NAMES = {STATE, REPLACES, "packets", "images"}
START_OVER = "--overwrite starts over"
log = get_logger(__name__)


def folder_of(out: Path) -> Path:
    """Return the folder in which the work for an output is kept."""
    place = out.parent.resolve() if is_sequence(out) else out
    return place.with_name(f".resume-{place.name}")


def is_stopped(out: Path) -> bool:
    """Return whether a translation to `out` was stopped and can go on."""
    return not is_stdout(out) and (folder_of(out) / STATE).exists()


def is_there(out: Path) -> bool:
    """Return whether an output is complete, and none that is to replace it was stopped."""
    exists = out.parent.is_dir() and any(out.parent.iterdir()) if is_sequence(out) else out.exists()
    return exists and not (is_stopped(out) and (folder_of(out) / REPLACES).exists())


def reason_against(source: Path, out: Path, input_format: str | None) -> str:
    """Return why a translation cannot go on after a stop; empty if it can."""
    if is_pipe(source) or input_format is not None:
        return f"{source} can be read once only"
    if not (source.is_file() or source.is_dir()):
        return f"{source} is neither a file nor a folder"
    if is_stdout(out):
        return "what went to stdout is gone"
    return "a GIF is not written in pieces" if out.suffix.lower() == ".gif" else ""


def made_of(g: Generator, config: Config, source: Path, out: Path, flags: Mapping[str, Any]) -> dict[str, str]:
    """Return by name what decides each bit of a translation; flags: by their names as attributes."""
    model = hashlib.sha256(config.to_json().encode())
    for name, value in g.state_dict().items():
        model.update(name.encode())
        model.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    parts: dict[str, Any] = {
        "IN": file_key(source),
        "OUT": out.name,
        "the model": model.hexdigest(),
        **{f"--{name.replace('_', '-')}": value for name, value in flags.items()},
        "--threads": torch.get_num_threads(),
        "--device": next(chain(g.parameters(), g.buffers())).device.type,
        "rlv2v": __version__,
        "torch": torch.__version__,
        "PyAV": av.__version__,
        "OpenCV": cv2.__version__,
        "NumPy": np.__version__,
    }
    return {name: str(value) for name, value in parts.items()}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say what differs between two results of `made_of`; empty if nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(
        f"{name} has changed"
        if name in ("IN", "the model")
        else f"{name} was {before.get(name, 'none')} and is {now.get(name, 'none')}"
        for name in names
    )


class Work:
    """Hold the work for an output that is kept, and where it goes on."""

    def __init__(self, folder: Path, parts: Mapping[str, str], saved: Mapping[str, Any] | None) -> None:
        self.folder, self._parts = folder, parts
        self.position: dict[str, Any] | None = saved["position"] if saved else None
        """Of the writer; None at the start."""
        self._snapshot = saved["snapshot"] if saved else None
        self.start = self.count = self.position["count"] if self.position else 0
        """Frames that were there at the start, and that are kept by now."""

    def restore(self, stream: Stream, first: np.ndarray) -> None:
        """Bring a stream to where the work goes on, by the first frame of the video."""
        try:
            stream.restore(self._snapshot or [], first)
        except ValueError:
            raise UserError(f"{self.folder / STATE}: is not of this model and video; {START_OVER}") from None

    def save(self, snapshot: list[Any], position: dict[str, Any]) -> None:
        """Go on from here after a stop; `position`: all before it is on the disk."""
        content = io.BytesIO()
        torch.save({"parts": dict(self._parts), "position": position, "snapshot": snapshot}, content)
        data = content.getvalue()
        write_atomically(self.folder / STATE, hashlib.sha256(data).digest() + data)
        self.count = position["count"]


def read_state(path: Path) -> dict[Any, Any]:
    """Return what `Work.save` wrote. Raises `UserError` for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {START_OVER}") from None
    digest, data = content[:32], content[32:]
    state = parse_state(data, path, "cpu") if hashlib.sha256(data).digest() == digest else {}
    if {"parts", "position", "snapshot"} - {*state}:
        raise UserError(f"{path}: is damaged, or not of a translation; {START_OVER}")
    return state


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder of that name that holds something else."""
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: is a file; expected a folder, or nothing, for work to be kept in; move it away")
        return
    foreign = [path.name for path in folder.iterdir() if path.name not in NAMES and not path.name.startswith(PARTIAL)]
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which is not of a translation; move it away")


@contextmanager
def kept_work(out: Path, parts: Mapping[str, str], *, resume: bool) -> Iterator[Work]:
    """Yield the work for an output, to be used while its lock is held; it goes on if `resume`, else it starts over.

    After an error or a signal what was saved stays, which is said. After the block nothing does.

    Raises:
        UserError: the work of before is damaged, or was made of something else.
    """
    folder = folder_of(out)
    check_folder(folder)
    saved = None
    if resume and is_stopped(out):
        saved = read_state(folder / STATE)
        if changed := changes(saved["parts"], parts):
            raise UserError(f"{out}: cannot go on where it stopped: {changed}; undo that, or {START_OVER}")
    else:
        remove(folder)
        folder.mkdir()
        if is_there(out):
            (folder / REPLACES).touch()
    work = Work(folder, parts, saved)
    try:
        yield work
    except BaseException as error:
        if work.count == 0:
            remove(folder)
            raise
        remedy = f"{work.count} frames are kept: --resume goes on, {START_OVER}"
        if isinstance(error, Stop):
            error.remedy = remedy
        elif work.count > work.start:
            log.warning("%s: %s", out, remedy)
        raise
    remove(folder)


def remove(folder: Path) -> None:
    """Remove kept work, and first what says that it can go on."""
    (folder / STATE).unlink(missing_ok=True)
    with suppress(OSError):
        shutil.rmtree(folder)
