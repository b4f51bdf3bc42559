"""The files of a checkpoint: copies that training cannot change, checksums, and reading that runs no code.

A state is nested dicts (keys str or int), lists and tuples of tensors, None, bool, int, float and str: what
`torch.load(weights_only=True)` gives back without running code.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rlv2v.errors import UserError, first_line

PLAIN = (type(None), bool, int, float, str)
BUFFER = 1 << 20  # bytes; torch writes in pieces of a few, and each system call may cost the GIL


class Copier:
    """Copy states to CPU memory and reuse it for the next copy: fresh memory costs a page fault each 4 KiB.

    A copy may no longer be in use when the next one is made.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str | int, ...], Tensor] = {}

    def copy(self, name: str, state: Mapping[Any, Any], *, taken: bool = False) -> dict[Any, Any]:
        """Return a deep copy of `state`, its tensors on the CPU and complete.

        Args:
            name: the state's name, by which the memory of its last copy is found.
            taken: do not copy tensors that are on the CPU already: the caller gives them up.

        Raises:
            ValueError: the state holds something that could not be loaded again; names its place.
        """
        devices: set[torch.device] = set()
        copied = {key: self._copy(value, (name, key), taken, devices) for key, value in state.items()}
        for device in devices:  # the copies out of a device were only queued
            torch.cuda.current_stream(device).synchronize()
        return copied

    def _copy(self, value: Any, place: tuple[str | int, ...], taken: bool, devices: set[torch.device]) -> Any:
        if type(place[-1]) not in (str, int):
            raise ValueError(f"checkpoint: keys must be str or int, got {place[-1]!r} in {_path(place[:-1])}")
        if isinstance(value, Tensor):
            value = value.detach()
            return value if taken and value.device.type == "cpu" else self._copy_tensor(value, place, devices)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*place, key), taken, devices) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = (self._copy(item, (*place, number), taken, devices) for number, item in enumerate(value))
            return list(items) if isinstance(value, list) else tuple(items)
        if type(value) not in PLAIN:  # exactly: np.float64 is a float, and is refused by torch.load
            raise ValueError(
                f"checkpoint: {_path(place)} must be a tensor or a plain value, got {type(value).__name__}"
            )
        return value

    def _copy_tensor(self, value: Tensor, place: tuple[str | int, ...], devices: set[torch.device]) -> Tensor:
        memory = self._memory.get(place)
        on_device = value.device.type == "cuda"
        if memory is None or not _alike(memory, value):
            memory = self._memory[place] = torch.empty_like(value, device="cpu", pin_memory=on_device)
        memory.copy_(value, non_blocking=on_device)
        if on_device:
            devices.add(value.device)
        return memory


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def _path(place: tuple[str | int, ...]) -> str:
    return "/".join(map(str, place))


class _Sink:
    """The file that `torch.save` writes to; it keeps the first write error, whose number torch's writer loses."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            if self.error is None:
                self.file.write(data)
                self.sha256.update(data)
                self.bytes += len(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: torch calls it at the end, and the caller flushes the file."""


def write_state(path: Path, state: dict[Any, Any]) -> dict[str, Any]:
    """Write a state by `torch.save`, flush it to the disk, and return its length and SHA-256 for a manifest.

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
        return {"bytes": sink.bytes, "sha256": sink.sha256.hexdigest()}
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_file(path: Path, expected: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file that must have the length and SHA-256 that a manifest `expected`.

    Raises:
        UserError: it is missing, unreadable, or not the same; names it.
    """
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:  # checked first: a foreign file may be of any size
            raise UserError(f"{path}: expected {expected['bytes']} bytes, got {size}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a file of a checkpoint, got {error.strerror}") from None
    got = hashlib.sha256(data).hexdigest()
    if got != expected["sha256"]:
        raise UserError(f"{path}: expected the SHA-256 {expected['sha256']}, got {got}: it is damaged")
    return data


def parse_state(data: bytes, path: Path, device: str | torch.device) -> dict[Any, Any]:
    """Return what `write_state` wrote to `path`, from its bytes, with tensors on `device`; runs no code of it.

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
