"""The blocks of every network: ConvLSTM, sequence-wise normalisation, R, RPB and URB (RL-V2V-GAN section 3.4).

All of them map frames (B,T,C,H,W) to frames, causally, and share one calling form:

    y, state = block(x, state)                 a run over T frames, from `state` (None: the start of a video)
    y, states = block(x, None, all_states=True)     as above; each tensor of `states` gains an axis T: the state after
                                               every frame
    y, _ = block(x, states, one_step_from_each=True)         T forks at once: frame x[:, t] follows states[:, t]

A state is a tuple of tensors or of states. `every` and `fork` are how the recycle loss, which continues each prefix by
one other frame, costs one extra step instead of T passes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu

from rlv2v.model.conv_lstm import ConvLSTM, Memory
from rlv2v.model.frames import State, cat_channels, per_frame
from rlv2v.model.norm import Moments, SequenceNorm

SLOPE = 0.2  # of every LeakyReLU


class Residual(nn.Module):
    """R: LeakyReLU(ConvLSTM(x) + skip(x)); skip is the identity, or a 1x1 convolution where the widths differ."""

    def __init__(self, c_in: int, c_out: int, *, horizon: int = 0) -> None:
        super().__init__()
        self.convlstm = ConvLSTM(c_in, c_out, horizon=horizon)
        self.skip = nn.Parameter(nn.init.xavier_uniform_(torch.empty(c_out, c_in, 1, 1))) if c_in != c_out else None

    def forward(
        self, x: Tensor, state: Memory | None = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, State]:
        h, state = self.convlstm(x, state, all_states=all_states, one_step_from_each=one_step_from_each)
        return leaky_relu(h + (x if self.skip is None else per_frame(conv2d, x, self.skip)), SLOPE), state


class RPB(nn.Module):
    """R, average pooling by 2 (not of an axis of one pixel), normalisation; also returns R's output for the skip."""

    def __init__(self, c_in: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(
        self, x: Tensor, state: State = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        memory, moments = state or (None, None)
        skip, memory = self.residual(x, memory, all_states=all_states, one_step_from_each=one_step_from_each)
        pool = tuple(min(2, n) for n in skip.shape[-2:])
        y, moments = self.norm(
            per_frame(avg_pool2d, skip, pool), moments, all_states=all_states, one_step_from_each=one_step_from_each
        )
        return y, skip, (memory, moments)


class URB(nn.Module):
    """Upsampling by 2 (nearest), R over [upsampled, skip], normalisation."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in + c_skip, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(
        self,
        x: Tensor,
        skip: Tensor,
        state: State = None,
        *,
        all_states: bool = False,
        one_step_from_each: bool = False,
    ) -> tuple[Tensor, State]:
        memory, moments = state or (None, None)
        up = per_frame(interpolate, x, skip.shape[-2:])
        y, memory = self.residual(
            cat_channels(up, skip), memory, all_states=all_states, one_step_from_each=one_step_from_each
        )
        y, moments = self.norm(y, moments, all_states=all_states, one_step_from_each=one_step_from_each)
        return y, (memory, moments)


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
