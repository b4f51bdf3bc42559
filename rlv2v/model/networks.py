"""The networks of RL-V2V-GAN (section 3.2, 3.4, table 1): G and P (`Translator`), D and Q (`Discriminator`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pixel_shuffle

from rlv2v.model.activation_memory import in_chunks, set_memory
from rlv2v.model.blocks import RPB, SLOPE, URB, limit_history, xavier_linear
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import RunMode, State, cat_channels, per_frame, space_to_depth
from rlv2v.model.generator import Details, Generator

HEADS = ("convlstm", "letter", "mask")
LOGIT_GAIN = 4.0  # of the head's logits, which a ConvLSTM keeps within -1 and 1


def no_autocast(y: Tensor) -> torch.autocast:
    """Return a context without autocast: a network's output is float32, and so are the last layers that make it."""
    return torch.autocast(y.device.type, enabled=False)


class Translator(Generator):
    """A generator G or predictor P: one RPB a width, as many URBs with skips, and a head; causal, video to video.

    Shapes: frames (B,T,3,H,W) in [-1,1] -> (B,T,3,H,W) in (-1,1); H and W are multiples of `multiple`.

    Args:
        widths: channels after each RPB; the URBs mirror them.
        patch: space-to-depth factor before the first RPB (1: none, as in the paper).
        head: "convlstm", three logits per pixel as in the paper, `y = tanh(4 h)` of a ConvLSTM of 3 channels; "letter",
            h itself, which is under 0.77 in the first frame and cannot show the data; or "mask", an addition:
            `y = m x + (1 - m) tanh(rgb)`. Two convolutions over [pixel-shuffled ConvLSTM output, input frame x] give
            rgb and m / `mask_gain`. The buffer `mask_gain` in [0,1] limits the copying. The warm-up sets it to 0,
            because a copy would satisfy an auto-encoder at once.
        norm: "clip" or "batch", see `SequenceNorm`.
        horizon: clip length for which the ConvLSTMs' biases are initialised (0: biases 0), see `ConvLSTM`.
        head_width: channels of the mask head at full resolution.
        memory: what a training run stores for its backward pass, see `rlv2v.model.activation_memory`.
    """

    mask_gain: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        *,
        patch: int = 1,
        head: str = "convlstm",
        norm: str = "clip",
        horizon: int = 0,
        head_width: int = 16,
        memory: str = "store",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"Translator: head must be one of {list(HEADS)}, got {head!r}")
        if patch != 1 and head != "mask":
            raise ValueError(f"Translator: patch must be 1 with head={head!r}, got {patch}")
        self.head, self.patch, self.multiple = head, patch, patch * 2 ** len(widths)
        ins = [3 * patch**2, *widths[:-1]]
        self.encoder = nn.ModuleList(RPB(c_in, c_out, norm, horizon) for c_in, c_out in zip(ins, widths, strict=True))
        skips, outs = widths[::-1], [*widths[-2::-1], widths[0]]
        self.decoder = nn.ModuleList(
            URB(c_in, c_skip, c_out, norm, horizon)
            for c_in, c_skip, c_out in zip([widths[-1], *outs], skips, outs, strict=False)
        )
        self.register_buffer("mask_gain", torch.ones(()))
        if head != "mask":
            self.last = ConvLSTM(widths[0], 3, horizon=horizon)
            self.fuse = self.to_rgbm = None
        else:
            self.last = ConvLSTM(widths[0], 4 * patch**2, horizon=horizon)
            self.fuse = nn.Conv2d(4 + 3, head_width, 3, padding=1)
            self.to_rgbm = nn.Conv2d(head_width, 4, 1)
            for name, values in (*self.fuse.named_parameters(), *self.to_rgbm.named_parameters()):
                nn.init.zeros_(values) if name == "bias" else nn.init.xavier_uniform_(values)
        set_memory(self, memory)

    def forward(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        """Translate frames from a state; `mode` as in `rlv2v.model.blocks`."""
        y, _, state = self.forward_with_mask(x, state, **mode)
        return y, state

    def forward_with_details(
        self, x: Tensor, state: State = None, **mode: Unpack[RunMode]
    ) -> tuple[Tensor, Details, State]:
        """Translate frames as `forward` does, and also return what loss terms may look at."""
        y, mask, state = self.forward_with_mask(x, state, **mode)
        return y, Details(mask), state

    def limit_copying(self, gain: Tensor) -> None:
        """Set `mask_gain`."""
        self.mask_gain.copy_(gain)

    def limit_state(self, state: State, frames: int) -> State:
        """Return the state such that the normalisation forgets what is older, see `limit_history`."""
        return limit_history(state, frames)

    @in_chunks
    def forward_with_mask(
        self, x: Tensor, state: State = None, **mode: Unpack[RunMode]
    ) -> tuple[Tensor, Tensor | None, State]:
        """Translate frames as `forward` does, and also return the copy mask m (B,T,1,H,W) in (0,1), if there is one."""
        old_states = iter(state or (None,) * (len(self.encoder) + len(self.decoder) + 1))
        new_states, skips = [], []
        y = space_to_depth(x, self.patch)
        for block in self.encoder:
            y, skip, block_state = block(y, next(old_states), **mode)
            skips.append(skip)
            new_states.append(block_state)
        for block in self.decoder:
            y, block_state = block(y, skips.pop(), next(old_states), **mode)
            new_states.append(block_state)
        y, last_state = self.last(y, next(old_states), **mode)
        state = (*new_states, last_state)
        if self.head == "mask":
            return *self.blend(x, y), state
        y = y.to(x.dtype)
        return y if self.head == "letter" else (LOGIT_GAIN * y).tanh(), None, state

    def blend(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask head's `m x + (1 - m) tanh(rgb)`, and m."""
        assert self.fuse is not None and self.to_rgbm is not None
        y = cat_channels(per_frame(pixel_shuffle, features, self.patch), x)
        y = leaky_relu(per_frame(self.fuse, y), SLOPE)
        with no_autocast(y):
            rgb, mask = per_frame(self.to_rgbm, y.to(x.dtype)).split((3, 1), 2)
        mask = self.mask_gain * mask.sigmoid()
        return torch.lerp(rgb.tanh(), x, mask), mask


class Discriminator(nn.Module):
    """A discriminator D or a critic Q: one RPB a width, mean over the remaining pixels, FC, LeakyReLU, FC.

    Shapes: frames (B,T,3,H,W) -> (B,T,heads); entry t scores the prefix x[1:t]. A discriminator returns logits (the
    losses apply the sigmoid of section 3.2). A critic returns Q, through a ReLU where `positive` (as in the paper).
    The mean over pixels lets one network score frames of any size. The last RPB has no normalisation: it would pin
    that mean, for a single frame to a constant, whatever the frame shows. memory: as for `Translator`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        heads: int = 1,
        patch: int = 1,
        norm: str = "clip",
        positive: bool = False,
        horizon: int = 0,
        memory: str = "store",
    ) -> None:
        super().__init__()
        self.patch, self.positive = patch, positive
        ins = [3 * patch**2, *widths[:-1]]
        norms = [norm] * (len(widths) - 1) + ["none"]
        self.blocks = nn.ModuleList(RPB(*block, horizon) for block in zip(ins, widths, norms, strict=True))
        self.hidden = xavier_linear(widths[-1], widths[-1])
        self.out = xavier_linear(widths[-1], heads)
        set_memory(self, memory)

    @in_chunks
    def forward(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        """Score every prefix, from a state; `mode` as in `rlv2v.model.blocks`."""
        new_states = []
        y = space_to_depth(x, self.patch)
        for block, block_state in zip(self.blocks, state or (None,) * len(self.blocks), strict=True):
            y, _, block_state = block(y, block_state, **mode)
            new_states.append(block_state)
        with no_autocast(y):
            y = self.out(leaky_relu(self.hidden(y.mean((3, 4), dtype=x.dtype)), SLOPE))
        return (y.relu() if self.positive else y), tuple(new_states)
