"""A replay state as one file: safetensors, with a checksum over everything, written whole or not at all.

The numbers are JSON in the header's metadata under "state"; "checksum" is XXH64 over that text, then over each array in
order (name, dtype, shape, bytes), chained. A file with one wrong bit in either is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlv2v import _native
from rlv2v.errors import UserError


def write_state(path: Path, state: Mapping[str, Any], arrays: Sequence[str]) -> None:
    """Writes beside path, flushes to the disk and renames: path is always the old file or the whole new one."""
    tensors = {name: state[name] for name in arrays}
    numbers = json.dumps({name: value for name, value in state.items() if name not in tensors})
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, {"state": numbers, "checksum": _checksum(numbers, tensors)})
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"replay: cannot write {path}; check its folder and the free space ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def read_state(path: Path, arrays: Sequence[str]) -> dict[str, Any]:
    """What `write_state` wrote; UserError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in arrays}
        numbers = metadata["state"]
        if metadata["checksum"] != _checksum(numbers, tensors):
            raise UserError(f"replay: {path} must be as save() wrote it, got a wrong checksum: the file is damaged")
        return json.loads(numbers) | tensors
    except OSError as error:
        raise UserError(f"replay: cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"replay: {path} must be a file that save() wrote, got a broken or foreign one") from error


def _checksum(numbers: str, tensors: Mapping[str, torch.Tensor]) -> str:
    sums = [_native.checksum(np.frombuffer(numbers.encode(), np.uint8))]
    for name, tensor in tensors.items():
        described = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        sums.append(_native.checksum(np.frombuffer(described.encode(), np.uint8)))
        sums.append(_native.checksum(tensor.numpy().reshape(-1).view(np.uint8)))
    return f"{_native.checksum(np.array(sums, np.uint64).view(np.uint8)):016x}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
