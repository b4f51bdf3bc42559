"""Launch the Triton kernels of the bilateral grid. Triton is imported on first use."""

from __future__ import annotations

import torch
from torch import Tensor

from rlv2v.kernels.triton.recurrence import Launch, launch, unavailable_reason

__all__ = ["backward", "forward", "unavailable_reason"]
BLOCK = 256  # pixels of a program; with four warps two a thread


def sizes(grid: Tensor, frames: Tensor) -> dict[str, int]:
    """Return the arguments that every kernel takes, by name."""
    *_, height, width = frames.shape
    bins, grid_height, grid_width = grid.shape[2:]
    of_grid = {"grid_height": grid_height, "grid_width": grid_width, "BINS": bins}
    return {"height": height, "width": width, **of_grid, "BLOCK": BLOCK}


def programs(frames: Tensor) -> tuple[int, int, int]:
    """Return the grid of a kernel that takes every pixel once."""
    batch, _, height, width = frames.shape
    return -(-height * width // BLOCK), batch, 1


def forward(grid: Tensor, guide: Tensor, frames: Tensor, run: Launch = launch) -> Tensor:
    """Return the transformed frames; tensors as in `rlv2v.kernels.bilateral.slice_apply`, all dense."""
    from rlv2v.kernels.triton import slice_kernels

    out = torch.empty_like(frames)
    if out.numel():
        tensors = {"tables": grid, "guide": guide, "frames": frames, "out": out}
        unused = dict.fromkeys(("d_out", "d_guide", "d_frames"), out)
        arguments = tensors | unused | sizes(grid, frames) | {"BACKWARD": False}
        run(slice_kernels.slice_apply, programs(frames), arguments)
    return out


def backward(
    grid: Tensor, guide: Tensor, frames: Tensor, d_out: Tensor, need: list[bool], run: Launch = launch
) -> list[Tensor | None]:
    """Return the gradients of grid, guide and frames; None where not needed."""
    from rlv2v.kernels.triton import slice_kernels

    for_grid, for_guide, for_frames = need
    d_grid = torch.zeros_like(grid) if for_grid else None
    pixels = (torch.empty_like(guide), torch.empty_like(frames)) if for_guide or for_frames else (None, None)
    common = sizes(grid, frames)
    if len(frames):
        tensors = {"guide": guide, "frames": frames, "d_out": d_out}
        if d_grid is not None:
            launches = common["grid_height"] * common["grid_width"], common["BINS"], len(frames)
            run(slice_kernels.grid_gradient, launches, {**tensors, "d_grid": d_grid, **common})
        if pixels[0] is not None:
            tensors |= {"tables": grid, "out": frames, "d_guide": pixels[0], "d_frames": pixels[1]}
            run(slice_kernels.slice_apply, programs(frames), {**tensors, **common, "BACKWARD": True})
    return [d_grid, pixels[0] if for_guide else None, pixels[1] if for_frames else None]
