"""A generator that looks at small frames and decides what happens to the colours of frames of any size.

    encoder -> ConvLSTM -> grid (12 x bins x h x w) = identity + global part + local deviations;  G(x) = A x + b
with A, b read off the grid at each pixel by its place and its guide (`rlv2v.kernels.bilateral`). Edges stay where they
are, whatever the network does, and at the first step it is the identity.
Source: Gharbi et al. 2017, arXiv:1707.02880 (HDRNet), on the blocks of RL-V2V-GAN, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from rlv2v.kernels.bilateral import slice_apply
from rlv2v.model.activation_memory import in_chunks, set_memory
from rlv2v.model.blocks import RPB, limit_history
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import (
    RunMode,
    State,
    batch_major,
    cat_channels,
    frame_major,
    per_frame,
    space_to_depth,
)
from rlv2v.model.generator import Details, Generator, Grids
from rlv2v.runtime.constants import constant

LUMA = (0.299, 0.587, 0.114)  # BT.601
BURN_IN = 6  # frames
AROUND = (4, 16)  # pixels of a small frame
CONTRAST = 4.0  # of the units of the guide that begin as a difference from around, whose size is about 1 / CONTRAST
LEAST = 0.02  # a difference that is none: rounding does not decide on which side of a kink a plane of one colour lies
LOCAL = 0.3  # step of the local deviations beside that of the global part


class Guide(nn.Module):
    """Make the guide of a pixel: its luma in [0,1] and what a network of two layers adds, 0 at first.

    The network sees the pixel's colour and how light the frame is around it, at the sizes `AROUND`: what is brighter
    than its surroundings, a lamp or a line, may be treated by itself. It has no edges of its own, as it sees no place.
    """

    luma: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, 3 + len(AROUND))), nn.Parameter(torch.zeros(width))
        self.factor = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():  # half of the units begin as what is lighter, or darker, than its surroundings
            for unit, (around, sign) in zip(range(width // 2), product(range(len(AROUND)), (1, -1)), strict=False):
                self.weight[unit] = 0.0
                self.weight[unit, :3] = sign * CONTRAST * torch.tensor(LUMA)
                self.weight[unit, 3 + around] = -sign * CONTRAST
                self.bias[unit] = -CONTRAST * LEAST
        self.register_buffer("luma", torch.tensor([*LUMA, 1.0, 0.0]) / 2)

    @property
    def curve(self) -> Tensor:
        """The same as an argument of `slice_apply_frame`, (1+J,5+K)."""
        luma = torch.cat((self.luma[:3], self.luma.new_zeros(len(AROUND)), self.luma[3:]))
        return torch.cat((luma[None], torch.cat((self.weight, self.bias[:, None], self.factor[:, None]), 1)))

    def forward(self, frames: Tensor, around: Tensor) -> Tensor:
        """Return the guide (N,H,W) of frames (N,3,H,W), with the lumas around (N,K,h,w) of the small ones."""
        pixels = torch.cat((frames, bilinear(around, *frames.shape[-2:])), 1)
        hidden = conv2d(pixels, self.weight[..., None, None], self.bias).relu()
        luma = torch.einsum("nchw,c->nhw", frames, self.luma[:3]) + self.luma[3]
        return luma + torch.einsum("njhw,j->nhw", hidden, self.factor)


class GridTranslator(Generator):
    """A generator G that reads a bilateral grid off small frames and applies it; causal, video to video.

    Shapes: frames (B,T,3,H,W) in [-1,1] -> (B,T,3,H,W), not bounded; H and W are multiples of `multiple`.

    Args:
        widths: channels after each RPB; a cell of the grid is patch * 2^len(widths) pixels wide.
        patch: space-to-depth factor before the first RPB.
        norm: "clip" or "batch", see `SequenceNorm`.
        horizon: clip length for which the ConvLSTMs' biases are initialised as a clock (0: biases 0), see `ConvLSTM`;
            with a clock there is no burn-in, which would shift it.
        bins: of the guide.
        hidden: channels of the last ConvLSTM.
        memory: what a training run stores for its backward pass, see `rlv2v.model.activation_memory`.
    """

    starts_as_copy = True

    def __init__(
        self,
        widths: Sequence[int],
        *,
        patch: int = 1,
        norm: str = "clip",
        horizon: int = 0,
        bins: int = 6,
        hidden: int = 16,
        memory: str = "store",
    ) -> None:
        super().__init__()
        self.patch, self.multiple, self.bins = patch, patch * 2 ** len(widths), bins
        self.burn_in = 0 if horizon else BURN_IN
        ins = [3 * patch**2, *widths[:-1]]
        self.encoder = nn.ModuleList(RPB(c_in, c_out, norm, horizon) for c_in, c_out in zip(ins, widths, strict=True))
        self.last = ConvLSTM(widths[-1] + 2, hidden, horizon=horizon)
        self.to_whole, self.to_local = nn.Linear(hidden, 12 * bins), nn.Conv2d(hidden, 12 * bins, 1)
        for values in (*self.to_whole.parameters(), *self.to_local.parameters()):
            nn.init.zeros_(values)
        self.guide = Guide()
        set_memory(self, memory)

    def forward(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        """Translate frames from a state; `mode` as in `rlv2v.model.blocks`."""
        grids, state = self.decide(x, state, **mode)
        return self.transform(grids, x), state

    def forward_with_details(
        self, x: Tensor, state: State = None, **mode: Unpack[RunMode]
    ) -> tuple[Tensor, Details, State]:
        grids, state = self.decide(x, state, **mode)
        return self.transform(grids, x), Details(grids=grids), state

    def limit_state(self, state: State, frames: int) -> State:
        """Return the state such that the normalisation forgets what is older, see `limit_history`."""
        return limit_history(state, frames + self.burn_in)

    def decide(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Grids, State]:
        """Return the grids of frames, from a state.

        Where a video starts, its first frame comes `burn_in` times more before it, unseen and without a gradient: the
        recurrence has settled when the first frame is translated.
        """
        if state is None and self.burn_in:
            with torch.no_grad():
                state = self._decide(x[:, :1].expand(-1, self.burn_in, -1, -1, -1))[2]
        whole, local, state = self._decide(x, state, **mode)
        return Grids(whole, local, luma_around(x, 2 * self.guide.luma[:3])), state

    @in_chunks
    def _decide(self, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Tensor, Tensor, State]:
        old_states = iter(state or (None,) * (len(self.encoder) + 1))
        new_states = []
        y = space_to_depth(x, self.patch)
        for block in self.encoder:
            y, _, block_state = block(y, next(old_states), **mode)
            new_states.append(block_state)
        where = constant(places, *y.shape[-2:], like=y).expand(*y.shape[:2], -1, -1, -1)
        y, last_state = self.last(cat_channels(y, where), next(old_states), **mode)
        with torch.autocast(y.device.type, enabled=False):  # the colours of a frame in full precision
            y = y.to(x.dtype)
            whole = self.to_whole(y.mean((3, 4)))[..., None, None]
            local = LOCAL * per_frame(self.to_local, y)
        shape = (12, self.bins)
        return whole.unflatten(2, shape), local.unflatten(2, shape), (*new_states, last_state)

    def transform(self, grids: Grids, frames: Tensor) -> Tensor:
        """Return frames (B,T,3,H,W) of any size as the grids transform them."""
        with torch.autocast(frames.device.type, enabled=False):
            flat = frame_major(frames)
            guide = self.guide(flat, frame_major(grids.around))
            y = slice_apply(frame_major(grids.grid), guide, flat)
        return batch_major(y, frames)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Return the places of pixels, (2,height,width): from -1 to 1, down and to the right, as dtype of `like`."""
    rows, columns = ((2 * torch.arange(size, device=like.device) + 1) / size - 1 for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(like.dtype)


def luma_around(x: Tensor, weights: Tensor) -> Tensor:
    """Return the mean luma of frames (B,T,3,H,W) over cells of each size of `AROUND`, (B,T,K,h,w).

    weights: of the luma, (3,).  h and w are the numbers of the smallest cells; means over larger ones are interpolated
    to them.
    """
    with torch.autocast(x.device.type, enabled=False):
        luma = torch.einsum("btchw,c->bthw", x, weights.to(x.dtype))
        down, across = (constant(means_around, pixels, like=luma) for pixels in luma.shape[-2:])
        return down @ luma.unsqueeze(2) @ across.mT


def means_around(pixels: int, like: Tensor) -> Tensor:
    """Return the weights by which pixels along an axis make means of cells of each size of `AROUND`, interpolated to
    the places of the smallest cells: (K,cells,pixels), as dtype of `like`."""
    counts = [-(-pixels // size) for size in AROUND]
    return torch.stack([hats(num, counts[0], like) @ cell_means(num, pixels, like) for num in counts])


def cell_means(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Return the weights (cells, pixels) by which pixels along an axis make means of cells, as dtype of `like`."""
    low = torch.arange(pixels, dtype=like.dtype, device=like.device)
    start = torch.arange(cells, dtype=like.dtype, device=like.device)[:, None] * pixels / cells
    covered = torch.minimum(low + 1, start + pixels / cells) - torch.maximum(low, start)
    return covered.clamp(min=0) * cells / pixels


def bilinear(planes: Tensor, height: int, width: int) -> Tensor:
    """Return planes (...,h,w) interpolated to (...,height,width), by the places of `slice_apply`.

    Products with matrices: a gradient is summed in one order, on a GPU too.
    """
    sides = zip(planes.shape[-2:], (height, width), strict=True)
    down, across = (constant(hats, cells, pixels, like=planes) for cells, pixels in sides)
    return down @ planes @ across.T


def hats(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Return the weights (pixels, cells) by which values of cells are interpolated linearly at pixels."""
    place = (torch.arange(pixels, dtype=like.dtype, device=like.device) + 0.5) * cells / pixels - 0.5
    away = place.clamp(0, cells - 1)[:, None] - torch.arange(cells, dtype=like.dtype, device=like.device)
    return (1 - away.abs()).clamp(min=0)
