"""Memory of a sequence inside the fused backends: logical (G,T,B,C,H,W), dense in the order G,T,B,H,W,C.

Frame-major: the frames that one step of the recurrence touches lie side by side, so a step's convolution needs no copy,
and neither do those over all T. Channels-last: the layout in which oneDNN and the tensor cores convolve unreordered.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_frames(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of logical shape (..., C,H,W), channels last, on the device and of the dtype of `like`."""
    *outer, channels, height, width = shape
    memory = torch.empty(*outer, height, width, channels, dtype=dtype or like.dtype, device=like.device)
    return memory.movedim(-1, -3)


def dense(frames: Tensor) -> Tensor:
    """The same values dense in this layout; the tensor itself where it is so already."""
    inside_out = frames.movedim(-3, -1)
    return frames if inside_out.is_contiguous() else inside_out.contiguous().movedim(-1, -3)


def like_weight(tensor: Tensor, weight: Tensor) -> Tensor:
    """A weight or its gradient (G,4C,C_in,k,k): channels-last in memory where `weight` is, else contiguous.

    Channels-last is what the libraries take and give without reordering beside channels-last frames.
    """
    return dense(tensor) if channels_last(weight) else tensor.contiguous()


def channels_last(weight: Tensor) -> bool:
    """Whether a weight (G,4C,C_in,k,k), not contiguous, is dense with its input channels last."""
    return weight.dim() > 2 and not weight.is_contiguous() and weight.movedim(-3, -1).is_contiguous()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the cells: float32 where x has 16 bits, else as x."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def gates_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the activated gates that are kept for the backward: float16 where x has 16 bits, also for bfloat16, else as x.

    They lie in (-1, 1), where float16 has three bits more: the gradient's error falls from 5.2e-3 to 3.3e-3.
    """
    return torch.float16 if dtype.itemsize == 2 else dtype
