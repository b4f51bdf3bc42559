"""What this project adds to the paper, each behind a weight in the config (0 in the `paper` preset).

The paper's losses alone keep neither the shape nor the colours of what should stay: see docs/method.md for the
figures. Everything here works on frames (B,T,3,H,W) in [-1,1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, avg_pool2d, l1_loss

from rlv2v.runtime.distributed import gather, num_ranks

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0))  # (dy, dx) in pixels


def local_contrast(frames: Tensor) -> Tensor:
    """c = d / (d + k) for every pixel and neighbour, d = RGB distance in 0..1 units; (B,T,num_pairs) in [0,1).

    k = 2 mean(d) + 0.05, the mean over the frame and without gradient: c saturates, so that an edge counts as an edge
    whatever its height, and does not change when a whole frame is darkened or loses contrast.
    """
    rgb = (frames + 1) / 2
    height, width = rgb.shape[-2:]
    maps = []
    for dy, dx in NEIGHBOURS:
        if dy >= height or abs(dx) >= width:
            continue
        near = rgb[..., : height - dy, max(-dx, 0) : width - max(dx, 0)]
        far = rgb[..., dy:, max(dx, 0) : width + min(dx, 0)]
        maps.append(((near - far).square().sum(-3) + 1e-8).sqrt().flatten(2))
    distance = torch.cat(maps, -1)
    knee = 2.0 * distance.detach().mean(-1, keepdim=True) + 0.05
    return distance / (distance + knee)


def contrast_loss(source: Tensor, translated: Tensor) -> Tensor:
    """mean | c(G(x)) - c(x) |, c the local contrast: keeps edges where the source has them, and adds none."""
    return l1_loss(local_contrast(translated), local_contrast(source))


def mask_prior(mask: Tensor) -> Tensor:
    """mean(1 - m): what can be copied from the source should be."""
    return (1 - mask).mean()


def colours(frames: Tensor, directions: Tensor) -> Tensor:
    """Pixel colours of clips (B,T,3,H,W), pooled to about 16 pixels a side, along `directions` (3,K): (B,T,K,n)."""
    pooled = avg_pool2d(frames.flatten(0, 1), max(1, min(frames.shape[-2:]) // 16)).unflatten(0, frames.shape[:2])
    with torch.autocast(frames.device.type, enabled=False):
        return torch.einsum("btchw,ck->btkhw", pooled, directions.to(pooled.dtype)).flatten(3)


def quantile_gap(a: Tensor, b: Tensor, bins: int = 64) -> Tensor:
    """Mean distance between two sets of `colours`, sorted and averaged in bins, by direction and by frame.

    Averages rather than single quantiles: which one of equal pixels a quantile is, is chance, and so is its gradient.
    """

    def table(values: Tensor) -> Tensor:
        return adaptive_avg_pool1d(values.permute(1, 2, 0, 3).flatten(2).sort(-1).values, bins)

    return l1_loss(table(a), table(b))


def domain_gap(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Sliced Wasserstein-1 distance between the pixel colours of two sets of clips, averaged over frame indices.

    Colours are projected on `directions` (3,K), sorted, and compared in 64 bins; the clips need not be paired nor as
    many; those of all ranks count. It knows nothing of shapes: it tells how far a translator has come towards a
    domain's colours and their course in time, which is what the schedule follows.
    """
    return quantile_gap(gather(colours(a, directions)), gather(colours(b, directions)))


def gap_floor(target: Sequence[Tensor], num_other: int, directions: Tensor) -> Tensor:
    """What `domain_gap` of `num_other` clips a rank of the *same* domain to `target` would be: halves of it tell.

    Two samples of one domain are never at distance 0. The distance between samples of n and m clips falls as
    sqrt(1/n + 1/m), by which the halves' distance is scaled. 0 for a single clip. target: the domain's sets of clips.
    """
    values = torch.cat([gather(colours(clips, directions)) for clips in target])
    num, half = len(values), len(values) // 2
    if half == 0:
        return torch.zeros((), device=values.device)
    scale = math.sqrt((1 / (num_other * num_ranks()) + 1 / num) / (1 / half + 1 / (num - half)))
    return scale * quantile_gap(values[:half], values[half:])
