"""Write and read a replay state as one safetensors file that a kill cannot break and that shows any wrong bit.

The numbers are JSON in the header's metadata under "state". "sha256" is the digest of that text followed by each array
in order of names: its name, dtype, shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlv2v.errors import UserError
from rlv2v.files import atomic_file


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to path, which is at all times the old file or the complete new one.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    numbers = json.dumps({name: value for name, value in state.items() if name not in tensors})
    try:
        with atomic_file(path) as partial:
            save_file(tensors, partial, {"state": numbers, "sha256": _digest(numbers, tensors)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"replay: cannot write {path}; check its folder and the free space ({error})") from error


def read_state(path: Path) -> dict[str, Any]:
    """Return the state that `write_state` wrote; no code of the file is run.

    Raises:
        UserError: the file is missing, damaged, or not of `write_state`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = metadata["state"]
        if metadata["sha256"] != _digest(numbers, tensors):
            raise UserError(f"replay: {path} must be as save() wrote it, got another SHA-256: the file is damaged")
        return json.loads(numbers) | tensors
    except OSError as error:
        raise UserError(f"replay: cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"replay: {path} must be a file that save() wrote, got a broken or foreign one") from error


def _digest(numbers: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(numbers.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
