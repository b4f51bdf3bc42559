"""The networks of RL-V2V-GAN (section 3.2, 3.4, table 1): G and P (`Translator`), D and Q (`Discriminator`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pixel_shuffle

from rlv2v.model.activation_memory import run_keeping, set_memory
from rlv2v.model.blocks import RPB, SLOPE, URB, xavier_linear
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import State, cat_channels, per_frame, space_to_depth


def exact(y: Tensor) -> torch.autocast:
    """Within it autocast is off: what leaves a network is float32, and so are the last layers that make it."""
    return torch.autocast(y.device.type, enabled=False)


class Translator(nn.Module):
    """Generator or predictor: one RPB a width, as many URBs with skips, a head; video in, video out, causal.

    Shapes: frames (B,T,3,H,W) in [-1,1] -> (B,T,3,H,W) in (-1,1); H and W are multiples of `multiple`.

    Args:
        widths: channels after each RPB; the URBs mirror them.
        patch: space-to-depth factor before the first RPB (1: none, as the paper).
        head: "convlstm", a ConvLSTM of 3 channels as the paper, or "mask", an addition:
            `y = m x + (1 - m) tanh(rgb)` with rgb and m / `mask_gain` from two convolutions over
            [pixel-shuffled ConvLSTM output, input frame x]. The buffer `mask_gain` in [0,1] limits the copying: at 0
            nothing is copied, as the warm-up needs, which a copy would satisfy at once.
        norm: "clip" or "batch", see `SequenceNorm`.
        horizon: clip length that the ConvLSTMs' biases are made for (0: biases 0), see `ConvLSTM`.
        head_width: channels of the mask head at full resolution.
        memory: what a training run keeps for its backward, see `rlv2v.model.activation_memory`.
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
        if head not in ("convlstm", "mask"):
            raise ValueError(f"Translator: head must be 'convlstm' or 'mask', got {head!r}")
        if patch != 1 and head == "convlstm":
            raise ValueError(f"Translator: patch must be 1 with head='convlstm', got {patch}")
        self.patch, self.multiple = patch, patch * 2 ** len(widths)
        ins = [3 * patch**2, *widths[:-1]]
        self.encoder = nn.ModuleList(RPB(c_in, c_out, norm, horizon) for c_in, c_out in zip(ins, widths, strict=True))
        outs = [*reversed(widths[:-1]), widths[0]]
        skips = list(reversed(widths))
        self.decoder = nn.ModuleList(
            URB(c_in, c_skip, c_out, norm, horizon)
            for c_in, c_skip, c_out in zip([widths[-1], *outs], skips, outs, strict=False)
        )
        self.register_buffer("mask_gain", torch.ones(()))
        if head == "convlstm":
            self.last = ConvLSTM(widths[0], 3, horizon=horizon)
            self.fuse = self.to_rgbm = None
        else:
            self.last = ConvLSTM(widths[0], 4 * patch**2, horizon=horizon)
            self.fuse = nn.Conv2d(4 + 3, head_width, 3, padding=1)
            self.to_rgbm = nn.Conv2d(head_width, 4, 1)
            for name, values in (*self.fuse.named_parameters(), *self.to_rgbm.named_parameters()):
                nn.init.zeros_(values) if name == "bias" else nn.init.xavier_uniform_(values)
        set_memory(self, memory)

    def forward(
        self, x: Tensor, state: State = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, State]:
        """Translate frames from a state; `every` and `fork` as in `rlv2v.model.blocks`."""
        y, _, state = self.run(x, state, all_states=all_states, one_step_from_each=one_step_from_each)
        return y, state

    def run(
        self, x: Tensor, state: State = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, Tensor | None, State]:
        """As `forward`, with the copy mask m (B,T,1,H,W) in (0,1) between; None without a mask head."""
        y, mask, state = run_keeping(
            self, self.whole, x, state, all_states=all_states, one_step_from_each=one_step_from_each
        )
        return y, mask, state

    def whole(
        self, x: Tensor, state: State, *, all_states: bool, one_step_from_each: bool
    ) -> tuple[Tensor, Tensor | None, State]:
        """`run`, all frames at once."""
        how = {"all_states": all_states, "one_step_from_each": one_step_from_each}
        num_blocks = len(self.encoder) + len(self.decoder)
        before = state or (None,) * (num_blocks + 1)
        after, skips = [], []
        y = space_to_depth(x, self.patch)
        for block, memory in zip(self.encoder, before, strict=False):
            y, skip, memory = block(y, memory, **how)
            skips.append(skip)
            after.append(memory)
        for block, memory in zip(self.decoder, before[len(self.encoder) :], strict=False):
            y, memory = block(y, skips.pop(), memory, **how)
            after.append(memory)
        y, memory = self.last(y, before[-1], **how)
        after.append(memory)
        if self.to_rgbm is None:
            return y.to(x.dtype), None, tuple(after)
        y, mask = self.blend(x, y)
        return y, mask, tuple(after)

    def blend(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The mask head: `m x + (1 - m) tanh(rgb)`, and m."""
        assert self.fuse is not None and self.to_rgbm is not None
        y = cat_channels(per_frame(pixel_shuffle, features, self.patch), x)
        y = leaky_relu(per_frame(self.fuse, y), SLOPE)
        with exact(y):
            rgb, mask = per_frame(self.to_rgbm, y.to(x.dtype)).split((3, 1), 2)
        mask = self.mask_gain * mask.sigmoid()
        return torch.lerp(rgb.tanh(), x, mask), mask


class Discriminator(nn.Module):
    """Discriminator or critic: one RPB a width, mean over the pixels that are left, FC, LeakyReLU, FC.

    Shapes: frames (B,T,3,H,W) -> (B,T,heads); entry t judges the prefix x[1:t]. A discriminator's numbers are logits
    (the sigmoid of section 3.2 is inside the losses); a critic's is Q, through a ReLU when `positive` (the paper's).
    The mean over pixels lets one network judge frames of any size. The last RPB goes without normalisation, which
    would pin that mean: of a single frame to a constant, whatever it shows. memory: as for `Translator`.
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

    def forward(
        self, x: Tensor, state: State = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, State]:
        """Discriminator every prefix, from a state; `every` and `fork` as in `rlv2v.model.blocks`."""
        y, state = run_keeping(self, self.whole, x, state, all_states=all_states, one_step_from_each=one_step_from_each)
        return y, state

    def whole(self, x: Tensor, state: State, *, all_states: bool, one_step_from_each: bool) -> tuple[Tensor, State]:
        """`forward`, all frames at once."""
        before = state or (None,) * len(self.blocks)
        after = []
        y = space_to_depth(x, self.patch)
        for block, memory in zip(self.blocks, before, strict=True):
            y, _, memory = block(y, memory, all_states=all_states, one_step_from_each=one_step_from_each)
            after.append(memory)
        with exact(y):
            y = self.out(leaky_relu(self.hidden(y.mean((3, 4), dtype=x.dtype)), SLOPE))
        return (y.relu() if self.positive else y), tuple(after)
