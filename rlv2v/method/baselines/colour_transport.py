"""Optimal transport of the distribution of colours, as a 3-D table that any frame can be looked up in.

Source: Pitie, Kokaram, Dahyot 2007, "Automated colour grading using colour distribution transfer", section 3: iterative
distribution transfer (IDT). In each of several random orthonormal bases R of colour space, the marginal distributions
of the source are mapped to those of the target, one axis after the other by one monotone function each:

    u <- R^T f(R u),   f_i = C_target,i^-1 o C_source,i        with C the cumulative distributions along axis i

The linear map of the same authors (Monge-Kantorovitch, 2007) would not do: it moves all colours of a frame alike, while
the synthetic set turns black to blue and leaves the other colours.

What differs from the paper:

- An iteration takes the mean of several bases, u <- mean over R of R^T f(R u), instead of one after the other. That is
  the descent of the sliced Wasserstein distance (Rabin, Peyre, Delon, Bernot 2011, section 3). It moves colours less on
  the way, and so comes nearer to the optimal transport: 22.9 dB instead of 17.9 on the synthetic set's valX.
- Colours are spread over their grey level first, so that equal pixels of a plain background need not move together.
- The map is baked into a table. A node moves by the median of how the samples around it move, and where there are none,
  as it is carried along itself. (A mean would mix the new background with the colours of objects, wherever the two
  domains have unequally much of it.)
- The regraining that follows there is left out, which looks at neighbouring pixels: medians leave no noise to hide.
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
ITERATIONS, BASES = 8, 4
GREY_LEVEL = 1.0 / 127.5
CARRIED = 0.1  # weight of a node's own image, in samples


def nodes() -> np.ndarray:
    """Return the colours of the table's nodes, (NODES,NODES,NODES,3) in [-1,1]; axis n is channel n."""
    levels = np.linspace(-1.0, 1.0, NODES)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)


def monotone(source: np.ndarray, target: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map `source` (s,) and points (n,) by the monotone function that gives `source` the distribution of `target` (t,).

    Between values of the source it is linear; beyond their range it goes on with slope 1.
    """
    order = np.argsort(source)
    ranks = (np.arange(len(source)) + 0.5) / len(source)
    quantiles = np.interp(ranks, (np.arange(len(target)) + 0.5) / len(target), np.sort(target))
    mapped = np.empty_like(source)
    mapped[order] = quantiles
    values = source[order]
    beyond = np.minimum(points - values[0], 0.0) + np.maximum(points - values[-1], 0.0)
    return mapped, np.interp(points, values, quantiles) + beyond


def transport(
    source: np.ndarray, target: np.ndarray, points: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the transfer takes the colours `source` (s,3), and points (n,3) along with them.

    target: the colours (t,3) whose distribution the source gets.
    """
    for _ in range(ITERATIONS):
        images = []
        for _ in range(BASES):
            basis = np.linalg.qr(rng.standard_normal((3, 3)))[0]
            axes = [np.moveaxis(colours @ basis, -1, 0) for colours in (source, target, points)]
            mapped = [monotone(*along) for along in zip(*axes, strict=True)]
            images.append([np.stack(columns, -1) @ basis.T for columns in zip(*mapped, strict=True)])
        source, points = (np.mean(of_bases, 0) for of_bases in zip(*images, strict=True))
    return source, points


def corners(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes around colours (n,3), and their weights in trilinear interpolation, both (n,8)."""
    places = (colours.clip(-1.0, 1.0) + 1.0) / 2.0 * (NODES - 1)
    low = np.minimum(places.astype(np.int64), NODES - 2)
    part = places - low
    around = [np.ravel_multi_index(tuple((low + corner).T), (NODES,) * 3) for corner in np.ndindex(2, 2, 2)]
    weights = [np.where(corner, part, 1.0 - part).prod(1) for corner in np.ndindex(2, 2, 2)]
    return np.stack(around, 1), np.stack(weights, 1)


def weighted_medians(groups: np.ndarray, weights: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    """Return the weighted median of the values (n,) in each of `num` groups; every group must have a value."""
    order = np.lexsort((values, groups))
    groups, weights, values = groups[order], weights[order], values[order]
    total = np.bincount(groups, weights, num)
    reached = weights.cumsum() - (total.cumsum() - total)[groups]  # within the group
    is_past = reached >= 0.5 * total[groups] * (1.0 - 1e-9)
    first = np.full(num, len(groups))
    np.minimum.at(first, groups[is_past], np.flatnonzero(is_past))
    return values[first]


def transport_table(source: np.ndarray, target: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return the table of the map from colours `source` (s,3) to `target` (t,3): float32 (3,NODES,NODES,NODES)."""
    rng = np.random.default_rng(seed)
    source, target = (c + GREY_LEVEL * (rng.random(c.shape) - 0.5) for c in (source, target))
    colours = nodes().reshape(-1, 3)
    mapped, carried = transport(source, target, colours, rng)
    around, shares = corners(source)
    groups = np.concatenate([around.ravel(), np.arange(len(colours))])
    weights = np.concatenate([shares.ravel(), np.full(len(colours), CARRIED)])
    moves = [
        np.concatenate([np.repeat(a, 8), b]) for a, b in zip((mapped - source).T, (carried - colours).T, strict=True)
    ]
    table = colours + np.stack([weighted_medians(groups, weights, move, len(colours)) for move in moves], -1)
    return np.moveaxis(table.reshape(NODES, NODES, NODES, 3).clip(-1.0, 1.0), -1, 0).astype(np.float32)


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
