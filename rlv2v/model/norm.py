"""Sequence-wise normalisation, made causal (RL-V2V-GAN section 3.4)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from rlv2v.model.frames import RunMode, State, attributes_set
from rlv2v.runtime.distributed import mean as mean_over_ranks

Scope = Literal["ranks", "rank", "clip"]


class Moments(NamedTuple):
    """The state of a normalisation: the number of frames seen (B,), and their mean and mean square (B,C); float64."""

    frames: Tensor
    mean: Tensor
    square: Tensor


class FrameMoments(torch.autograd.Function):
    """Mean and mean square of every frame's pixels: (B,T,C,H,W) -> two (B,T,C), float64.

    Their difference is a variance. In float32 it would be lost where a channel's mean is much larger than its spread
    (Chan, Golub and LeVeque 1983). So the spread is summed about the frame's own mean, and the rest is float64.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
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


class SequenceNorm(nn.Module):
    """Sequence-wise normalisation, made causal: (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and variance of a channel run over all pixels of all frames *so far*. `kind="clip"` takes them over one clip.
    `kind="batch"` takes them over all clips of the mini-batch, on all ranks, as the paper does (section 3.4), but for
    `stats_over`; in eval mode over each clip, so that a translation is what the clip's own frames make of it.
    `kind="none"` returns x as it is. Statistics are those of `FrameMoments`, whatever the dtype of x.
    """

    scope: Scope

    def __init__(self, channels: int, kind: str = "clip", eps: float = 1e-3) -> None:
        super().__init__()
        if kind not in ("clip", "batch", "none"):
            raise ValueError(f"SequenceNorm: kind must be 'clip', 'batch' or 'none', got {kind!r}")
        self.kind, self.eps, self.scope = kind, eps, "ranks"
        if kind == "none":
            return
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, state: Moments | None = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        if self.kind == "none":
            return x, None
        frame_mean, frame_square = FrameMoments.apply(x)  # (B,T,C)
        if self.kind == "batch" and self.training and self.scope != "clip":
            moments = torch.stack((frame_mean.mean(0), frame_square.mean(0)))
            moments = mean_over_ranks(moments) if self.scope == "ranks" else moments
            frame_mean, frame_square = (m.expand_as(frame_mean) for m in moments)
        if mode.get("one_step_from_each"):
            assert state is not None
            count = state.frames + 1.0
            mean = state.mean + (frame_mean - state.mean) / count[..., None]
            square = state.square + (frame_square - state.square) / count[..., None]
            return self.apply_moments(x, mean, square), None
        zero = frame_mean.new_zeros(())
        num_seen, mean_sum, square_sum = state or Moments(zero.expand(x.shape[0]), zero, zero)
        count = num_seen[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64)
        if state is not None:
            mean_sum, square_sum = ((num_seen[:, None] * m)[:, None] for m in (mean_sum, square_sum))
        mean = (mean_sum + frame_mean.cumsum(1)) / count[..., None]
        square = (square_sum + frame_square.cumsum(1)) / count[..., None]
        y, last = self.apply_moments(x, mean, square), Moments(count[:, -1], mean[:, -1], square[:, -1])
        return y, Moments(count, mean, square) if mode.get("all_states") else last

    def apply_moments(self, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """Normalise x (B,T,C,H,W) by a mean and a mean square (B,T,C)."""
        scale = self.weight * torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        shift, scale = (v.to(dtype)[..., None, None] for v in (self.bias - mean * scale, scale))
        return torch.addcmul(shift, x, scale).to(x.dtype)


def stats_over(scope: Scope, *nets: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which `kind="batch"` normalises over this rank's clips, or over each clip.

    "rank" is for runs that not every rank makes, or not over as many clips; "clip" for clips that have nothing to do
    with each other, such as states of the policy gradient, which end in padding.
    """
    norms = (m for net in nets for m in net.modules() if isinstance(m, SequenceNorm))
    return attributes_set((norm, "scope", scope) for norm in norms)
