"""The blocks of every network: ConvLSTM, sequence-wise normalisation, R, RPB and URB (RL-V2V-GAN section 3.4).

All of them map frames (B,T,C,H,W) to frames, causally, and share one calling form:

    y, state = block(x, state)                 a run over T frames, from `state` (None: the start of a video)
    y, states = block(x, None, every=True)     as above; each tensor of `states` gains an axis T: the state after
                                               every frame
    y, _ = block(x, states, fork=True)         T forks at once: frame x[:, t] follows states[:, t]

A state is a tuple of tensors or of states. `every` and `fork` are how the recycle loss, which continues each prefix by
one other frame, costs one extra step instead of T passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu, pixel_unshuffle

from rlv2v.dist import mean as mean_over_ranks
from rlv2v.kernels import convlstm_cells

State = Any
SLOPE = 0.2  # of every LeakyReLU


class Memory(NamedTuple):
    """State of a ConvLSTM: hidden h and cell c, each (B,C,H,W)."""

    h: Tensor
    c: Tensor


class Moments(NamedTuple):
    """State of a normalisation: number of frames seen (B,), mean and mean square of them (B,C); float64."""

    frames: Tensor
    mean: Tensor
    square: Tensor


class ConvLSTM(nn.Module):
    """ConvLSTM layer, kernel size k (odd, same padding); weights as `rlv2v.kernels.convlstm` takes them.

    Xavier-initialised (section 3.4), biases 0. With a `horizon` T > 2 the biases of the forget and input gates start at
    log u and -log u, u uniform in [1, T-1], so that the cells remember over all times up to T (Tallec and Ollivier
    2018, arXiv:1804.11188): from the first step on there is something to tell the frames of a clip apart by.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, horizon: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.backend, self.recompute = backend, False
        w_x, w_h = (torch.empty(4 * c_out, c, kernel, kernel) for c in (c_in, c_out))
        for weight in (w_x, w_h):
            for gate in weight.chunk(4):
                nn.init.xavier_uniform_(gate)
        # Channels-last in memory, as the frames: then neither they nor their gradients are ever reordered.
        self.w_x, self.w_h = (
            nn.Parameter(weight.contiguous(memory_format=torch.channels_last)) for weight in (w_x, w_h)
        )
        self.bias = nn.Parameter(torch.zeros(4 * c_out))
        if horizon > 2:
            spans = torch.empty(c_out).uniform_(1, horizon - 1).log()
            self.bias.data[:c_out], self.bias.data[c_out : 2 * c_out] = -spans, spans

    def forward(
        self, x: Tensor, state: Memory | None = None, *, every: bool = False, fork: bool = False
    ) -> tuple[Tensor, State]:
        weights = (self.w_x, self.w_h, self.bias)
        how: Any = {"backend": self.backend, "recompute": self.recompute}
        if fork:
            assert state is not None
            frames, h, c = (frame_major(s) for s in (x, *state))
            hs, _ = convlstm_cells(frames.unsqueeze(1), *weights, h, c, **how)
            return batch_major(hs.squeeze(1), x), None
        hs, cs = convlstm_cells(x, *weights, *(state or (None, None)), **how)
        return hs, Memory(hs, cs) if every else Memory(hs[:, -1], cs[:, -1])


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
        self, x: Tensor, state: Moments | None = None, *, every: bool = False, fork: bool = False
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
        if fork:
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
        return y, Moments(count, mean, square) if every else last

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
def apart(*nets: nn.Module) -> Iterator[None]:
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


class Residual(nn.Module):
    """R: LeakyReLU(ConvLSTM(x) + skip(x)); skip is the identity, or a 1x1 convolution where the widths differ."""

    def __init__(self, c_in: int, c_out: int, *, horizon: int = 0) -> None:
        super().__init__()
        self.convlstm = ConvLSTM(c_in, c_out, horizon=horizon)
        self.skip = nn.Parameter(nn.init.xavier_uniform_(torch.empty(c_out, c_in, 1, 1))) if c_in != c_out else None

    def forward(
        self, x: Tensor, state: Memory | None = None, *, every: bool = False, fork: bool = False
    ) -> tuple[Tensor, State]:
        h, state = self.convlstm(x, state, every=every, fork=fork)
        return leaky_relu(h + (x if self.skip is None else per_frame(conv2d, x, self.skip)), SLOPE), state


class RPB(nn.Module):
    """R, average pooling by 2 (not of an axis of one pixel), normalisation; also returns R's output for the skip."""

    def __init__(self, c_in: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(
        self, x: Tensor, state: State = None, *, every: bool = False, fork: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        memory, moments = state or (None, None)
        skip, memory = self.residual(x, memory, every=every, fork=fork)
        pool = tuple(min(2, n) for n in skip.shape[-2:])
        y, moments = self.norm(per_frame(avg_pool2d, skip, pool), moments, every=every, fork=fork)
        return y, skip, (memory, moments)


class URB(nn.Module):
    """Upsampling by 2 (nearest), R over [upsampled, skip], normalisation."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in + c_skip, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(
        self, x: Tensor, skip: Tensor, state: State = None, *, every: bool = False, fork: bool = False
    ) -> tuple[Tensor, State]:
        memory, moments = state or (None, None)
        up = per_frame(interpolate, x, skip.shape[-2:])
        y, memory = self.residual(cat_channels(up, skip), memory, every=every, fork=fork)
        y, moments = self.norm(y, moments, every=every, fork=fork)
        return y, (memory, moments)


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


def limit_memory(state: State, frames: int) -> State:
    """Let the normalisation of a streamed video weigh at most the last `frames` frames, as in a training clip.

    Caps each frame count, which turns the mean over the video into a moving average; below the cap nothing changes.
    """
    if isinstance(state, Moments):
        return state._replace(frames=state.frames.clamp(max=max(1, frames - 1)))
    if state is None or isinstance(state, (Tensor, Memory)):
        return state
    return tuple(limit_memory(part, frames) for part in state)


def xavier_linear(c_in: int, c_out: int) -> nn.Linear:
    """A fully connected layer, Xavier weights, zero bias (section 3.4)."""
    layer = nn.Linear(c_in, c_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
