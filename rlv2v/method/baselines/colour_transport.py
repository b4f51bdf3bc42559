"""Optimal transport of the distribution of colours, as a 3-D table that any frame can be looked up in.

Source: Pitie, Kokaram, Dahyot 2007, "Automated colour grading using colour distribution transfer", section 3: iterative
distribution transfer (IDT). In each of several random orthonormal bases R of colour space, the marginal distributions
of the source are mapped to those of the target, one axis after the other by one monotone function each:

    u <- R^T f(R u),   f_i = C_target,i^-1 o C_source,i        with C the cumulative distributions along axis i

The linear map of the same authors (Monge-Kantorovitch, 2007) would not do: it moves all colours of a frame alike, while
the synthetic set turns black to blue and leaves the other colours. Unlike the paper we carry the nodes of a table along
the iterations, so the map is baked into it, and leave out the regraining that follows there: it would look at the
frame's neighbouring pixels, and the table has no noise to hide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from rlv2v.model.frames import State
from rlv2v.model.generator import Generator

NODES = 17  # of the table, along each axis
ITERATIONS = 30  # bases


def nodes() -> np.ndarray:
    """Return the colours of the table's nodes, (NODES,NODES,NODES,3) in [-1,1]; axis n is channel n."""
    levels = np.linspace(-1.0, 1.0, NODES)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)


def monotone(source: np.ndarray, target: np.ndarray, *points: np.ndarray) -> list[np.ndarray]:
    """Map points (n,) by the monotone function that takes the distribution of `source` (s,) to that of `target` (t,).

    Equal values of the source share ranks: they go to the mean of the target's quantiles there. Beyond the source's
    range the function goes on with slope 1.
    """
    ranks = (np.arange(len(source)) + 0.5) / len(source)
    quantiles = np.interp(ranks, (np.arange(len(target)) + 0.5) / len(target), np.sort(target))
    values, counts = np.unique(source, return_counts=True)
    # `quantiles` belong to the sorted source, whose equal values are neighbours.
    images = np.bincount(np.repeat(np.arange(len(values)), counts), quantiles) / counts
    mapped = []
    for given in points:
        beyond = np.minimum(given - values[0], 0.0) + np.maximum(given - values[-1], 0.0)
        mapped.append(np.interp(given, values, images) + beyond)
    return mapped


def transport(source: np.ndarray, target: np.ndarray, points: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Map points (n,3) as iterative distribution transfer maps the colours `source` (s,3) to `target` (t,3)."""
    rng = np.random.default_rng(seed)
    for iteration in range(ITERATIONS):
        basis = np.linalg.qr(rng.standard_normal((3, 3)))[0] if iteration else np.eye(3)
        along = [(source @ basis)[:, i] for i in range(3)]
        mapped = [monotone(along[i], (target @ basis)[:, i], along[i], (points @ basis)[:, i]) for i in range(3)]
        source, points = (np.stack(columns, -1) @ basis.T for columns in zip(*mapped, strict=True))
    return points


def transport_table(source: np.ndarray, target: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return the table of the map from colours `source` (s,3) to `target` (t,3): float32 (3,NODES,NODES,NODES)."""
    colours = nodes()
    mapped = transport(source, target, colours.reshape(-1, 3), seed).reshape(colours.shape)
    return np.moveaxis(mapped.clip(-1.0, 1.0), -1, 0).astype(np.float32)


class ColourTable(Generator):
    """Look up each pixel's colour in a table, by trilinear interpolation, by frame index.

    table: (T,3,NODES,NODES,NODES); its last three axes are red, green and blue of the source. Its state is the number
    of frames seen, int64 (), not counted further than T.
    """

    any_size = True
    table: Tensor

    def __init__(self, num_indices: int) -> None:
        super().__init__()
        identity = torch.from_numpy(nodes()).movedim(-1, 0).float()
        self.register_buffer("table", identity.repeat(num_indices, 1, 1, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map frames (B,T,3,H,W)."""
        indices, state = frame_indices(x, state, len(self.table))
        pixels = x.permute(1, 0, 3, 4, 2).flip(-1)  # (T,B,H,W,3), blue first: the grid's first number is the last axis
        mapped = grid_sample(self.table[indices], pixels, padding_mode="border", align_corners=True)  # (T,3,B,H,W)
        return mapped.permute(2, 0, 1, 3, 4).to(x.dtype), state


def frame_indices(x: Tensor, state: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
    """Return the map of each frame of x (B,T,...) among `num`, (T,), and the state after them: the frames seen, ()."""
    start = torch.zeros((), dtype=torch.int64, device=x.device) if state is None else state
    indices = (start + torch.arange(x.shape[1], device=x.device)).clamp(max=num - 1)
    return indices, (start + x.shape[1]).clamp(max=num)
