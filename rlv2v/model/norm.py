"""Sequence-wise normalisation, made causal (RL-V2V-GAN section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlv2v.model.frames import State
from rlv2v.runtime.distributed import mean as mean_over_ranks


class Moments(NamedTuple):
    """State of a normalisation: number of frames seen (B,), mean and mean square of them (B,C); float64."""

    frames: Tensor
    mean: Tensor
    square: Tensor


class FrameMoments(torch.autograd.Function):
    """Mean and mean square of every frame's pixels: (B,T,C,H,W) -> two (B,T,C), float64.

    A variance is their difference, which float32 would have lost where a channel's mean is large beside its spread
    (Chan, Golub and LeVeque 1983): so the spread is summed about the frame's own mean, and the rest is float64.
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
        real = torch.promote_types(x.dtype, torch.float32)
        by_mean, by_square = (grad / (x.shape[3] * x.shape[4]) for grad in grads)
        pixel, slope = (v.to(real)[..., None, None] for v in (by_mean, 2.0 * by_square))
        return torch.addcmul(pixel, x, slope).to(x.dtype)


class SequenceNorm(nn.Module):
    """Sequence-wise normalisation, made causal: (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and variance of a channel run over all pixels of all frames *so far*: of this clip (`kind="clip"`), or of all
    clips of the mini-batch (`kind="batch"`, the paper's form, section 3.4; a running average of the whole clips'
    statistics serves in eval mode). `kind="none"` leaves x as it is. A mini-batch is that of all ranks, but within
    `apart`. Statistics are those of `FrameMoments`, whatever x is.
    """

    running_mean: Tensor
    running_square: Tensor

    def __init__(self, channels: int, kind: str = "clip", eps: float = 1e-3, momentum: float = 0.1) -> None:
        super().__init__()
        if kind not in ("clip", "batch", "none"):
            raise ValueError(f"SequenceNorm: kind must be 'clip', 'batch' or 'none', got {kind!r}")
        self.kind, self.eps, self.momentum, self.apart, self.learning = kind, eps, momentum, False, True
        if kind == "none":
            return
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if kind == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_square", torch.ones(channels))

    def forward(
        self, x: Tensor, state: Moments | None = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, State]:
        if self.kind == "none":
            return x, None
        if self.kind == "batch" and not self.training:
            mean, square = self.running_mean.expand(x.shape[:3]), self.running_square.expand(x.shape[:3])
            return self.apply_moments(x, mean, square), None
        frame_mean, frame_square = FrameMoments.apply(x)  # (B,T,C)
        if self.kind == "batch":
            moments = torch.stack((frame_mean.mean(0), frame_square.mean(0)))
            moments = moments if self.apart else mean_over_ranks(moments)
            frame_mean, frame_square = (m.expand_as(frame_mean) for m in moments)
        if one_step_from_each:
            assert state is not None
            count = state.frames + 1.0
            mean = state.mean + (frame_mean - state.mean) / count[..., None]
            square = state.square + (frame_square - state.square) / count[..., None]
            return self.apply_moments(x, mean, square), None
        zero = frame_mean.new_zeros(())
        before, mean0, square0 = state or Moments(zero.expand(x.shape[0]), zero, zero)
        count = before[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64)
        if state is not None:
            mean0, square0 = ((before[:, None] * m)[:, None] for m in (mean0, square0))
        mean = (mean0 + frame_mean.cumsum(1)) / count[..., None]
        square = (square0 + frame_square.cumsum(1)) / count[..., None]
        y, last = self.apply_moments(x, mean, square), Moments(count[:, -1], mean[:, -1], square[:, -1])
        if self.kind == "batch" and self.learning:
            self.learn(last)
        return y, Moments(count, mean, square) if all_states else last

    def learn(self, clips: Moments | None) -> None:
        """Move the running averages of `kind="batch"` towards the moments of whole clips."""
        if self.kind == "batch" and clips is not None and not self.apart:
            for running, moment in ((self.running_mean, clips.mean), (self.running_square, clips.square)):
                running.lerp_(moment[0].detach().to(running.dtype), self.momentum)

    def apply_moments(self, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
        real = torch.promote_types(x.dtype, torch.float32)
        shift, scale = (v.to(real)[..., None, None] for v in (self.bias - mean * scale, scale))
        return torch.addcmul(shift, x, scale).to(x.dtype)


@contextmanager
def local_stats(*nets: nn.Module) -> Iterator[None]:
    """Within it, `kind="batch"` normalises over this rank's clips alone and leaves its running averages as they are.

    For runs that not every rank makes, or not over as many clips.
    """
    norms = [m for net in nets for m in net.modules() if isinstance(m, SequenceNorm) and m.kind == "batch"]
    for norm in norms:
        norm.apart = True
    try:
        yield
    finally:
        for norm in norms:
            norm.apart = False
