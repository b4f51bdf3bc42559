"""Launch the Triton kernels of the sequence-wise normalisation. Triton is imported on first use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels.triton.recurrence import Launch, device_guard, launch, unavailable_reason

__all__ = ["backward", "forward", "unavailable_reason"]
TILE = 512  # elements of a program's tile; with four warps four a thread. With eight, `spread` spills on sm_86
MAX_CHANNELS = 32  # of a tile
MAX_PARTS = 64  # programs among which the pixels of a clip's frames are shared
Named = dict[str, Any]


def tile(channels: int) -> dict[str, int]:
    """Return pixels and channels of a program's tile."""
    block = min(MAX_CHANNELS, 1 << (channels - 1).bit_length())
    return {"BP": TILE // block, "BC": block}


def forward(sizes: tuple[int, ...], numbers: Named, tensors: Named, run: Launch = launch) -> None:
    """Write the results of `norm_forward` of csrc/norm/sequence_norm.h; tensors by its names, those there are."""
    from rlv2v.kernels.triton import norm_kernels

    steps, batch, channels, height, width, down, right = sizes
    if not batch:
        return
    got, block = tensors.get, tile(channels)
    x = tensors["x"]
    values = next(value for value in (got("pooled"), got("activated"), x) if value is not None)
    frame_mean, frame_square = got("frame_mean"), got("frame_square")
    blocks = -(-channels // block["BC"])
    own = got("weight") is not None and got("given_mean") is None
    if own:
        frame_mean, frame_square = (torch.empty_like(tensors["means"]) for _ in range(2))
    with device_guard(x):
        if got("activated") is not None or frame_mean is not None:
            arguments = {name: got(name) for name in ("x", "residual", "activated", "pooled")}
            arguments |= {"values": values, "frame_mean": frame_mean, "frame_square": frame_square}
            arguments |= {"height": height, "width": width, "channels": channels}
            arguments |= {"SLOPE": numbers["slope"], "DOWN": down, "RIGHT": right, **block}
            run(norm_kernels.activate, (steps * batch, blocks, 1), arguments)
        if got("weight") is None:
            return
        if not own:
            frame_mean, frame_square = tensors["given_mean"], tensors["given_square"]
        names = ("frames", "mean", "square", "weight", "bias", "y", "counts", "means", "squares")
        arguments = {"values": values, "frame_mean": frame_mean, "frame_square": frame_square}
        arguments |= {name: got(name) for name in names}
        pixels = (height // down) * (width // right)
        arguments |= {"steps": steps, "batch": batch, "height": height // down, "width": width // right}
        arguments |= {"channels": channels, "EPS": numbers["eps"], **block}
        run(norm_kernels.normalise, (batch, blocks, parts(pixels, block)), arguments)


def backward(sizes: tuple[int, ...], numbers: Named, tensors: Named, run: Launch = launch) -> None:
    """Write the gradients of `norm_backward` of csrc/norm/sequence_norm.h; tensors by its names, those there are."""
    from rlv2v.kernels.triton import norm_kernels

    steps, batch, channels, height, width, down, right = sizes
    got, block = tensors.get, tile(channels)
    weight_gradients = [gradient for name in ("d_weight", "d_bias") if (gradient := got(name)) is not None]
    if not batch:
        for gradient in weight_gradients:
            gradient.zero_()
        return
    values = tensors["values"]
    blocks = -(-channels // block["BC"])
    of_dy: Tensor | None = None
    of_scale: Tensor | None = None
    with device_guard(values):
        if got("weight") is not None and got("dy") is not None:
            of_dy, of_scale = (torch.empty_like(tensors["means"]) for _ in range(2))
            arguments = {name: got(name) for name in ("values", "dy", "means")}
            arguments |= {"of_dy": of_dy, "of_scale": of_scale, "channels": channels}
            arguments |= {"height": height // down, "width": width // right, **block}
            run(norm_kernels.sums, (steps * batch, blocks, 1), arguments)
        names: tuple[str, ...] = ("values", "activated", "weight", "frames", "means", "squares", "dy", "d_activated")
        names += ("d_means", "d_squares", "dx", "d_mean", "d_square", "d_given_mean", "d_given_square")
        partial = values.new_empty(batch, 2, channels, dtype=torch.float64) if weight_gradients else None
        arguments = {name: got(name) for name in names}
        arguments |= {"of_dy": of_dy, "of_scale": of_scale, "d_weight_bias": partial}
        arguments |= {"steps": steps, "batch": batch, "height": height, "width": width, "channels": channels}
        arguments |= {"SLOPE": numbers["slope"], "EPS": numbers["eps"], "DOWN": down, "RIGHT": right, **block}
        windows = -(-height // down) * -(-width // right)
        run(norm_kernels.spread, (batch, blocks, parts(windows, block)), arguments)
        if partial is not None:
            arguments = {"d_weight_bias": partial, "d_weight": got("d_weight"), "d_bias": got("d_bias")}
            arguments |= {"batch": batch, "channels": channels, "BC": block["BC"]}
            run(norm_kernels.add_clips, (blocks, 1, 1), arguments)


def parts(pixels: int, block: dict[str, int]) -> int:
    """Return the number of programs among which pixels are shared."""
    return min(MAX_PARTS, -(-pixels // block["BP"]))
