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
from torch.nn.functional import normalize

from rlv2v.kernels.sorting import sort_rows
from rlv2v.runtime.constants import constant
from rlv2v.runtime.device import on_device
from rlv2v.runtime.distributed import gather

NUM_PATCHES = 4096  # of a kind, domain and step, of all ranks together
NUM_DIRECTIONS = 16  # of patches, in patch_gap
HEIGHT = 3.0  # scale of the place of a patch: what is the sky and what is the ground


class Kind(NamedTuple):
    """A shape of patches: frames by pixels by pixels; two frames are any two of a clip."""

    frames: int
    side: int

    @property
    def num_features(self) -> int:
        """Features of a patch."""
        return 3 * (self.frames * self.side**2 + 1) + 2


KINDS = (Kind(1, 1), Kind(1, 3), Kind(2, 1))


class Draws(NamedTuple):
    """The random part of a step's added terms; a tuple has an entry for each of `KINDS`."""

    places: tuple[Tensor, ...]
    """Of the patches of the two domains: (2,R,n,5), uniform in [0,1), for clip, frame, row, column and later frame; R
    replicas."""
    directions: tuple[Tensor, ...]
    """Unit vectors (features,K)."""


def draw(rng: np.random.Generator, num_replicas: int, replicas: range, device: torch.device) -> Draws:
    """Return the draws of a step for the replicas of a rank; `rng` is the same on every rank."""

    def unit_vectors(size: int, num: int) -> Tensor:
        return normalize(on_device(rng.standard_normal((size, num)).astype(np.float32), device), dim=0)

    places, directions = [], []
    own, num = slice(replicas.start, replicas.stop), max(1, NUM_PATCHES // num_replicas)
    for kind in KINDS:
        uniform = rng.random((2, num_replicas, num, 5), np.float32)[:, own]
        places.append(on_device(np.ascontiguousarray(uniform), device))
        directions.append(unit_vectors(kind.num_features, NUM_DIRECTIONS))
    return Draws(tuple(places), tuple(directions))


def patch_features(clips: Tensor, kind: Kind, places: Tensor) -> Tensor:
    """Return what patches are like: clips (B,T,3,H,W), places (R,n,5) -> (R*n, 3 f k^2 + 5), f frames of k x k pixels.

    The features are 2 / k (pixel - mean), 1.7 mean, `HEIGHT` times the place of the patch down the frame, and the time
    between two frames, both from -1 to 1. Places of replica r are in the r-th of R equal shares of the clips.
    """
    batch, length, _, height, width = clips.shape
    (frames, side), num_shares = kind, len(places)
    share = batch // num_shares
    sizes = (share, max(1, length - frames + 1), height - side + 1, width - side + 1)
    numbers, largest = constant(choices, *sizes, like=places)
    clip, t, row, column = torch.minimum(places[..., :4] * numbers, largest).long().unbind(-1)
    later = length - 1 - t
    gap = 1 + torch.minimum((places[..., 4] * later).long(), later - 1) if frames == 2 else torch.zeros_like(t)
    plane = height * width
    first = (clip * length + t) * (3 * plane) + row * width + column
    if num_shares > 1:
        first = first + constant(starts_of_shares, num_shares, share * length * 3 * plane, like=places)
    starts = torch.stack((first, first + gap * (3 * plane)), -1) if frames == 2 else first  # (R,n,f)
    indices = starts.view(-1, 1) + constant(offsets, side, width, plane, like=places)
    pixels = clips.contiguous().flatten().index_select(0, indices.flatten()).view(-1, frames, 3, side**2)
    mean = pixels.mean((1, 3), keepdim=True)
    different = 2.0 / side * (pixels - mean)
    place = (2 * torch.stack((row, gap), -1).flatten(0, 1)).to(pixels.dtype)
    scale, shift = constant(scale_of_place, height, side, length, like=pixels)
    return torch.cat((different.flatten(1), 1.7 * mean.flatten(1), torch.addcmul(shift, place, scale)), 1)


def choices(clips: int, times: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Return how many values each number of a place has, and the largest of them, (2,4); a product may be rounded up to
    the first."""
    sizes = [
        torch.full((), float(size), dtype=like.dtype, device=like.device) for size in (clips, times, rows, columns)
    ]
    return torch.stack([torch.stack(sizes), torch.stack(sizes) - 1])


def starts_of_shares(num: int, stride: int, like: Tensor) -> Tensor:
    """Return where the shares of the replicas begin in the clips, (R,1)."""
    return stride * torch.arange(num, device=like.device)[:, None]


def offsets(side: int, width: int, plane: int, like: Tensor) -> Tensor:
    """Return how far the values of a patch are from its first, (3*side*side,)."""
    channels, rows, columns = (torch.arange(n, device=like.device) for n in (3, side, side))
    return (channels[:, None, None] * plane + rows[:, None] * width + columns).flatten()


def scale_of_place(height: int, side: int, length: int, like: Tensor) -> Tensor:
    """Return scale and shift of (2 row, 2 gap) to features, (2,2)."""
    values = ((HEIGHT / height, 1 / length), (HEIGHT * (side / height - 1), -1.0))
    each = [torch.full((), value, dtype=like.dtype, device=like.device) for row in values for value in row]
    return torch.stack(each).unflatten(0, (2, 2))


def patch_gap(a: Sequence[Tensor | None], b: Sequence[Tensor | None], draws: Draws) -> Tensor:
    """Return the sliced Wasserstein-1 distance of the patches of two domains, mean over `KINDS`.

    Each domain has its clips in groups (B,T,3,H,W); None is no group. The clips of all ranks count, and the domains
    need not be of one size.
    """
    num_replicas, gaps = draws.places[0].shape[1], []
    domains = [
        torch.cat([group.unflatten(0, (num_replicas, -1)) for group in groups if group is not None], 1).flatten(0, 1)
        for groups in (a, b)
    ]
    with torch.autocast(domains[0].device.type, enabled=False):
        for kind, places, directions in zip(KINDS, draws.places, draws.directions, strict=True):
            first, second = (
                sort_rows(gather(patch_features(clips, kind, own) @ directions.to(clips.dtype)).T.contiguous())
                for clips, own in zip(domains, places, strict=True)
            )
            gaps.append((first - second).abs().mean())
    return torch.stack(gaps).mean()
