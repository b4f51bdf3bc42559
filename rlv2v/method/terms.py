"""The loss terms that this project adds to the paper's, and their registry.

The paper's losses alone keep neither the shape nor the colours of what should stay; the figures are in
docs/decisions/method.md. To add a term, write its function and list it in `TERMS`. Its weight becomes a flag, and the
presets read their weights from the registry. Everything works on frames (B,T,3,H,W) in [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from rlv2v.method.patches import Draws, patch_gaps
from rlv2v.model.grid import LUMA
from rlv2v.runtime.constants import constant

if TYPE_CHECKING:  # `rlv2v.config` reads the registry, and these modules read the config
    from rlv2v.method.clips import Clips
    from rlv2v.method.rollout import Rollout
    from rlv2v.model.build import Nets

Values = Iterator[tuple[str, Tensor]]  # (suffix, value ()) pairs
ROUND = 1e-3  # of coefficients of a grid, which change by less from frame to frame where nothing happens
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0))  # (dy, dx) in pixels


@dataclass(frozen=True)
class TermInputs:
    """What a term may look at."""

    nets: Nets
    clips: Clips
    x: Rollout  # X -> Y -> X
    y: Rollout  # Y and Z -> X -> Y
    draws: Draws

    @cached_property
    def grids(self) -> tuple[Tensor, Tensor] | None:
        """The grids of all translations, those of X first: `Grids.whole` and `Grids.local`; None without any."""
        x, y = self.x.details.grids, self.y.details.grids
        return None if x is None or y is None else (torch.cat((x.whole, y.whole)), torch.cat((x.local, y.local)))

    @cached_property
    def rows(self) -> Tensor | None:
        """Both parts of the grids together, as the rows of A and b: (B,T,3,4,bins,h,w)."""
        return self.grids and rows_of(*self.grids)

    def by_domain(self, values: Tensor) -> Values:
        """Yield the means of values (B,) of all translations, those of X first."""
        num = len(self.x.video)
        yield "x", values[:num].mean()
        yield "y", values[num:].mean()


class Term(NamedTuple):
    """An added loss term; its name is the flag of its weight.

    `compute` yields (suffix, value ()) pairs, one a domain. The log calls them `<name>_<suffix>`.
    """

    name: str
    meaning: str
    default: float  # weight in the preset `default`
    compute: Callable[[TermInputs], Values]
    paper: float = 0.0  # weight in the preset `paper`
    paint: float = 0.0  # weight in the preset `paint`
    needs: frozenset[Literal["same", "back"]] = frozenset()  # optional parts of a rollout that it looks at
    ramped: bool = False  # whether the schedule's gain scales it


def local_contrast(frames: Tensor) -> Tensor:
    """Return c = d / (d + k) of every pixel and neighbour, d = RGB distance in 0..1 units; (B,T,num_pairs) in [0,1).

    k = 2 mean(d) + 0.05, with the mean over the frame and without gradient. So c saturates: an edge counts as an edge
    whatever its height, and c does not change when a whole frame is darkened or loses contrast.
    """
    rgb = (frames + 1) / 2
    height, width = rgb.shape[-2:]
    distances = []
    for dy, dx in NEIGHBOURS:
        if dy < height and abs(dx) < width:
            pixel = rgb[..., : height - dy, max(-dx, 0) : width - max(dx, 0)]
            neighbour = rgb[..., dy:, max(dx, 0) : width + min(dx, 0)]
            distances.append(((pixel - neighbour).square().sum(-3) + 1e-8).sqrt().flatten(2))
    d = torch.cat(distances, -1)
    return d / (d + 2.0 * d.detach().mean(-1, keepdim=True) + 0.05)


def contrast_loss(source: Tensor, translated: Tensor) -> Tensor:
    """Return mean | c(G(x)) - c(x) | of each clip, (B,), c the local contrast: edges stay where the source has them."""
    return (local_contrast(translated) - local_contrast(source)).abs().mean((1, 2))


def mask_prior(mask: Tensor) -> Tensor:
    """Return mean(1 - m): what can be copied from the source should be copied."""
    return (1 - mask).mean()


def cycle_loss(inputs: TermInputs) -> Values:
    """Yield |G_X(G_Y(x)) - x| and its mirror (Zhu et al. 2017, eq. 2)."""
    for domain, rollout in (("x", inputs.x), ("y", inputs.y)):
        assert rollout.cycle is not None
        yield domain, l1_loss(rollout.cycle, rollout.video)


def identity_loss(inputs: TermInputs) -> Values:
    """Yield |G_X(x) - x|, |G_Y(z) - z| and |G_Y(s) - s| (Zhu et al. 2017, section 5.2).

    Z and S have X's style: what x looks like in the target domain stays as it is. Y says nothing of that, and where its
    clips change along time as X's have to, G would have to tell the two apart.
    """
    assert inputs.x.same is not None and inputs.y.same is not None
    yield "x", l1_loss(inputs.x.same, inputs.x.video)
    if inputs.clips.z is not None:
        num = len(inputs.clips.y)
        yield "z", l1_loss(inputs.y.same[num:], inputs.y.video[num:])
    stills = inputs.clips.s
    if stills is not None:
        yield "s", l1_loss(inputs.nets.g_y(stills)[0], stills)


def contrast_terms(inputs: TermInputs) -> Values:
    """Yield `contrast_loss` of both directions; that of Y -> X is doubled."""
    sources, fakes = (
        torch.cat(videos) for videos in ((inputs.x.video, inputs.y.video), (inputs.x.fake, inputs.y.fake))
    )
    for domain, value in inputs.by_domain(contrast_loss(sources, fakes)):
        yield domain, value if domain == "x" else 2.0 * value


def mask_terms(inputs: TermInputs) -> Values:
    """Yield `mask_prior` of both directions, where the generators have a copy mask."""
    for domain, rollout in (("x", inputs.x), ("y", inputs.y)):
        if rollout.details.mask is not None:
            yield domain, mask_prior(rollout.details.mask)


def rounded(d: Tensor) -> Tensor:
    """Return |d| without its kink: sqrt(d^2 + e^2) - e, e = `ROUND`; there rounding would decide a gradient."""
    return (d.square() + ROUND**2).sqrt() - ROUND


def mean_of_clips(values: Tensor) -> Tensor:
    """Return the mean of values (B,...) of each clip, (B,)."""
    return values.mean(tuple(range(1, values.dim())))


def rows_of(whole: Tensor, local: Tensor) -> Tensor:
    """Return the sum of the parts of a grid as the changes of the rows of A and b: (B,T,3,4,bins,h,w)."""
    return (whole + local).unflatten(2, (3, 4))


def roughness(whole: Tensor, local: Tensor) -> Tensor:
    """Return how much the grids of clips vary, (B,): what a free capacity would make of the content of a clip.

    Mean squares of the differences of neighbouring cells of `local` (B,T,12,bins,h,w), down and to the right; 0.3 of
    those of neighbouring bins, of `local` and of `whole`; 0.05 of the mean square of `local`. In time, 0.1 of the mean
    of |differences of neighbouring frames| of `local`, and of |their second differences| of `whole`: the light of a
    scene may fade at a steady rate or be switched, not flicker.
    """
    space = [local.diff(dim=dim).square() for dim in (4, 5) if local.shape[dim] > 1]
    bins = [part.diff(dim=3).square() for part in (whole, local) if part.shape[3] > 1]
    frames = whole.shape[1]
    time = [rounded(part.diff(n=n, dim=1)) for part, n in ((local, 1), (whole, 2)) if frames > n]
    costs = [(1.0, value) for value in space] + [(0.3, value) for value in bins] + [(0.1, value) for value in time]
    costs.append((0.05, local.square()))
    means = torch.stack([mean_of_clips(value) for _, value in costs])
    return (means * constant(column, tuple(weight for weight, _ in costs), like=means)).sum(0)


def column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return values as a column, (n,1)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def smoothness_terms(inputs: TermInputs) -> Values:
    """Yield `roughness` of both directions, where the generators have a grid."""
    if inputs.grids is not None:
        yield from inputs.by_domain(roughness(*inputs.grids))


def inversion(rows: Tensor) -> Tensor:
    """Return how much the grids of clips turn the order of brightness around at a place, as a negative does: (B,).

    rows: of `rows_of`. The grey at the centre of each bin is transformed; the mean of the squares of the steps by which
    the luma falls from one bin to the next.
    """
    bins = rows.shape[4]
    luma = (rows * constant(luma_of_greys, bins, like=rows)).sum((2, 3))
    return mean_of_clips((luma.diff(dim=2) + 2 / bins).clamp(max=0).square())


def luma_of_greys(bins: int, like: Tensor) -> Tensor:
    """Return what each coefficient adds to the luma of the grey at the centre of its bin, (3,4,bins,1,1)."""
    weights = torch.tensor(LUMA, dtype=like.dtype, device=like.device)[:, None, None]
    greys = (2 * torch.arange(bins, dtype=like.dtype, device=like.device) + 1) / bins - 1
    return (weights * torch.stack((greys, greys, greys, torch.ones_like(greys))))[..., None, None]


def order_terms(inputs: TermInputs) -> Values:
    """Yield `inversion` of both directions, where the generators have a grid."""
    if inputs.rows is not None:
        yield from inputs.by_domain(inversion(inputs.rows))


def mixing(rows: Tensor) -> Tensor:
    """Return how much the grids of clips make a channel of the other two, beyond their share of brightness: (B,).

    rows: of `rows_of`. Of A x + b, row c has two coefficients of other channels, o. A part t l, t >= 0, of their luma
    weights l makes the colours greyer, and is free; the mean over the grid and the rows of |o - t l|^2 / 2,
    t = max(0, o . l / l . l), is not: with it red becomes violet and leaves turn blue.
    """
    rows = rows[:, :, :, :3]  # (B,T,3,3,bins,h,w)
    others, weights, shares = constant(luma_of_others, like=rows)
    share = (rows * shares).sum(3, keepdim=True).clamp(min=0)
    return 1.5 * mean_of_clips((rows * others - share * weights).square())  # of three, of which two are not 0


def luma_of_others(like: Tensor) -> Tensor:
    """Return for each row c of a 3 x 3 matrix, (3,3,3,1,1,1): 1 at the other channels and 0 at c; their luma weights l;
    and l / l . l."""
    others = 1 - torch.eye(3, dtype=like.dtype, device=like.device)
    weights = others * torch.stack([others.new_full((), weight) for weight in LUMA])
    return torch.stack((others, weights, weights / weights.square().sum(1, keepdim=True)))[..., None, None, None]


def hue_terms(inputs: TermInputs) -> Values:
    """Yield `mixing` of both directions, where the generators have a grid."""
    if inputs.rows is not None:
        yield from inputs.by_domain(mixing(inputs.rows))


def patch_terms(inputs: TermInputs) -> Values:
    """Yield the distance of the patches of translated clips to those of the domain, in both directions."""
    clips = inputs.clips
    num = len(clips.y)  # each set has its clips in the order of the replicas
    fakes = (inputs.y.fake[:num], inputs.y.fake[num:] if clips.z is not None else None)
    to_y = ((inputs.x.fake, inputs.x.pool), (clips.y, clips.z, clips.pool_yz))
    gaps = patch_gaps((to_y, (fakes, (clips.x, clips.pool_x))), inputs.draws)
    yield from zip("yx", gaps.unbind(), strict=True)


IDENTITY = "|G_Y(z) - z|, |G_Y(s) - s|, |G_X(x) - x|"
MASK_PRIOR = "prior of the copy mask; 0: the mask stays shut and nothing is copied"
ORDER = "brightness of which a grid head turns the order around, at a place"
HUE = "what a grid head makes a channel of the others, beyond grey"
PATCHES = "distance of the patches of translated clips to those of the target domain"
TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("cycle", "|G_X(G_Y(x)) - x| and its mirror", 10.0, cycle_loss, paint=2.0, needs=frozenset({"back"})),
        Term("identity", IDENTITY, 4.0, identity_loss, paint=4.0, needs=frozenset({"same"})),
        Term("contrast", "local-contrast loss, doubled for G_X", 0.0, contrast_terms, paint=40.0, ramped=True),
        Term("mask_prior", MASK_PRIOR, 0.0, mask_terms, paint=2.0, ramped=True),
        Term("patches", PATCHES, 10.0, patch_terms, paint=40.0),
        Term("order", ORDER, 10000.0, order_terms),
        Term("hue", HUE, 100.0, hue_terms),
        Term("smoothness", "deviations of a grid head from one transform of all pixels", 300.0, smoothness_terms),
    )
}
