"""How far two domains of video are from each other, by the small patches of their clips: the loss term `patches`.

Patches of each of the `KINDS` are drawn at random places of random clips. A patch is seen as a vector: the mean of its
colours, what each pixel differs from it, and how high in the frame it is. The patches of two domains are projected on
random directions; sorted, they are compared one to one: the sliced Wasserstein-1 distance. Neither clips nor content
need to be paired, nor do clips need to be aligned in time: what is compared is how pixels change between any two
frames, not what they are at an index.
Source: Rabin et al. 2011 (sliced Wasserstein); Elnekave and Weiss 2022, arXiv:2203.16862 (of patches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlv2v.kernels.sorting import sort_rows
from rlv2v.runtime.constants import constant
from rlv2v.runtime.device import on_device
from rlv2v.runtime.distributed import gather

NUM_PATCHES = 4096  # of a kind, domain and step, of all ranks together
NUM_DIRECTIONS = 16  # of patches, in patch_gaps
HEIGHT = 3.0  # scale of the place of a patch: what is the sky and what is the ground
MEAN = 1.7  # scale of the mean of a patch

Groups = Sequence[Tensor | None]
"""The clips of a domain, (B,T,3,H,W) each, every group in the order of the replicas; None is no group."""


class Kind(NamedTuple):
    """A shape of patches: frames by pixels by pixels; two frames are any two of a clip."""

    frames: int
    side: int

    @property
    def num_values(self) -> int:
        """Values of a patch."""
        return 3 * self.frames * self.side**2

    @property
    def num_features(self) -> int:
        """Features of a patch: its values without their means, the three means, and its place."""
        return self.num_values + 3 + 2


KINDS = (Kind(1, 1), Kind(1, 3), Kind(2, 1))


class Draws(NamedTuple):
    """The random part of a step's added terms."""

    places: Tensor
    """Of the patches of the two domains: (kinds,2,R,n,5), uniform in [0,1), for clip, frame, row, column and later
    frame; R replicas."""
    of_values: Tensor
    """The directions, as weights of a patch's values: (K,values), the kinds beside each other; float64."""
    of_place: Tensor
    """The directions, as weights of a patch's height and gap in time: (kinds,K,2); float64."""


def draw(rng: np.random.Generator, num_replicas: int, replicas: range, device: torch.device) -> Draws:
    """Return the draws of a step for the replicas of a rank; `rng` is the same on every rank."""
    places, of_values, of_place = [], [], []
    own, num = slice(replicas.start, replicas.stop), max(1, NUM_PATCHES // num_replicas)
    for kind in KINDS:
        places.append(rng.random((2, num_replicas, num, 5), np.float32)[:, own])
        directions = rng.standard_normal((kind.num_features, NUM_DIRECTIONS))
        directions /= np.linalg.norm(directions, axis=0)
        of_values.append(weights_of_values(kind, directions).T)
        of_place.append(directions[-2:].T)
    joined = (np.stack(places), np.concatenate(of_values, 1), np.stack(of_place))
    return Draws(*(on_device(np.ascontiguousarray(values), device) for values in joined))


def weights_of_values(kind: Kind, directions: np.ndarray) -> np.ndarray:
    """Return directions (features,K) as weights of the values of a patch, (values,K).

    The features are 2 / k (value - mean) for each frame, channel and pixel, and `MEAN` times the mean of each channel.
    """
    num = kind.num_values
    different = directions[:num].reshape(kind.frames, 3, kind.side**2, -1)
    different = 2 / kind.side * (different - different.mean((0, 2), keepdims=True))
    mean = MEAN / (kind.frames * kind.side**2) * directions[num : num + 3, None]
    return (different + mean).reshape(num, -1)


def patch_gaps(pairs: Sequence[tuple[Groups, Groups]], draws: Draws) -> Tensor:
    """Return the sliced Wasserstein-1 distance of the patches of each pair of domains, mean over `KINDS`: (pairs,).

    All clips are of one length and size. Those of all ranks count. The first domains of all pairs take the same draws
    of places, and so do the second ones.
    """
    sides = [[[group for group in groups if group is not None] for groups in side] for side in zip(*pairs, strict=True)]
    counts = tuple(tuple(tuple(map(len, groups)) for groups in side) for side in sides)
    flat = [torch.cat([group for groups in side for group in groups]) for side in sides]
    shape, dtype = tuple(flat[0].shape[1:]), flat[0].dtype
    flat = [frames.contiguous().flatten() for frames in flat]
    starts, places = locate(counts, shape, draws.places)
    gaps = []
    with torch.autocast(flat[0].device.type, enabled=False):
        of_place = draws.of_place.to(dtype) * constant(scale_of_place, *shape, like=flat[0])
        by_place = (of_place @ places.to(dtype).flatten(2)).unflatten(2, (2, len(pairs), -1))  # (kinds,K,2,P,R*n)
        of_values = draws.of_values.to(dtype).split([kind.num_values for kind in KINDS], 1)
        for kind, weights, place, first in zip(KINDS, of_values, by_place, starts, strict=True):
            weight, ordered = weights.expand(len(pairs), -1, -1), []
            for side in range(2):
                indices = first[side, ..., : kind.frames, None] + constant(offsets, kind.side, *shape, like=starts)
                values = flat[side].index_select(0, indices.flatten()).view(len(pairs), -1, kind.num_values)
                projected = torch.baddbmm(place[:, side].transpose(0, 1), weight, values.transpose(1, 2))  # (P,K,R*n)
                ordered.append(sort_rows(of_all_ranks(projected)))
            gaps.append((ordered[0] - ordered[1]).abs().mean((1, 2)))
    return torch.stack(gaps).mean(0)


Counts = tuple[tuple[tuple[int, ...], ...], ...]
"""Of each side and pair, the clips of each group."""


def locate(counts: Counts, shape: tuple[int, ...], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return where patches are: uniform (kinds,2,R,n,5) of `Draws`, in clips (T,3,H,W) that lie one after the other.

    The r-th replica has the r-th of R equal shares of each group of clips.

    Returns:
        the indices (kinds,2,P,R,n,2) of a patch's first value in its one or two frames; and its row and the time
        between its frames, (kinds,2,2,P,R,n), the second axis for the two of them.
    """
    length, _, height, width = shape
    num_shares, plane = uniform.shape[2], height * width
    numbers, largest = constant(choices, counts, num_shares, *shape, like=uniform)
    uniform = uniform.unsqueeze(2)
    clip, t, row, column = torch.minimum(uniform[..., :4] * numbers, largest).long().unbind(-1)
    later = length - 1 - t
    gap = 1 + torch.minimum((uniform[..., 4] * later).long(), later - 1)
    slots = clip + constant(first_slots, counts, num_shares, like=clip)
    start = constant(starts_of_clips, counts, num_shares, length * 3 * plane, like=clip).take(slots)
    first = start.add(column).add(row, alpha=width).add(t, alpha=3 * plane)
    return torch.stack((first, first.add(gap, alpha=3 * plane)), -1), torch.stack((row, gap), 1)


def choices(
    counts: Counts, num_shares: int, length: int, channels: int, height: int, width: int, like: Tensor
) -> Tensor:
    """Return how many values each number of a place has, and the largest of them, (2,kinds,2,P,1,1,4).

    A product may be rounded up to the number of values, hence the largest.
    """
    shares = [[sum(groups) // num_shares for groups in side] for side in counts]
    values = [
        [
            [[share, max(1, length - kind.frames + 1), height - kind.side + 1, width - kind.side + 1] for share in side]
            for side in shares
        ]
        for kind in KINDS
    ]
    numbers = torch.tensor(values, dtype=like.dtype, device=like.device)[:, :, :, None, None]
    return torch.stack((numbers, numbers - 1))


def slots_of_share(counts: Counts, num_shares: int) -> int:
    """Return the clips of the largest share."""
    return max(sum(groups) // num_shares for side in counts for groups in side)


def first_slots(counts: Counts, num_shares: int, like: Tensor) -> Tensor:
    """Return the index in `starts_of_clips` of the first clip of each share, (2,P,R,1)."""
    shape = (len(counts), len(counts[0]), num_shares, 1)
    slots = slots_of_share(counts, num_shares)
    return slots * torch.arange(shape[0] * shape[1] * shape[2], device=like.device).view(shape)


def starts_of_clips(counts: Counts, num_shares: int, stride: int, like: Tensor) -> Tensor:
    """Return where the clips of each share begin among those of its side, of `stride` values each: (2,P,R,slots)."""
    shares: list[list[int]] = []
    slots = slots_of_share(counts, num_shares)
    for side in counts:
        start = 0
        for groups in side:
            rows: list[list[int]] = [[] for _ in range(num_shares)]
            for group in groups:
                for replica, row in enumerate(rows):
                    row.extend(start + replica * (group // num_shares) + i for i in range(group // num_shares))
                start += group
            shares.extend(row + [0] * (slots - len(row)) for row in rows)
    return stride * torch.tensor(shares, device=like.device)


def offsets(side: int, length: int, channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Return how far the values of a patch's frame are from the first of them, (3*side*side,)."""
    planes, rows, columns = (torch.arange(n, device=like.device) for n in (channels, side, side))
    return (planes[:, None, None] * (height * width) + rows[:, None] * width + columns).flatten()


def scale_of_place(length: int, channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Return the scales of a patch's row, and of the time between its frames where it has two: (kinds,1,2).

    As features both run over a range of 2, the first one times `HEIGHT`; where they begin changes no distance.
    """
    scales = [[2 * HEIGHT / height, 2 / length * (kind.frames - 1)] for kind in KINDS]
    return torch.tensor(scales, dtype=like.dtype, device=like.device)[:, None]


def of_all_ranks(projected: Tensor) -> Tensor:
    """Return the projections (P,K,N) of every rank beside each other, (P,K,ranks*N)."""
    return gather(projected).unflatten(0, (-1, len(projected))).movedim(0, 2).flatten(2)
