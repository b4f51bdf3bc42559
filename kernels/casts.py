"""The casts that autocast asks for, and how a weight is cast once however often it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_casts: ContextVar[dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)
"""By a weight's identity and a dtype, the weight and what was cast from it."""


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Keep what autocast makes of the layers' weights for their next uses inside, where none may change.

    Each use has a gradient of its own, in the weight's dtype, and they are summed in it. What torch's autocast keeps
    (`cache_enabled`) has one gradient, summed in 16 bits.
    """
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def dtype_of_autocast(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that torch's own autocast casts to, for floating point but float64; None: it casts nothing."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def autocast(tensor: Tensor) -> Tensor:
    """Cast as torch's own autocast does."""
    dtype = dtype_of_autocast(tensor)
    return tensor if dtype is None else tensor.to(dtype)


def autocast_weight(weight: Tensor) -> Tensor:
    """Cast a weight as `autocast` does, in `weights_cast_once` once."""
    dtype, casts = dtype_of_autocast(weight), None if torch.compiler.is_compiling() else _casts.get()
    if dtype is None or dtype == weight.dtype or casts is None or not weight.is_leaf:
        return autocast(weight)
    if (id(weight), dtype) not in casts:
        casts[id(weight), dtype] = weight, weight.detach().to(dtype)
    made = casts[id(weight), dtype][1]
    return CastWeight.apply(weight, made) if weight.requires_grad else made


class CastWeight(torch.autograd.Function):
    """Stand for a weight by what was cast from it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, made: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None
