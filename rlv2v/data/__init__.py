"""Turn video files into training batches.

index, inspect: what is usable.  sampler: what a batch is made of.  loader, dali: batches.  video, readers: frames in.
writer: frames out.  prepare: any videos to a dataset that loads fast.  synth: the paper's synthetic dataset.
"""

from __future__ import annotations

import torch


def to_model(frames: torch.Tensor) -> torch.Tensor:
    """Convert uint8 RGB (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]: x / 127.5 - 1. It stays channels-last."""
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"to_model: frames must be uint8 (..., H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1.0)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Convert float (..., 3, H, W) in [-1, 1] to uint8 RGB (..., H, W, 3), clamped and rounded; inverts `to_model`."""
    if not frames.is_floating_point() or frames.ndim < 3 or frames.shape[-3] != 3:
        raise ValueError(f"to_uint8: frames must be float (..., 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    scaled = frames.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous()
