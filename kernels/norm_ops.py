"""The end of a block as torch.library operators, so that autograd and torch.compile see one node.

    rlv2v::sequence_norm            -> y, activated, pooled, counts, means, squares
    rlv2v::sequence_norm_backward   -> gradients of x, weight, bias, mean, square, given_mean, given_square
Names are those of csrc/norm/sequence_norm.h. Without a weight nothing is normalised, y and counts are empty, and means
and squares are the frames' own moments if `moments` asks for them. A result that is not there is empty: an operator
cannot return None. There is no second derivative; the reference has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.autograd import register_autograd
from rlv2v.kernels.cpu import pooled_video
from rlv2v.kernels.layout import CODES, address, dense_video, empty_video
from rlv2v.kernels.triton import norms

NewVideo = Callable[[Tensor, Sequence[int]], Tensor]
ALLOCATORS: dict[str, NewVideo] = {"cpu": pooled_video, "triton": empty_video}

LIBRARY = torch.library.Library("rlv2v", "FRAGMENT")
LIBRARY.define(
    "sequence_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? given_mean, Tensor? given_square,"
    " Tensor? frames, Tensor? mean, Tensor? square, float slope, int[] pool, float eps, bool moments, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sequence_norm_backward(Tensor? dy, Tensor? d_activated, Tensor? d_means, Tensor? d_squares, Tensor activated,"
    " Tensor values, Tensor? weight, Tensor? frames, Tensor means, Tensor squares, float slope, int[] pool, float eps,"
    " bool given, str backend, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def pools(pool: tuple[int, int]) -> bool:
    """Return whether windows have more than one pixel."""
    return pool[0] * pool[1] > 1


def activates(residual: Tensor | None, slope: float, pool: tuple[int, int]) -> bool:
    """Return whether a is a tensor of its own. With windows it always is: the backward pass asks it for its shape."""
    return residual is not None or slope != 1 or pools(pool)


def stats(like: Tensor, *shape: int) -> Tensor:
    """Return uninitialised float64 memory (B,T,...) in which T comes before B, as in that of the frames."""
    batch, _, *channels = shape
    strides = (*channels, batch * channels[0], 1) if channels else (1, batch)
    return torch.empty_strided(shape, strides, dtype=torch.float64, device=like.device)


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor that stands for None, which an operator cannot return."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def dense_stats(values: Tensor | None) -> Tensor | None:
    """Return (B,T,...) with T before B in memory; None stays None."""
    return None if values is None else values.transpose(0, 1).contiguous().transpose(0, 1)


def results(x: Tensor, *arguments: Any, new: NewVideo = empty_video) -> tuple[Tensor, ...]:
    """Return the empty results of `rlv2v::sequence_norm`; those that it does not have are of size 0."""
    residual, weight, *_, slope, pool, _, moments, _ = arguments
    batch, steps, channels, height, width = x.shape
    shape = (batch, steps, channels, height // pool[0], width // pool[1])
    with_stats = weight is not None or moments
    return (
        nothing(x) if weight is None else new(x, shape),
        new(x, x.shape) if activates(residual, slope, pool) else nothing(x),
        new(x, shape) if pools(pool) else nothing(x),
        nothing(x, torch.float64) if weight is None else stats(x, batch, steps),
        stats(x, batch, steps, channels) if with_stats else nothing(x, torch.float64),
        stats(x, batch, steps, channels) if with_stats else nothing(x, torch.float64),
    )


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Run `rlv2v::sequence_norm`."""
    residual, weight, bias, given_mean, given_square, frames, mean, square, slope, pool, eps, _, backend = arguments
    out = results(x, *arguments, new=ALLOCATORS[backend])
    tensors = {
        "x": dense_video(x),
        "residual": None if residual is None else dense_video(residual),
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "given_mean": dense_stats(given_mean),
        "given_square": dense_stats(given_square),
        **{
            name: None if value is None else value.contiguous()
            for name, value in (("frames", frames), ("mean", mean), ("square", square))
        },
    }
    names = ("y", "activated", "pooled", "counts", "means", "squares")
    if weight is None:
        names = ("y", "activated", "pooled", "counts", "frame_mean", "frame_square")
    tensors |= {name: value for name, value in zip(names, out, strict=True) if value.dim() > 1}
    run(backend, "forward", x, {"slope": slope, "eps": eps}, pool, tensors)
    return out


def run(backend: str, direction: str, x: Tensor, numbers: dict[str, Any], pool: list[int], tensors: Any) -> None:
    """Run one direction on dense tensors, those of csrc/norm/sequence_norm.h by name."""
    batch, steps, channels, height, width = x.shape
    if backend == "triton":
        getattr(norms, direction)((steps, batch, channels, height, width, *pool), numbers, tensors)
        return
    addresses = {name: address(value) for name, value in tensors.items() if value is not None}
    sizes = (steps, batch, channels, height, width, *pool)
    call: Any = _native.norm_forward if direction == "forward" else _native.norm_backward
    call(CODES[x.dtype], sizes, num_threads=torch.get_num_threads(), **numbers, **addresses)


def gradients(*arguments: Any, new: NewVideo = empty_video) -> tuple[Tensor, ...]:
    """Return the empty gradients of `rlv2v::sequence_norm_backward`; those that are not needed are of size 0."""
    activated, values = arguments[4:6]
    given, _, need = arguments[-3:]
    x = activated if activated.dim() > 1 else values
    batch, steps, channels = x.shape[:3]
    for_x, for_weight, for_state = need
    of_weight = (channels if for_weight else 0,)
    of_state = (batch, channels) if for_state else (0,)
    return (
        new(x, x.shape) if for_x else nothing(x),
        torch.empty(of_weight, dtype=torch.float32, device=x.device),
        torch.empty(of_weight, dtype=torch.float32, device=x.device),
        torch.empty(of_state, dtype=torch.float64, device=x.device),
        torch.empty(of_state, dtype=torch.float64, device=x.device),
        stats(x, batch, steps, channels) if given else nothing(x, torch.float64),
        stats(x, batch, steps, channels) if given else nothing(x, torch.float64),
    )


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run `rlv2v::sequence_norm_backward`."""
    dy, d_activated, d_means, d_squares, activated, values, weight, frames, means, squares, *rest = arguments
    slope, pool, eps, given, backend, _ = rest
    out = gradients(*arguments, new=ALLOCATORS[backend])
    if d_means is None and d_squares is not None:
        d_means = torch.zeros_like(d_squares)
    if d_squares is None and d_means is not None:
        d_squares = torch.zeros_like(d_means)
    activation = activated if activated.dim() > 1 else None
    tensors = {
        "activated": activation,
        "values": dense_video(values),
        "weight": None if weight is None else weight.contiguous(),
        "frames": None if frames is None else frames.contiguous(),
        "means": means if means.dim() > 1 else None,
        "squares": squares if squares.dim() > 1 else None,
        "dy": None if dy is None else dense_video(dy),
        "d_activated": None if d_activated is None else dense_video(d_activated),
        "d_means": dense_stats(d_means),
        "d_squares": dense_stats(d_squares),
    }
    names = ("dx", "d_weight", "d_bias", "d_mean", "d_square", "d_given_mean", "d_given_square")
    tensors |= {name: value for name, value in zip(names, out, strict=True) if value.numel()}
    x = values if activation is None else activation
    run(backend, "backward", x, {"slope": slope, "eps": eps, "given": given}, pool, tensors)
    return out


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, _, given_mean, _, frames, *_, slope, pool, eps, _, backend = inputs
    _, activated, pooled, counts, means, squares = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(counts, *([] if weight is None else [pooled]))
    values = pooled if pools(pool) else activated if activated.dim() > 1 else x
    ctx.save_for_backward(activated, values, weight, frames, means, squares)
    ctx.numbers = (slope, pool, eps, given_mean is not None, backend)


def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # A compiled graph brings gradients of what stands for None, too.
    found = (None if grad is None or grad.dim() == 1 else grad for grad in grads)
    dy, d_activated, d_pooled, _, d_means, d_squares = found
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad  # a checkpoint lets them be read once
    dy = d_pooled if saved[2] is None else dy
    for_x, for_weight, for_state = any(needs[:2]), any(needs[2:4]), any(needs[7:9])
    if all(d is None for d in (dy, d_activated, d_means, d_squares)):
        return (None,) * 14
    dx, *of_weight, d_mean, d_square, d_given_mean, d_given_square = torch.ops.rlv2v.sequence_norm_backward(
        dy, d_activated, d_means, d_squares, *saved, *ctx.numbers, [for_x, for_weight, for_state]
    )
    made = (dx, dx, *of_weight, d_given_mean, d_given_square, None, d_mean, d_square)
    return *(g if needed else None for g, needed in zip(made, needs, strict=False)), *(None,) * 5


def save_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-2]


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise ValueError(f"sequence_norm: backend must be 'reference' for a second derivative, got {ctx.backend!r}")


LIBRARY.impl("sequence_norm", forward, "CompositeExplicitAutograd")
LIBRARY.impl("sequence_norm_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlv2v::sequence_norm", results, lib=LIBRARY)
torch.library.register_fake("rlv2v::sequence_norm_backward", gradients, lib=LIBRARY)
register_autograd(LIBRARY, "sequence_norm", differentiate, setup_context)
register_autograd(LIBRARY, "sequence_norm_backward", no_second_derivative, save_backend)
