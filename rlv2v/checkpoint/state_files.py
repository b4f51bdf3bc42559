"""What a checkpoint is made of: copies that training cannot touch, files with a checksum, and their safe reading.

A state is nested dicts (keys str or int), lists and tuples of tensors, None, bool, int, float and str: what
`torch.load(weights_only=True)` gives back without running code.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from rlv2v.errors import UserError, first_line

PLAIN = (type(None), bool, int, float, str)
BUFFER = 1 << 20  # bytes; torch writes in pieces of a few, and each system call may cost the GIL

# The pages of a file that was just written, as they are: reading it into fresh memory took eight times as long.
MAPPED: Final = {"flags": mmap.MAP_SHARED | mmap.MAP_POPULATE, "prot": mmap.PROT_READ}


class Copier:
    """Copies states to CPU memory that serves again for the next copy: fresh memory costs a page fault each 4 KiB.

    The copy before must not be in use any more when the next one is made.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str | int, ...], Tensor] = {}

    def copy(self, name: str, state: Mapping[Any, Any], *, taken: bool = False) -> dict[Any, Any]:
        """A deep copy of `state`, its tensors on the CPU; complete when this returns.

        Args:
            name: what the state is called; the memory of the copy before is found by it.
            taken: tensors that are on the CPU already are not copied: the caller gives them up.

        Raises:
            ValueError: the state holds what could not be loaded again, named by its place.
        """
        devices: set[torch.device] = set()
        copied = {key: self._copy(value, (name, key), taken, devices) for key, value in state.items()}
        for device in devices:  # the copies out of a device were only queued
            torch.cuda.current_stream(device).synchronize()
        return copied

    def _copy(self, value: Any, at: tuple[str | int, ...], taken: bool, devices: set[torch.device]) -> Any:
        if type(at[-1]) not in (str, int):
            raise ValueError(f"checkpoint: keys must be str or int, got {at[-1]!r} in {_place(at[:-1])}")
        if isinstance(value, Tensor):
            value = value.detach()
            return value if taken and value.device.type == "cpu" else self._copy_tensor(value, at, devices)
        if isinstance(value, Mapping):
            return {key: self._copy(part, (*at, key), taken, devices) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = (self._copy(part, (*at, number), taken, devices) for number, part in enumerate(value))
            return list(parts) if isinstance(value, list) else tuple(parts)
        if type(value) not in PLAIN:  # exactly: np.float64 is a float, and is refused by torch.load
            raise ValueError(f"checkpoint: {_place(at)} must be a tensor or a plain value, got {type(value).__name__}")
        return value

    def _copy_tensor(self, value: Tensor, at: tuple[str | int, ...], devices: set[torch.device]) -> Tensor:
        memory = self._memory.get(at)
        on_device = value.device.type == "cuda"
        if memory is None or _form(memory) != _form(value):
            memory = self._memory[at] = torch.empty_like(value, device="cpu", pin_memory=on_device)
        memory.copy_(value, non_blocking=on_device)
        if on_device:
            devices.add(value.device)
        return memory


def _form(value: Tensor) -> tuple[object, ...]:
    return value.dtype, value.shape, value.stride()


def _place(at: tuple[str | int, ...]) -> str:
    return "/".join(map(str, at))


class _Sink:
    """A file as `torch.save` sees it. torch's writer loses a write error's name, so that it is kept here instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """torch calls it at the end; the file is flushed when it is closed."""


def write_state(path: Path, state: dict[Any, Any]) -> dict[str, Any]:
    """Write a state by `torch.save`, flush it to the disk, and describe it as `describe` does.

    Raises:
        OSError: with the number the system gave, naming `path`.
    """
    try:
        with path.open("wb", buffering=BUFFER) as file:
            sink = _Sink(file)
            torch.save(state, sink)  # type: ignore[arg-type]
            if sink.error is not None:
                raise sink.error
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb") as written, mmap.mmap(written.fileno(), 0, **MAPPED) as pages:
            return describe(pages)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def describe(data: bytes | mmap.mmap) -> dict[str, Any]:
    """Return the length and the SHA-256 of a file's bytes, as a manifest records them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_file(path: Path, expected: Mapping[str, Any]) -> bytes:
    """The bytes of a file that must be as `describe` described it.

    Raises:
        UserError: it is missing, unreadable, or not the same; names it.
    """
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:  # before the reading: a foreign file may be of any size
            raise UserError(f"{path}: expected {expected['bytes']} bytes, got {size}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a file of a checkpoint, got {error.strerror}") from None
    got = describe(data)
    if got != expected:
        raise UserError(f"{path}: expected the SHA-256 {expected['sha256']}, got {got['sha256']}: it is damaged")
    return data


def parse_state(data: bytes, path: Path, device: str | torch.device) -> dict[Any, Any]:
    """What `write_state` wrote, from the bytes of `path`, its tensors on `device`; no code of it is run.

    Raises:
        UserError: it is anything else; names `path`.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a hostile file makes torch's reader raise nearly anything
        raise UserError(f"{path}: expected a state written by rlv2v, got {first_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a state written by rlv2v, got a {type(state).__name__}")
    return state
