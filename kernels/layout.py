"""The memory layout of a sequence: logical (G,T,B,C,H,W), dense in the order G,T,B,H,W,C.

The frames that one step of the recurrence touches lie side by side, so that neither a step's convolution nor one over
all T needs a copy. Channels come last because oneDNN and the tensor cores convolve this order without reordering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType of csrc/float_type.h


def empty_frames(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return uninitialised memory of logical shape (..., C,H,W), channels last, of `like`'s device and dtype."""
    *outer, channels, height, width = shape
    memory = torch.empty(*outer, height, width, channels, dtype=dtype or like.dtype, device=like.device)
    return memory.movedim(-1, -3)


def is_dense(frames: Tensor) -> bool:
    """Return whether frames (..., C,H,W) are dense in this layout."""
    return frames.movedim(-3, -1).is_contiguous()


def dense(frames: Tensor) -> Tensor:
    """Return the same values dense in this layout: the tensor itself, or a copy if it is not dense."""
    return frames if is_dense(frames) else frames.movedim(-3, -1).contiguous().movedim(-1, -3)


def dense_or_none(frames: Tensor | None) -> Tensor | None:
    """Return `dense` of a state that may be missing."""
    return None if frames is None else dense(frames)


def video_strides(shape: Sequence[int]) -> tuple[int, int, int, int, int]:
    """Return the strides of frames (B,T,C,H,W) that are dense in the order T,B,H,W,C."""
    batch, _, channels, height, width = shape
    frame = channels * height * width
    return frame, batch * frame, 1, width * channels, channels


def empty_video(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return uninitialised memory of logical shape (B,T,C,H,W), dense in the order T,B,H,W,C, of `like`'s dtype."""
    return torch.empty_strided(shape, video_strides(shape), dtype=like.dtype, device=like.device)


def dense_video(video: Tensor) -> Tensor:
    """Return the same values (B,T,C,H,W) dense in the order T,B,H,W,C: the tensor itself, or a copy if it is not."""
    if video.stride() == video_strides(video.shape):
        return video
    # Strides of axes of size 1 do not count.
    return video.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)


def like_weight(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a weight or its gradient (G,4C,C_in,k,k): channels-last in memory if `weight` is, else contiguous.

    The libraries take and return channels-last weights without reordering beside channels-last frames.
    """
    return dense(tensor) if channels_last(weight) else tensor.contiguous()


def channels_last(weight: Tensor) -> bool:
    """Return whether a weight (G,4C,C_in,k,k) is dense with its input channels last, and not contiguous as well."""
    return weight.dim() > 2 and not weight.is_contiguous() and is_dense(weight)


def stack_groups(groups: list[Tensor | None] | tuple[Tensor | None, ...]) -> Tensor | None:
    """Return the tensors of G groups as one with a leading axis; one group needs no copy. None if the first is None."""
    first = groups[0]
    if first is None:
        return None
    if len(groups) == 1:
        return first.unsqueeze(0)
    shape = (len(groups), *first.shape)
    stacked = empty_frames(first, *shape) if first.dim() > 2 else first.new_empty(shape)
    for slot, group in zip(stacked, groups, strict=True):
        slot.copy_(group)
    return stacked


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the cells: float32 if x has 16 bits, else x's."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def gates_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of activated gates kept for the backward: float16 if x has 16 bits (bfloat16 too), else x's.

    Gates lie in (-1, 1), where float16 has three bits more: the gradient's error falls from 5.2e-3 to 3.3e-3.
    """
    return torch.float16 if dtype.itemsize == 2 else dtype
