"""The blocks of every network: R, RPB and URB over ConvLSTM and sequence-wise normalisation (RL-V2V-GAN section 3.4).

A block maps frames (B,T,C,H,W) to frames. It is causal, and is called in one of three ways:

    y, state = block(x, state)                             run over T frames from `state`; None: a video starts here
    y, states = block(x, None, all_states=True)            as above; each tensor of `states` has an axis T, for the
                                                           state after every frame
    y, _ = block(x, states, one_step_from_each=True)       run T single steps at once: x[:, t] follows states[:, t]

The last two make the recycle loss cheap: it continues every prefix by one other frame. All T-1 continuations cost one
step instead of T passes.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from rlv2v.kernels.casts import autocast_weight
from rlv2v.model.conv_lstm import ConvLSTM, LSTMState
from rlv2v.model.frames import RunMode, State, cat_channels, per_frame
from rlv2v.model.norm import Moments, SequenceNorm

SLOPE = 0.2  # of every LeakyReLU


class Residual(nn.Module):
    """R: LeakyReLU(ConvLSTM(x) + skip(x)). The skip is the identity, or a 1x1 convolution where the widths differ.

    Returned are the two summands: R ends in the normalisation that follows it, which reads each frame once for both.
    """

    def __init__(self, c_in: int, c_out: int, *, horizon: int = 0) -> None:
        super().__init__()
        self.convlstm = ConvLSTM(c_in, c_out, horizon=horizon)
        self.skip = nn.Parameter(nn.init.xavier_uniform_(torch.empty(c_out, c_in, 1, 1))) if c_in != c_out else None

    def forward(
        self, x: Tensor, state: LSTMState | None = None, **mode: Unpack[RunMode]
    ) -> tuple[Tensor, Tensor, State]:
        h, state = self.convlstm(x, state, **mode)
        return h, x if self.skip is None else per_frame(conv2d, x, autocast_weight(self.skip)), state


class RPB(nn.Module):
    """R, average pooling by 2 (an axis of one pixel is left as it is), normalisation; R's output goes to the skip."""

    def __init__(self, c_in: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, Tensor, State]:
        lstm_state, moments = state or (None, None)
        h, skip, lstm_state = self.residual(x, lstm_state, **mode)
        pool = (min(2, h.shape[-2]), min(2, h.shape[-1]))
        y, a, moments = self.norm.activate_and_normalise(h, skip, moments, slope=SLOPE, pool=pool, **mode)
        return y, a, (lstm_state, moments)


class URB(nn.Module):
    """Upsampling by 2 (nearest), R over [upsampled, skip], normalisation."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str, horizon: int = 0) -> None:
        super().__init__()
        self.residual = Residual(c_in + c_skip, c_out, horizon=horizon)
        self.norm = SequenceNorm(c_out, norm)

    def forward(self, x: Tensor, skip: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        lstm_state, moments = state or (None, None)
        upsampled = per_frame(interpolate, x, skip.shape[-2:])
        h, skip, lstm_state = self.residual(cat_channels(upsampled, skip), lstm_state, **mode)
        y, _, moments = self.norm.activate_and_normalise(h, skip, moments, slope=SLOPE, **mode)
        return y, (lstm_state, moments)


def limit_history(state: State, frames: int) -> State:
    """Cap the frame counts of a streamed video's moments, so that at most about the last `frames` frames weigh.

    Below the cap nothing changes, as in a training clip. Above it the mean over the video is a moving average.
    """
    if isinstance(state, Moments):
        return state._replace(frames=state.frames.clamp(max=max(1, frames - 1)))
    if state is None or isinstance(state, (Tensor, LSTMState)):
        return state
    return tuple(limit_history(part, frames) for part in state)


def xavier_linear(c_in: int, c_out: int) -> nn.Linear:
    """Return a fully connected layer with Xavier weights and zero bias (section 3.4)."""
    layer = nn.Linear(c_in, c_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
