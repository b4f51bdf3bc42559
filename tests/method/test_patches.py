"""The term `patches`: the distance of two domains by their patches, the clips that it alone sees, and its draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from method_cases import CLIP_NORM, random_clips, random_draws, random_nets
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data.loader import Batch
from rlv2v.method import patches
from rlv2v.method.clips import Clips, batch_sizes, pool_size
from rlv2v.method.objective import generator_losses
from rlv2v.method.patches import KINDS, NUM_DIRECTIONS, Draws, Groups, Kind, draw, locate, patch_gaps

CPU = torch.device("cpu")
T, H, W = 4, 6, 8


def clips(num: int, seed: int = 0) -> Tensor:
    return torch.rand(num, T, 3, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def patch_gap(a: Groups, b: Groups, draws: Draws) -> Tensor:
    return patch_gaps([(a, b)], draws)[0]


def literal_draws(num: int) -> list[tuple[Kind, np.ndarray, np.ndarray]]:
    """Return (kind, places (2,n,5), directions (features,K)) of `random_draws`, of one replica."""
    rng, drawn = np.random.default_rng(5), []
    for kind in KINDS:
        places = rng.random((2, 1, num, 5), np.float32)[:, 0]
        directions = rng.standard_normal((kind.num_features, NUM_DIRECTIONS))
        drawn.append((kind, places, directions / np.linalg.norm(directions, axis=0)))
    return drawn


def literal_features(clips: np.ndarray, kind: Kind, place: np.ndarray) -> np.ndarray:
    """Return the features of one patch, as the docstring says, one number at a time."""
    k, times = kind.side, T + 1 - kind.frames

    def pick(uniform: np.float32, size: int) -> int:
        return min(int(uniform * np.float32(size)), size - 1)

    sizes = (len(clips), times, H - k + 1, W - k + 1)
    n, t, row, column = (pick(u, size) for u, size in zip(place, sizes, strict=False))
    gap = 0 if kind.frames == 1 else 1 + pick(place[4], T - 1 - t)
    patch = clips[n, [t, t + gap][: kind.frames], :, row : row + k, column : column + k]
    mean = [patch[:, c].mean() for c in range(3)]
    different = [
        2 / k * (patch[f, c, i, j] - mean[c])
        for f, c, i, j in itertools.product(range(kind.frames), range(3), range(k), range(k))
    ]
    return np.array([*different, *(1.7 * m for m in mean), 3.0 * ((2 * row + k) / H - 1), 2 * gap / T - 1])


def test_the_gap_is_the_mean_over_kinds_and_directions_of_the_distance_of_sorted_projections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patches, "NUM_PATCHES", 40)
    draws = random_draws()
    a, b = clips(3), clips(5, 1)
    gaps = []
    for kind, places, directions in literal_draws(40):
        ordered = [
            np.sort(np.stack([literal_features(v.numpy(), kind, p) for p in own]) @ directions, 0)
            for v, own in ((a, places[0]), (b, places[1]))
        ]
        gaps.append(np.abs(ordered[0] - ordered[1]).mean())
    assert patch_gap((a,), (b,), draws).item() == pytest.approx(np.mean(gaps), rel=1e-9)
    groups = (b[:2], None, b[2:])
    assert patch_gap((a, None), groups, draws) == patch_gap((a,), (b,), draws), "groups are one domain"
    both = patch_gaps([((a,), (b,)), ((b,), (a,))], draws)
    torch.testing.assert_close(both, torch.stack((patch_gap((a,), (b,), draws), patch_gap((b,), (a,), draws))))


def test_its_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "NUM_PATCHES", 6)
    draws = random_draws()
    b = clips(2, 1)
    assert torch.autograd.gradcheck(lambda a: patch_gap((a,), (b,), draws), (clips(1).requires_grad_(),), eps=1e-7)


def test_it_sees_colours_edges_places_and_the_course_of_time_but_no_frame_index() -> None:
    rows = torch.linspace(-1, 1, H, dtype=torch.float64)[:, None].expand(H, W)
    still = rows.expand(8, T, 3, H, W)
    draws = random_draws()
    assert patch_gap((still,), (still,), draws) < 0.1, "two samples of one domain"
    assert patch_gap((still,), (still.flip(-1),), draws) < 0.1, "left and right are alike"
    for name, other in (
        ("colours", still * 0.5),
        ("places", still.flip(-2)),
        ("edges", still + 0.5 * (torch.arange(W) % 2 * 2 - 1)),
        ("time", still + torch.linspace(-0.5, 0.5, T, dtype=torch.float64)[:, None, None, None]),
    ):
        assert patch_gap((still,), (other,), draws) > 0.15, name
    flicker = torch.where(torch.arange(T) % 2 == 0, 0.5, -0.5).double()[:, None, None, None].expand(8, T, 3, H, W)
    early = flicker.sort(1).values
    assert patch_gap((flicker,), (early,), draws) > 0.1, "the same frames in another order"
    of_pixels = torch.arange(draws.of_values.shape[1]) < KINDS[0].num_values
    alone = draws._replace(of_values=draws.of_values * of_pixels, of_place=draws.of_place * 0)
    assert patch_gap((flicker,), (early,), alone) < 0.02, "the pixels of single frames"


def test_two_replicas_of_one_rank_see_the_patches_of_two_ranks_of_one() -> None:
    together, *alone = (
        draw(np.random.default_rng(3), 2, replicas, CPU) for replicas in (range(2), range(1), range(1, 2))
    )
    assert torch.equal(together.places, torch.cat([part.places for part in alone], 2))
    assert all(torch.equal(together.of_values, part.of_values) for part in alone)
    video = clips(4).flatten()
    starts, places = locate((((4,),), ((4,),)), (T, 3, H, W), together.places)
    for replica, (half, part) in enumerate(zip(video.chunk(2), alone, strict=True)):
        own, own_places = locate((((2,),), ((2,),)), (T, 3, H, W), part.places)
        assert torch.equal(video.take(starts[:, :, :, replica]), half.take(own[:, :, :, 0]))
        assert torch.equal(places[:, :, :, :, replica], own_places[:, :, :, :, 0])


def test_a_replica_has_its_share_of_every_group() -> None:
    draws = draw(np.random.default_rng(3), 2, range(2), CPU)
    y, z, x = clips(2), clips(6, 1), clips(4, 2)
    shares = torch.cat([torch.cat(share) for share in zip(y.chunk(2), z.chunk(2), strict=True)])
    assert patch_gap((x,), (y, z), draws) == patch_gap((x,), (shares,), draws)
    assert patch_gap((x,), (z, y), draws) != patch_gap((x,), (shares,), draws), "their order counts"


def test_the_last_clips_of_each_replica_and_set_are_for_statistics_alone() -> None:
    def numbered(num: int) -> Tensor:
        return torch.arange(num, dtype=torch.uint8)[:, None, None, None, None].expand(num, T, H, W, 3)

    batch = Batch(numbered(6), numbered(4) + 10, numbered(8) + 20, None)
    split = Clips.of(batch, CPU, pool=1, replicas=2)

    def numbers(video: Tensor | None) -> list[int]:
        assert video is not None
        return ((video[:, 0, 0, 0, 0] + 1) * 127.5).round().int().tolist()

    assert numbers(split.x) == [0, 1, 3, 4] and numbers(split.pool_x) == [2, 5]
    assert numbers(split.y) == [10, 12] and split.z is not None and numbers(split.z) == [20, 21, 22, 24, 25, 26]
    assert numbers(split.pool_yz) == [11, 23, 13, 27]
    assert Clips.of(batch, CPU).pool_x is None


def test_a_step_takes_more_clips_where_the_term_has_a_weight() -> None:
    config = Config.of("default", batch_x=2, batch_y=1, batch_z=2, batch_s=4, batch_pool=3)
    assert pool_size(config) == 3
    assert batch_sizes(config, 2, has_z=True) == {"x": 10, "y": 8, "z": 10, "s": 8}
    assert batch_sizes(config.replace(patches=0.0), 2, has_z=True) == {"x": 4, "y": 2, "z": 4, "s": 8}


def test_the_pool_counts_in_the_distance_and_in_nothing_else() -> None:
    config = Config.of("default", **CLIP_NORM)
    nets, some = random_nets(config), random_clips()

    def terms(clips: Clips) -> dict[str, float]:
        values, *_ = generator_losses(nets, clips, config, 1.0, torch.arange(2), random_draws())
        return {name: value.item() for name, value in values.items()}

    alone, pooled = terms(some), terms(some._replace(pool_x=some.x * 0.5, pool_yz=some.yz * 0.5))
    changed = {name for name, value in alone.items() if pooled[name] != pytest.approx(value, rel=1e-9)}
    assert changed == {"patches_x", "patches_y"}
