"""Colour maps recover known changes of colour from unpaired sets: by domain, by frame index, by transport."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method.baselines import METHODS, colour_map
from rlv2v.method.baselines.colour_transport import (
    NODES,
    ColourTable,
    corners,
    monotone,
    nodes,
    transport,
    weighted_medians,
)
from rlv2v.method.clips import Clips
from rlv2v.method.memory import estimate
from rlv2v.method.translation import Stream, translate_chunk

CPU = torch.device("cpu")
T, SIZE = 3, 16
pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = torch.tensor([[0.5, 0.9, 0.7], [0.8, 0.4, 0.6], [1.1, 0.7, 0.5]])  # (T,3)
SHIFT = torch.tensor([[0.3, -0.1, 0.0], [-0.2, 0.2, 0.1], [0.0, 0.1, -0.3]])
PALETTE = torch.tensor([[-1.0, -1.0, -1.0], [-0.4, -0.5, -0.3], [0.1, 0.2, 0.0], [0.9, 0.8, 0.9]])
REPAINTED = torch.tensor([[-1.0, -0.9, -0.2], [0.5, -0.6, -0.1], [0.6, -0.5, 0.7], [0.7, 0.9, 0.8]])
SHARES = (0.4, 0.3, 0.2, 0.1)  # of the colours of the palette


def config_of(method: str, **changes: Any) -> Config:
    return Config.of("tiny", method, **{"frames": T, "size": SIZE, "steps": 8, "replicas": 1} | changes).check()


def natural(num: int, seed: int) -> Tensor:
    """Clips (num,T,3,H,W) of correlated colours, inside of the range of every map here."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.rand(num, T, 3, SIZE, SIZE, generator=rng) - 0.5
    return base + 0.3 * base[:, :, [1, 2, 0]]


def painted(num: int, seed: int, colours: Tensor) -> Tensor:
    """Clips (num,T,3,H,W) of the colours (4,3) at random places, in the shares of the palette."""
    draws = np.random.default_rng(seed).choice(4, (num, T, SIZE, SIZE), p=SHARES)
    return colours[torch.from_numpy(draws)].movedim(-1, 2)


def fitted(method: str, x: Tensor, y: Tensor, **changes: Any) -> Any:
    """The maps that a run of 8 steps fits, 8 clips of each domain a step."""
    trainer = METHODS[method].trainer(config_of(method, **changes), CPU, 0, 1)
    for a, b in zip(x.split(8), y.split(8), strict=True):
        assert trainer.schedule.progress < 1.0
        assert trainer.step(Clips(a, b[:4], b[4:], None), lambda _: None) == {}
        trainer.advance(1.0)
    assert trainer.schedule.progress == 1.0
    return trainer.generators


@pytest.mark.parametrize(("method", "num"), [("colour-map", 1), ("colour-map-index", T)])
def test_an_affine_map_is_recovered_from_unpaired_clips(method: str, num: int) -> None:
    scale, shift = (values[torch.arange(T) % num][:, :, None, None] for values in (SCALE, SHIFT))
    maps = fitted(method, natural(64, 1), scale * natural(64, 2) + shift)
    x = natural(4, 3)
    y, state = maps.g_y(x)
    torch.testing.assert_close(y, scale * x + shift, atol=0.02, rtol=0.0)
    torch.testing.assert_close(maps.g_x(y)[0], x, atol=0.02, rtol=0.0)
    assert state == num
    later = maps.g_y(x, state)[0]
    torch.testing.assert_close(later, scale[num - 1] * x + shift[num - 1], atol=0.02, rtol=0.0)


def test_repainted_colours_are_recovered_by_transport_and_not_by_an_affine_map() -> None:
    """Which colour becomes which, only their shares tell; each channel keeps its order, so transport has one answer."""
    x, wanted = painted(2, 3, PALETTE), painted(2, 3, REPAINTED)
    errors = {}
    for method in ("colour-map-index", "colour-map-transport"):
        maps = fitted(method, painted(64, 1, PALETTE), painted(64, 2, REPAINTED))
        pairs = ((maps.g_y(x)[0], wanted), (maps.g_x(wanted)[0], x))
        errors[method] = [(got - true).abs().mean().item() for got, true in pairs]
    assert max(errors["colour-map-transport"]) < 0.06 < 0.15 < min(errors["colour-map-index"]), errors


def test_transport_turns_a_black_background_blue_behind_objects_of_any_colour() -> None:
    rng = np.random.default_rng(0)

    def scenes(seed: int, background: list[float]) -> Tensor:
        objects = torch.from_numpy(np.random.default_rng(seed).uniform(-0.6, 1.0, (64, T, 3, SIZE, SIZE))).float()
        is_object = torch.from_numpy(rng.random((64, T, 1, SIZE, SIZE)) < 0.2)
        return torch.where(is_object, objects, torch.tensor(background)[:, None, None])

    maps = fitted("colour-map-transport", scenes(1, [-1.0, -1.0, -1.0]), scenes(2, [-0.8, -0.8, 0.9]))
    black = torch.full((1, T, 3, 2, 2), -1.0)
    blue = torch.tensor([-0.8, -0.8, 0.9])[:, None, None].expand_as(black)
    assert (maps.g_y(black)[0] - blue).abs().max() < 0.15
    assert (maps.g_x(blue)[0] - black).abs().max() < 0.15


def test_transport_gives_the_target_s_distribution_at_any_index() -> None:
    x = natural(64, 1)
    y = torch.stack([natural(64, 2)[:, t].sign() * natural(64, 2)[:, t].abs() ** (1 + t) for t in range(T)], 1)
    mapped = fitted("colour-map-transport", x, y).g_y(natural(16, 3))[0]
    for t in range(T):
        got, wanted, before = (v[:, t].movedim(1, 0).flatten(1).sort(-1).values for v in (mapped, y[:16], x[:16]))
        assert (got - wanted).abs().mean() < max(0.04, 0.4 * (before - wanted).abs().mean()), t


def test_the_monotone_map_is_the_quantile_map() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=5000), 2.0 * rng.normal(size=3000) + 1.0
    points = np.array([-1.0, 0.0, 1.5])
    mapped, images = monotone(source, target, points)
    np.testing.assert_allclose(images, 2.0 * points + 1.0, atol=0.15)
    np.testing.assert_allclose(mapped, np.interp(source, np.sort(source), np.sort(mapped)), atol=1e-12)
    assert abs(mapped.mean() - target.mean()) < 0.01 and abs(mapped.std() - target.std()) < 0.01
    _, beyond = monotone(source, source, np.array([source.max() + 3.0, source.min() - 2.0]))
    np.testing.assert_allclose(beyond, [source.max() + 3.0, source.min() - 2.0])


def test_a_distribution_is_transported_to_itself() -> None:
    colours = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    mapped, images = transport(colours, colours, colours[:50], np.random.default_rng(0))
    np.testing.assert_allclose(mapped, colours, atol=1e-9)
    np.testing.assert_allclose(images, colours[:50], atol=1e-9)


def test_the_corners_of_a_colour_are_what_a_table_is_looked_up_with() -> None:
    rng = np.random.default_rng(0)
    colours, table = rng.uniform(-1, 1, (50, 3)), rng.uniform(-1, 1, (NODES**3, 3))
    around, weights = corners(colours)
    net = ColourTable(1)
    net.table.copy_(torch.from_numpy(table.reshape(NODES, NODES, NODES, 3)).movedim(-1, 0))
    looked_up = net(torch.from_numpy(colours).float().T[None, None, :, :, None])[0][0, 0, :, :, 0].T.numpy()
    np.testing.assert_allclose((table[around] * weights[..., None]).sum(1), looked_up, atol=1e-5)


def test_medians_are_those_of_their_groups() -> None:
    groups, weights = np.array([1, 0, 1, 1, 0, 2]), np.array([1.0, 1.0, 1.0, 3.0, 2.0, 0.1])
    values = np.array([5.0, -1.0, 2.0, 9.0, 4.0, 7.0])
    np.testing.assert_array_equal(weighted_medians(groups, weights, values, 3), [4.0, 9.0, 7.0])
    rng = np.random.default_rng(0)
    groups, values = rng.integers(4, size=401), rng.normal(size=401)
    found = weighted_medians(groups, np.ones(401), values, 4)
    for group in range(4):
        own = np.sort(values[groups == group])
        assert found[group] == own[(len(own) - 1) // 2]


def test_a_table_is_looked_up_trilinearly() -> None:
    table = ColourTable(2)
    x = torch.rand(2, 3, 3, 5, 4) * 2 - 1
    torch.testing.assert_close(table(x)[0], x, msg="it begins as the identity")
    table.table.copy_(
        torch.from_numpy(nodes()).movedim(-1, 0).float()[[2, 0, 1]]
        * torch.tensor([0.5, 1.0])[:, None, None, None, None]
    )
    expected = x[:, :, [2, 0, 1]] * torch.tensor([0.5, 1.0, 1.0])[:, None, None, None]
    torch.testing.assert_close(table(x)[0], expected)


@pytest.mark.parametrize("method", ["colour-map-index", "colour-map-transport"])
def test_a_stream_is_a_clip_and_keeps_the_size_of_the_video(method: str) -> None:
    maps = fitted(method, natural(64, 1), natural(64, 2).abs() - 0.5)
    clip = np.random.default_rng(0).integers(0, 256, (T + 2, 30, 44, 3), dtype=np.uint8)
    config = config_of(method)
    stream = Stream(maps.g_y, config)
    one_by_one = np.stack([stream(frame) for frame in clip])
    at_once, state = translate_chunk(maps.g_y, config, clip)
    assert np.array_equal(one_by_one, at_once) and state == T
    with torch.no_grad():
        pixel = maps.g_y(torch.from_numpy(clip[:1, :1, :1]).movedim(-1, 1)[None] / 127.5 - 1)[0]
    assert np.abs(at_once[0, 0, 0] - ((pixel.flatten() + 1) * 127.5).numpy()).max() <= 0.51, "no neighbour is mixed in"


def test_a_fit_ends_after_its_batches_whatever_the_budget() -> None:
    trainer = METHODS["colour-map"].trainer(config_of("colour-map", steps=None, budget=9999.0), CPU, 0, 1)
    assert trainer.schedule.length == ("step", colour_map.NUM_BATCHES)
    assert estimate(config_of("colour-map-transport")).total == estimate(config_of("colour-map-transport")).weights > 0
