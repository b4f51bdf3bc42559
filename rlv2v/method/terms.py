"""The loss terms that this project adds to the paper's, and their registry.

The paper's losses alone keep neither the shape nor the colours of what should stay: docs/method.md has the figures. To
add a term, write its function and list it in `TERMS`: its weight becomes a flag, and the presets read their weights
here. Everything works on frames (B,T,3,H,W) in [-1,1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, avg_pool2d, l1_loss

from rlv2v.runtime.distributed import gather, num_ranks

if TYPE_CHECKING:  # `rlv2v.config` reads the registry, and these read the config
    from rlv2v.method.clips import Clips
    from rlv2v.method.rollout import Rollout
    from rlv2v.model.build import Nets

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class TermInputs:
    """What a term may look at: the networks, the batch, both rollouts, and the directions (3,K) of `domain_gap`."""

    nets: Nets
    clips: Clips
    x: Rollout
    """X -> Y -> X."""
    y: Rollout
    """Y and Z -> X -> Y."""
    directions: Tensor


@dataclass(frozen=True)
class Term:
    """An added loss term: its name, which is its weight's flag, the weights of two presets, and its function.

    The function yields (suffix, value ()) pairs, one a domain; `<name>_<suffix>` is what the log calls them.
    """

    name: str
    meaning: str
    default: float
    """Weight in the preset `default`."""
    compute: Callable[[TermInputs], Named]
    paper: float = 0.0
    """Weight in the preset `paper`."""
    needs: frozenset[Literal["same", "back"]] = frozenset()
    """Which optional parts of a rollout it looks at."""
    ramped: bool = False
    """Whether the schedule's content gain scales it."""


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


def cycle_loss(inputs: TermInputs) -> Named:
    """Yield |G_X(G_Y(x)) - x| and its mirror (Zhu et al. 2017, eq. 2)."""
    for name, rollout in (("x", inputs.x), ("y", inputs.y)):
        assert rollout.cycle is not None
        yield name, l1_loss(rollout.cycle, rollout.video)


def identity_loss(inputs: TermInputs) -> Named:
    """Yield |G_X(x) - x|, |G_Y(y) - y| over y and z, and |G_Y(s) - s| on stills (Zhu et al. 2017, section 5.2)."""
    for name, rollout in (("x", inputs.x), ("y", inputs.y)):
        assert rollout.same is not None
        yield name, l1_loss(rollout.same, rollout.video)
    stills = inputs.clips.s
    if stills is not None:
        yield "s", l1_loss(inputs.nets.g_y(stills)[0], stills)


def contrast_terms(inputs: TermInputs) -> Named:
    """Yield `contrast_loss` of both directions, that of Y -> X doubled."""
    yield "x", contrast_loss(inputs.x.video, inputs.x.fake)
    yield "y", 2.0 * contrast_loss(inputs.y.video, inputs.y.fake)


def mask_terms(inputs: TermInputs) -> Named:
    """Yield `mask_prior` of both directions, where the generators have a copy mask."""
    for name, rollout in (("x", inputs.x), ("y", inputs.y)):
        if rollout.mask is not None:
            yield name, mask_prior(rollout.mask)


def colour_terms(inputs: TermInputs) -> Named:
    """Yield `domain_gap` between translated and target clips, in both directions."""
    yield "y", domain_gap(inputs.x.fake, inputs.clips.yz, inputs.directions)
    yield "x", domain_gap(inputs.y.fake, inputs.clips.x, inputs.directions)


TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("cycle", "|G_X(G_Y(x)) - x| and its mirror", 2.0, cycle_loss, needs=frozenset({"back"})),
        Term(
            "identity",
            "|G_Y(y) - y|, |G_Y(z) - z|, |G_Y(s) - s|, |G_X(x) - x|",
            4.0,
            identity_loss,
            needs=frozenset({"same"}),
        ),
        Term("contrast", "local-contrast loss, doubled for G_X", 40.0, contrast_terms, ramped=True),
        Term(
            "mask_prior",
            "prior of the copy mask; 0: the mask stays shut and nothing is copied",
            2.0,
            mask_terms,
            ramped=True,
        ),
        Term(
            "colours", "distance between the colours of translated and target clips, by frame index", 3.0, colour_terms
        ),
    )
}
