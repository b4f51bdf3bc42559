"""The one table of the Triton kernels' tiles.

A program computes `bm` pixels by `bc` channels, all four gates of them, and walks the sum over k*k taps and input
channels in chunks of `bk`. A thread then keeps bm*4*bc/(32*num_warps) fp32 sums in the forward step, 64 at the most,
and a quarter of that in the backward step, whose epilogue in turn holds more operands: both spill at twice the tile.

Chosen from what `rlv2v.kernels.aot` reads of the compiled kernels and from counts, not timed: no GPU was at hand. With
B16 C256 8x8 in 16 bits a forward step of 64x32 tiles is 128 programs, 4.8 GFLOP and 113 MB from the L2 cache to the
multiprocessors (backward 226 MB). Chunks of 32 let 3 programs share a multiprocessor of sm_86 where chunks of 64 let 2,
so all 128 run at once on 46 of them. B4 C32 32x32 is 64 programs of 64 pixels, fewer than one for each multiprocessor
of a large GPU or two for each of a small one: hence half the pixels a program in so small a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WARPS = 4  # 8 warps with one loop over taps and channels is reported miscompiled (pytorch #173068)
FEW_PROGRAMS = 128
KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory that a program may have, by architecture."""


@dataclass(frozen=True)
class Tile:
    """Pixels, channels and summands a program takes at a time, and how it is compiled."""

    bm: int
    bc: int
    bk: int
    num_warps: int = WARPS
    num_stages: int = 3

    @property
    def maxnreg(self) -> int | None:
        """The most registers a thread may take; None leaves it to ptxas.

        Left alone, ptxas spills 8 bytes in some kernels of the small tile to fit one more program on a multiprocessor;
        168 still leaves room for 3.
        """
        return 168 if self.bm == 32 else None


def architecture(capability: tuple[int, int]) -> int:
    """The architecture whose tiles fit a compute capability: 90 for the data-centre cards from 9.0 on, else 86.

    12.x has the 99 KB of 8.6 and no wgmma, so it takes the tiles of 86; so does 8.0, which has more.
    """
    return 90 if capability[0] in (9, 10) else 86


def forward_tile(channels: int, pixels: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of the forward step, whose sum runs over k*k*C.

    Args:
        channels: C, of the state.
        pixels: G*B*H*W, of one step of all groups.
        dtype: of the frames and the weight.
        capability: compute capability of the device.
    """
    if dtype == torch.float32:  # without TF32 sums run on the FMA units, operands in registers
        return Tile(pixels_a_program(pixels, channels, 16), 16, 16)
    bc = 16 if channels <= 16 else 32
    bm = pixels_a_program(pixels, channels, bc)
    if architecture(capability) == 90:
        return Tile(bm, bc, min(channels_above(channels), 64), num_stages=4)
    return Tile(bm, bc, min(channels_above(channels), 32))


def backward_tile(channels: int, pixels: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of the backward step, whose sum runs over k*k*4C; arguments as in `forward_tile`."""
    bc = 16 if channels <= 16 else 32
    bm = pixels_a_program(pixels, channels, bc)
    if dtype == torch.float32:
        return Tile(bm, bc, 16)
    # On sm_86 a fourth stage would cost the large tile a program a multiprocessor.
    stages = 4 if architecture(capability) == 90 or bm == 32 else 3
    return Tile(bm, bc, min(channels_above(4 * channels), 64), num_stages=stages)


def pixels_a_program(pixels: int, channels: int, bc: int) -> int:
    """64, or 32 where that makes few programs, or where C is odd for vectors, whose addresses take registers."""
    if channels % 8:
        return 32
    return 64 if -(-pixels // 64) * -(-channels // bc) >= FEW_PROGRAMS else 32


def channels_above(channels: int) -> int:
    """The smallest power of two, 16 or more, that holds the channels."""
    return max(16, 1 << (channels - 1).bit_length())
