"""The additions to the paper: the local contrast, the mask's prior, the distance between two domains' colours."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from rlv2v.method.terms import colours, contrast_loss, domain_gap, gap_floor, local_contrast, mask_prior, quantile_gap

PAIRS = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0)]


def frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def constant(value: float, *, num: int = 1, steps: int = 3, size: int = 8) -> Tensor:
    return torch.full((num, steps, 3, size, size), value, dtype=torch.float64)


@pytest.mark.parametrize("sides", [(5, 7), (3, 2), (1, 4)], ids=str)
def test_local_contrast_pixel_by_pixel(sides: tuple[int, int]) -> None:
    video = frames(2, 2, 3, *sides)
    height, width = sides
    for b in range(2):
        for t in range(2):
            want = []
            for dy, dx in PAIRS:
                for row in range(height):
                    for column in range(width):
                        if row + dy < height and 0 <= column + dx < width:
                            difference = video[b, t, :, row, column] - video[b, t, :, row + dy, column + dx]
                            want.append(math.sqrt(difference.square().sum().item() / 4 + 1e-8))
            got = local_contrast(video)[b, t].tolist()
            assert len(got) == len(want)
            knees = [d / c - d for d, c in zip(sorted(want), sorted(got), strict=True)]
            assert knees == pytest.approx([knees[0]] * len(knees), abs=1e-12), "c = d / (d + k), one k a frame"
            assert knees[0] > sum(want) / len(want), "above the mean"


def test_contrast_loss_is_about_edges_not_colours() -> None:
    video = frames(1, 2, 3, 8, 8)
    assert contrast_loss(video, video) == 0
    assert contrast_loss(video, -video) < 1e-12, "the same edges in other colours"
    assert contrast_loss(video, 0.5 * video - 0.4) < 0.03, "the same edges, darker and flatter"
    assert contrast_loss(video, video.flip(-1)) > 0.05, "edges elsewhere"
    assert contrast_loss(video, constant(0.3, steps=2)) > 0.3, "edges that are gone"
    assert contrast_loss(constant(0.3, steps=2), video) > 0.3, "edges that are new"


def test_contrast_loss_has_a_finite_gradient_on_a_flat_frame() -> None:
    flat = constant(0.5).requires_grad_()
    (grad,) = torch.autograd.grad(contrast_loss(frames(1, 3, 3, 8, 8), flat), flat)
    assert torch.isfinite(grad).all()


def test_mask_prior_is_the_share_that_is_not_copied() -> None:
    mask = torch.tensor([1.0, 0.5, 0.0, 0.5]).reshape(1, 1, 1, 2, 2)
    assert mask_prior(mask) == 0.5


DIRECTIONS = torch.eye(3, dtype=torch.float64)


def test_domain_gap_of_flat_clips_is_the_distance_of_their_colours() -> None:
    assert domain_gap(constant(0.5), constant(-0.25), DIRECTIONS).item() == pytest.approx(0.75, abs=1e-12)


def test_domain_gap_is_the_sliced_wasserstein_distance_by_frame_index() -> None:
    a, b = frames(3, 2, 3, 32, 32, seed=1) * 0.3, frames(5, 2, 3, 32, 32, seed=2) * 0.9 + 0.1
    directions = torch.nn.functional.normalize(frames(3, 4, seed=3), dim=0)
    distances = []
    for t in range(2):
        for k in range(4):
            pooled = [torch.nn.functional.avg_pool2d(v[:, t], 2).movedim(1, -1) @ directions[:, k] for v in (a, b)]
            distances.append(wasserstein_distance(*(p.flatten().tolist() for p in pooled)))
    want = sum(distances) / len(distances)
    assert quantile_gap(colours(a, directions), colours(b, directions), 1000).item() == pytest.approx(want, rel=0.01)
    assert domain_gap(a, b, directions).item() == pytest.approx(want, rel=0.08), "64 levels, the extremes among them"


def test_domain_gap_follows_the_course_of_the_colours_in_time() -> None:
    there = torch.cat((constant(-1.0, steps=2), constant(1.0, steps=2)), 1)
    assert domain_gap(there, there.flip(1), DIRECTIONS).item() == pytest.approx(2.0)
    assert domain_gap(there, there.repeat(4, 1, 1, 1, 1), DIRECTIONS) == 0, "however many clips"
    assert domain_gap(there, there.flip(3), DIRECTIONS) == 0, "nothing about places"


def test_descending_the_domain_gap_brings_the_colours_over() -> None:
    video, target = frames(2, 2, 3, 8, 8, seed=1).requires_grad_(), frames(3, 2, 3, 8, 8, seed=2) * 0.2 + 0.6
    optimiser = torch.optim.Adam([video], 0.05)
    first = domain_gap(video, target, DIRECTIONS).item()
    for _ in range(60):
        optimiser.zero_grad()
        domain_gap(video, target, DIRECTIONS).backward()
        optimiser.step()
    assert domain_gap(video, target, DIRECTIONS).item() < 0.1 * first


def test_gap_floor_is_what_two_samples_of_one_domain_differ_by() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(3, 4), dim=0)

    def sample(num: int) -> torch.Tensor:
        return torch.randn(num, 1, 3, 1, 1).expand(-1, 2, -1, 4, 4).contiguous()

    measured = torch.stack([domain_gap(sample(8), sample(8), directions) for _ in range(300)]).mean()
    predicted = torch.stack([gap_floor([sample(3), sample(5)], 8, directions) for _ in range(300)]).mean()
    assert predicted == pytest.approx(measured.item(), rel=0.1)
    assert gap_floor([sample(1)], 4, directions) == 0
