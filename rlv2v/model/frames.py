"""Frames (B,T,C,H,W) as the layers pass them on, and the states of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

State = Any


def frame_major(x: Tensor) -> Tensor:
    """All frames (B,T,...) along one axis, (T*B,...): without a copy where they come from a ConvLSTM."""
    return x.transpose(0, 1).flatten(0, 1)


def batch_major(frames: Tensor, like: Tensor) -> Tensor:
    """The inverse of `frame_major`, as a view: (T*B,...) -> (B,T,...), B and T those of `like`."""
    return frames.unflatten(0, (like.shape[1], like.shape[0])).transpose(0, 1)


def per_frame(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply an operation on (N,C,H,W) to every frame of x (B,T,C,H,W)."""
    return batch_major(op(frame_major(x), *args, **kwargs), x)


def cat_channels(*parts: Tensor) -> Tensor:
    """Frames (B,T,C_n,H,W) -> (B,T,sum of C_n,H,W), channels last where they are, as `cat` along five axes is not."""
    return batch_major(torch.cat([frame_major(part) for part in parts], 1), parts[0])


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """Fold squares of patch x patch pixels into channels: (B,T,C,H,W) -> (B,T,C patch^2,H/patch,W/patch)."""
    if x.dim() != 5 or x.shape[-2] % patch or x.shape[-1] % patch:
        raise ValueError(f"frames must be (B,T,3,H,W) with H and W multiples of {patch} (patch), got {tuple(x.shape)}")
    return x if patch == 1 else per_frame(pixel_unshuffle, x, patch)


def map_state(fn: Any, state: State) -> State:
    """Apply `fn` to every tensor of a state, keeping its structure."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else fn(state)
    mapped = (map_state(fn, part) for part in state)
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)
