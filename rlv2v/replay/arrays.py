"""Convert what a caller passes to the replay buffer to numpy arrays, or name what is wrong with it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

F32, F64, I64, BOOL = (np.dtype(kind) for kind in (np.float32, np.float64, np.int64, np.bool_))
_KINDS = {"i": ("integers", "iu"), "f": ("real numbers", "fiu"), "b": ("booleans", "b")}
_SCALARS: dict[str, tuple[type, ...]] = {
    "i": (int, np.int64),
    "f": (float, np.float32, np.float64),
    "b": (bool, np.bool_),
}


def integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """Return value as an int in least..most."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"replay: {name} must be an integer, got {type(value).__name__}") from None
    if not least <= number <= most:
        raise ValueError(f"replay: {name} must be in {least}..{most}, got {number}")
    return number


def as_array(value: Any) -> npt.NDArray[Any]:
    """Return value as numpy sees it, over the same memory where it has a buffer or DLPack on the CPU."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, torch.Tensor):
        return value.numpy(force=True)
    return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)


def as_ids(value: Any) -> npt.NDArray[np.int64]:
    """Return value as ids, int64 (n,)."""
    return as_column("ids", value, I64, None)


def as_output(value: Any) -> npt.NDArray[Any]:
    """Return the memory of an array or CPU tensor that a sample is to be written to."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        raise ValueError(f"replay: out must be on the CPU, got a tensor on {value.device}")
    return as_array(value)


def as_column(name: str, value: Any, dtype: np.dtype[Any], count: int | None) -> npt.NDArray[Any]:
    """Return value as dtype (count,); one number stands for all. Only integers are converted, to reals."""
    array = as_array(value)
    if array.dtype is dtype and array.ndim == 1 and (count is None or len(array) == count):
        return array
    kind, accepted = _KINDS[dtype.kind]
    if array.size and array.dtype.kind not in accepted:
        raise ValueError(f"replay: {name} must be {kind}, got {array.dtype}")
    if array.ndim == 0:
        array = np.full(1 if count is None else count, array)
    if array.ndim != 1 or count not in (None, len(array)):
        raise ValueError(f"replay: {name} must have shape ({'n' if count is None else count},), got {array.shape}")
    with np.errstate(over="ignore"):  # to infinity, which the core refuses by name
        return array.astype(dtype)


def as_number(name: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """Return value as one number, by the rules of a column of dtype."""
    if type(value) in _SCALARS[dtype.kind] and (dtype is not I64 or -(2**63) <= value < 2**63):
        return value
    return as_column(name, value, dtype, 1)[0].item()


def as_flag(name: str, value: Any, count: int) -> npt.NDArray[np.bool_] | None:
    """Return value as bool (count,), or None where it is False for all."""
    return None if value is False else as_column(name, value, BOOL, count)
