"""What ends a block of a network, in one operator: residual, LeakyReLU, average pooling, causal normalisation.

    a = leaky(x + residual);  p = avg_pool(a);  y = (p - mean) / sqrt(max(square - mean^2, 0) + eps) * weight + bias
mean and square of a channel run over the pixels of all frames of p so far: RL-V2V-GAN, section 3.4, made causal.

`sequence_norm` does all of it. `activate_and_pool` does what comes before the normalisation, and may return the moments
of every frame, which a caller can average over clips and ranks and give to `sequence_norm`. Both are one torch.library
operator with gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, leaky_relu

from rlv2v.kernels.layout import CODES
from rlv2v.kernels.norm_ops import activates, pools
from rlv2v.kernels.triton import norms

DTYPES = (torch.float64, *CODES)
BACKENDS = ("reference", "cpu", "triton")
Pair = tuple[Tensor, Tensor]


class Moments(NamedTuple):
    """The state of a normalisation: the number of frames seen (B,), and their mean and mean square (B,C); float64."""

    frames: Tensor
    mean: Tensor
    square: Tensor


def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Moments | None = None,
    *,
    residual: Tensor | None = None,
    slope: float = 1.0,
    pool: tuple[int, int] = (1, 1),
    moments: Pair | None = None,
    eps: float = 1e-3,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Moments]:
    """Normalise every frame by the moments of all frames so far.

        a = leaky(x + residual);  p = avg_pool(a)
        y_t = (p_t - mean_t) / sqrt(max(square_t - mean_t^2, 0) + eps) * weight + bias
        mean_t = (frames mean + sum_{u<=t} mean of frame u) / (frames + t + 1);  square_t in the same way
    Source: RL-V2V-GAN, section 3.4. A frame's spread is summed about its own mean (Chan, Golub and LeVeque 1983): its
    moments are float64 to the rounding of what is summed. A result depends on no other clip, and on no thread count.

    Args:
        x: (B,T,C,H,W), T >= 1, float64, float32, bfloat16 or float16; arithmetic on pixels is float32 for 16 bits.
        weight, bias: (C,).
        state: of the frames before, (B,) and (B,C), float64; None: a video starts.
        residual: like x, or None.
        slope: of the LeakyReLU below 0; 1: none.
        pool: height and width of the averaged windows; pixels that fill none are left out.
        moments: mean and mean square of every frame, (B,T,C) float64, in place of the frames' own.
        eps: added to the variance.
        backend: "auto", or "reference" (PyTorch), "cpu" (C++: AVX-512, AVX2 or portable), "triton" (a GPU).

    Returns:
        y (B,T,C,H/pool,W/pool), a like x, and the states after every frame, (B,T) and (B,T,C).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is unknown or cannot run this.
    """
    x, residual = promoted(x, residual)
    check_arguments(x, residual, pool, weight, bias, state, moments)
    backend = choose_backend(backend, x)
    if backend == "reference":
        return sequence_norm_ref(
            x, weight, bias, state, residual=residual, slope=slope, pool=pool, moments=moments, eps=eps
        )
    given, before = moments or (None, None), state or (None, None, None)
    # Parameters are float32 whatever x is.
    y, activated, _, *states = torch.ops.rlv2v.sequence_norm(
        x, residual, weight.float(), bias.float(), *given, *before, slope, pool, eps, False, backend
    )
    return y, activated if activates(residual, slope, pool) else x, Moments(*states)


def activate_and_pool(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    slope: float = 1.0,
    pool: tuple[int, int] = (1, 1),
    moments: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Pair | None]:
    """Return a and p of `sequence_norm`, and with `moments` the mean and mean square of every frame of p.

    Arguments and errors are those of `sequence_norm`; the moments are (B,T,C), float64.
    """
    x, residual = promoted(x, residual)
    check_arguments(x, residual, pool)
    backend = choose_backend(backend, x)
    if backend == "reference":
        a, p = activate_and_pool_ref(x, residual, slope, pool)
        return a, p, FrameMoments.apply(p) if moments else None
    nothing = (None,) * 7
    _, activated, pooled, _, mean, square = torch.ops.rlv2v.sequence_norm(
        x, residual, *nothing, slope, pool, 0.0, moments, backend
    )
    a = activated if activates(residual, slope, pool) else x
    return a, pooled if pools(pool) else a, (mean, square) if moments else None


class FrameMoments(torch.autograd.Function):
    """Mean and mean square of every frame's pixels: (B,T,C,H,W) -> two (B,T,C), float64.

    Their difference is a variance. In float32 it would be lost where a channel's mean is much larger than its spread
    (Chan, Golub and LeVeque 1983). So the spread is summed about the frame's own mean, and the rest is float64.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Pair:
        ctx.save_for_backward(x)
        mean = x.mean((3, 4), dtype=torch.promote_types(x.dtype, torch.float32))
        spread = (x - mean[..., None, None]).square_().mean((3, 4))
        mean = mean.double()
        return mean, spread.double() + mean.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_mean, d_square = (grad / (x.shape[3] * x.shape[4]) for grad in grads)
        dtype = torch.promote_types(x.dtype, torch.float32)
        shift, scale = (v.to(dtype)[..., None, None] for v in (d_mean, 2.0 * d_square))
        return torch.addcmul(shift, x, scale).to(x.dtype)


def activate_and_pool_ref(x: Tensor, residual: Tensor | None, slope: float, pool: tuple[int, int]) -> Pair:
    """Return a and p in PyTorch's operators."""
    a = x if residual is None else x + residual
    a = a if slope == 1 else leaky_relu(a, slope)
    if not pools(pool):
        return a, a
    frames = a.transpose(0, 1)  # as they lie in memory
    return a, avg_pool2d(frames.flatten(0, 1), pool).unflatten(0, frames.shape[:2]).transpose(0, 1)


def sequence_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Moments | None = None,
    *,
    residual: Tensor | None = None,
    slope: float = 1.0,
    pool: tuple[int, int] = (1, 1),
    moments: Pair | None = None,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Moments]:
    """Return `sequence_norm` in PyTorch's operators: the definition that the others are held to."""
    a, p = activate_and_pool_ref(x, residual, slope, pool)
    frame_mean, frame_square = moments or FrameMoments.apply(p)  # (B,T,C)
    zero = frame_mean.new_zeros(())
    num_seen, mean_sum, square_sum = state or Moments(zero.expand(x.shape[0]), zero, zero)
    count = num_seen[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64)
    if state is not None:
        mean_sum, square_sum = ((num_seen[:, None] * m)[:, None] for m in (mean_sum, square_sum))
    mean = (mean_sum + frame_mean.cumsum(1)) / count[..., None]
    square = (square_sum + frame_square.cumsum(1)) / count[..., None]
    scale = weight * torch.rsqrt((square - mean.square()).clamp(min=0) + eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift, scale = (v.to(dtype)[..., None, None] for v in (bias - mean * scale, scale))
    return torch.addcmul(shift, p, scale).to(x.dtype), a, Moments(count, mean, square)


def promoted(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both in the dtype of their sum, which autocast makes differ."""
    if residual is None or residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def check_arguments(
    x: Tensor,
    residual: Tensor | None,
    pool: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    state: Moments | None = None,
    moments: Pair | None = None,
) -> None:
    """Raise ValueError for the first argument that does not fit x."""
    if x.dtype not in DTYPES or x.dim() != 5 or min(x.shape[1:]) < 1:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"sequence_norm: x must be (B,T,C,H,W) of one of {names}, got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    batch, steps, channels, *sides = x.shape
    if len(pool) != 2 or not (1 <= pool[0] <= sides[0] and 1 <= pool[1] <= sides[1]):
        raise ValueError(f"sequence_norm: pool must be two sides from 1 to {tuple(sides)}, got {tuple(pool)}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = [
        ("residual", residual, tuple(x.shape), None),
        ("weight", weight, (channels,), None),
        ("bias", bias, (channels,), None),
    ]
    if state is not None:
        expected.append(("state.frames", state.frames, (batch,), torch.float64))
        expected.append(("state.mean", state.mean, (batch, channels), torch.float64))
        expected.append(("state.square", state.square, (batch, channels), torch.float64))
    for moment in moments or ():
        expected.append(("moments", moment, (batch, steps, channels), torch.float64))
    for name, value, shape, dtype in expected:
        if value is None:
            continue
        fits = value.shape == shape and value.device == x.device and value.dtype.is_floating_point
        if not fits or dtype not in (None, value.dtype):
            raise ValueError(
                f"sequence_norm: {name} must be {dtype or 'floating-point'} {shape} on {x.device}, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )


def unsupported_reason(backend: str, x: Tensor) -> str | None:
    """Return why a backend cannot run on such frames, or None if it can."""
    if backend == "reference":
        return None
    if x.dtype == torch.float64:
        return "it computes in float32 at most, x is torch.float64"
    if backend == "cpu":
        return None if x.device.type == "cpu" else f"it runs on the CPU, x is on {x.device}"
    return norms.unavailable_reason(x.device)


def choose_backend(backend: str, x: Tensor) -> str:
    """Return the backend to run: the one named, or for "auto" the fastest that can; ValueError if it cannot."""
    if backend == "auto":
        fast = "triton" if x.device.type == "cuda" else "cpu"
        return fast if unsupported_reason(fast, x) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"sequence_norm: backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    if reason := unsupported_reason(backend, x):
        raise ValueError(f"sequence_norm: backend {backend!r} cannot run this: {reason}")
    return backend
