"""The casts that autocast asks for, and how a weight is cast once however often it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_casts: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)
"""By a weight's identity, it and what was cast from it."""


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


def autocast(tensor: Tensor) -> Tensor:
    """Cast as torch's own autocast does: floating point, but not float64. Anything else is left as it is."""
    kind = tensor.device.type if isinstance(tensor, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def autocast_weight(weight: Tensor) -> Tensor:
    """Cast a weight as `autocast` does, in `weights_cast_once` once."""
    casts = None if torch.compiler.is_compiling() else _casts.get()
    if casts is None or not isinstance(weight, Tensor) or not weight.is_leaf:
        return autocast(weight)
    if id(weight) not in casts:
        casts[id(weight)] = weight, autocast(weight.detach())
    made = casts[id(weight)][1]
    if made.dtype == weight.dtype:
        return weight
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
