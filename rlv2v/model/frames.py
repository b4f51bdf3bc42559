"""Helpers for frames (B,T,C,H,W), for the states of networks, and for their attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle
from torch.utils._pytree import tree_map_only

State = Any  # tensors in nested tuples


class RunMode(TypedDict, total=False):
    """Keywords of a block's or network's `forward` that change what its state means, see `rlv2v.model.blocks`."""

    all_states: bool
    one_step_from_each: bool


def frame_major(x: Tensor) -> Tensor:
    """Return all frames (B,T,...) along one axis, (T*B,...); no copy where they come from a ConvLSTM."""
    return x.transpose(0, 1).flatten(0, 1)


def batch_major(frames: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of `frame_major` as a view: (T*B,...) -> (B,T,...), with B and T of `like`."""
    return frames.unflatten(0, (like.shape[1], like.shape[0])).transpose(0, 1)


def per_frame(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply an operation on (N,C,H,W) to every frame of x (B,T,C,H,W)."""
    return batch_major(op(frame_major(x), *args, **kwargs), x)


def cat_channels(*inputs: Tensor) -> Tensor:
    """Concatenate (B,T,C_n,H,W) along C; unlike `torch.cat` of five axes, this keeps channels-last frames so."""
    return batch_major(torch.cat([frame_major(x) for x in inputs], 1), inputs[0])


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """Fold squares of patch x patch pixels into channels: (B,T,C,H,W) -> (B,T,C patch^2,H/patch,W/patch)."""
    if x.dim() != 5 or x.shape[-2] % patch or x.shape[-1] % patch:
        raise ValueError(f"frames must be (B,T,3,H,W) with H and W multiples of {patch} (patch), got {tuple(x.shape)}")
    return x if patch == 1 else per_frame(pixel_unshuffle, x, patch)


def map_state(fn: Any, state: State) -> State:
    """Apply `fn` to every tensor of a state and keep the state's structure."""
    return tree_map_only(Tensor, fn, state)


@contextmanager
def attributes_set(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give attributes (object, name, value) their values, and the old ones back at the end."""
    new = list(attributes)
    old = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    try:
        for owner, name, value in new:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in old:
            setattr(owner, name, value)
