"""The grid generator: the identity at first, its guide, and frames larger than those that it looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.errors import UserError
from rlv2v.kernels.bilateral import slice_apply_frame
from rlv2v.method.terms import LUMA, inversion, mixing, roughness, rows_of
from rlv2v.method.translation import Stream, translate_chunk
from rlv2v.model import GridTranslator
from rlv2v.model.grid import cell_means

pytestmark = pytest.mark.usefixtures("one_thread")


def video(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_net() -> GridTranslator:
    torch.manual_seed(1)
    net = GridTranslator((4, 6), patch=2, hidden=5)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return net


def test_at_first_it_is_the_identity_and_everything_that_decides_learns() -> None:
    torch.manual_seed(1)
    net, x = GridTranslator((4, 6), patch=2), video(2, 3, 3, 16, 24)
    y, _ = net(x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    (y * torch.randn_like(y)).sum().backward()
    for layer in (net.to_whole, net.to_local):
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_a_large_frame_is_transformed_by_what_the_small_one_decides() -> None:
    """Of a plane of one colour, each size shows the same; and the same size is `forward`."""
    net = random_net()
    x = video(1, 4, 3, 1, 1).expand(-1, -1, -1, 16, 24)
    grids, _ = net.decide(x)
    same = net.transform(grids, x)
    torch.testing.assert_close(same, net(x)[0], rtol=0, atol=0)
    large = net.transform(grids, x[..., :1, :1].expand(-1, -1, -1, 48, 72))
    torch.testing.assert_close(large[..., 1::3, 1::3], same, rtol=0, atol=1e-5)


def test_frames_of_bytes_become_the_same() -> None:
    net = random_net()
    frames = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    x = to_model(frames)[None]
    with torch.no_grad():
        grids, _ = net.decide(x)
        floats = to_uint8(net.transform(grids, x)[0])
        for frame, grid, around, want in zip(frames, grids.grid[0], grids.around[0], floats, strict=True):
            off = (slice_apply_frame(frame, grid, net.guide.curve, around).int() - want.int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.02


def test_the_guide_is_luma_and_a_network_of_the_pixel_and_what_is_around() -> None:
    net, x, around = random_net(), video(2, 3, 5, 6), video(2, 2, 2, 3)
    luma = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2] + 1) / 2
    pixels = torch.cat((x, interpolate(around, (5, 6), mode="bilinear", align_corners=False)), 1)
    want = luma.clone()
    for weight, bias, factor in zip(net.guide.weight, net.guide.bias, net.guide.factor, strict=True):
        want += factor * ((pixels * weight[:, None, None]).sum(1) + bias).clamp(min=0)
    torch.testing.assert_close(net.guide(x, around), want)


def test_the_guide_begins_with_units_for_what_differs_from_around() -> None:
    """Of a plane of one colour they see nothing, whatever the colour; and each sees one sign at one size alone."""
    guide = GridTranslator((4, 6), patch=2).guide
    weight, grey = guide.weight.detach()[:4], torch.full((5,), 0.7)
    torch.testing.assert_close(weight @ grey, torch.zeros(4), rtol=0, atol=1e-6)
    assert (guide.bias[:4] < -0.01).all(), "no rounding takes them over the kink"
    for size in (0, 1):
        lighter = grey.clone()
        lighter[3 + size] -= 0.25
        want = [0.0] * 4
        want[2 * size : 2 * size + 2] = 1.0, -1.0
        torch.testing.assert_close(weight @ lighter, torch.tensor(want), rtol=0, atol=1e-6)


def test_the_luma_around_is_of_cells_of_4_and_of_16_pixels() -> None:
    x = video(1, 2, 3, 32, 48)
    around = random_net().decide(x)[0].around
    luma = (0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2])[0, :, None]
    coarse = interpolate(avg_pool2d(luma, 16), (8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(around[0], torch.cat((avg_pool2d(luma, 4), coarse), 1))


def test_cells_that_are_no_whole_pixels_share_them() -> None:
    """Of 10 pixels in 3 cells, a cell is 3 1/3 pixels."""
    means = cell_means(3, 10, torch.zeros(1, dtype=torch.float64))
    want = torch.zeros(3, 10, dtype=torch.float64)
    for cell, weights in enumerate(((3, 3, 3, 1), (2, 3, 3, 2), (1, 3, 3, 3))):
        want[cell, 3 * cell : 3 * cell + 4] = torch.tensor(weights) / 10
    torch.testing.assert_close(means, want)


@pytest.mark.parametrize("size", [(16, 24), (33, 50), (7, 5), (90, 160)])
def test_a_stream_has_the_video_s_own_size_and_looks_at_small_frames(size: tuple[int, int]) -> None:
    """Where the frames have the size that is looked at, it is what training sees."""
    net, config = random_net().eval(), Config.of("tiny", head="grid", size=16, frames=4)
    video = np.random.default_rng(0).integers(0, 256, (6, *size, 3), dtype=np.uint8)
    stream = Stream(net, config)
    translated = np.stack([stream(frame) for frame in video])
    assert translated.shape == video.shape and translated.dtype == np.uint8
    again = Stream(net, config)
    again(video[0])
    assert not np.array_equal(again(video[2]), Stream(net, config)(video[2])), "it remembers the first frame"
    if size == (16, 24):
        together = translate_chunk(net, config, video)[0]
        assert np.abs(together.astype(int) - translated).max() <= 1


def test_a_grid_that_is_not_finite_is_refused() -> None:
    net = random_net().eval()
    net.to_whole.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="translate: the model's output is not finite"):
        Stream(net, Config.of("tiny", head="grid"))(np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("part", "shape", "dim"), [("local", (1, 2, 12, 3, 4, 5), 3), ("whole", (1, 2, 12, 3, 1, 1), 3)]
)
def test_roughness_is_of_what_varies(part: str, shape: tuple[int, ...], dim: int) -> None:
    whole, local = torch.zeros(1, 2, 12, 3, 1, 1), torch.zeros(1, 2, 12, 3, 4, 5)
    assert roughness(whole + 7.0, local) == 0
    ramp = torch.arange(float(shape[dim])).reshape(-1, 1, 1).expand(shape)
    parts = {"whole": whole, "local": local} | {part: ramp}
    want = 0.3 + (0.05 * float(ramp.square().mean()) if part == "local" else 0.0)
    torch.testing.assert_close(roughness(**parts), torch.tensor([want]))
    rows = torch.arange(4.0)[:, None].expand(1, 2, 12, 3, 4, 5)
    torch.testing.assert_close(roughness(whole, 2 * rows), 4 * (1 + 0.05 * rows.square().mean()[None]))


def test_roughness_in_time_is_of_flicker() -> None:
    time = torch.arange(5.0).reshape(1, 5, 1, 1, 1, 1)
    still, local = torch.zeros(1, 5, 12, 3, 1, 1), torch.zeros(1, 5, 12, 3, 4, 5)
    assert roughness(still + 3 * time, local) == 0, "light that fades at a steady rate"
    flicker = still + 0.1 * (time % 2)
    torch.testing.assert_close(roughness(flicker, local), torch.tensor([0.1 * 0.2]), rtol=0.01, atol=0)
    torch.testing.assert_close(roughness(flicker[:, :2], local[:, :2]), torch.tensor([0.0]))
    fading = local + 0.1 * time
    torch.testing.assert_close(roughness(still, fading), 0.1 * torch.tensor([0.099]) + 0.05 * fading.square().mean())


def test_inversion_is_of_a_transform_that_makes_light_dark() -> None:
    eye = torch.eye(3, 4).reshape(1, 1, 12, 1, 1, 1)
    local = torch.zeros(1, 1, 12, 4, 2, 3)
    for scale, want in ((1.0, 0.0), (0.3, 0.0), (0.0, 0.0), (-1.0, 0.25), (-2.0, 1.0)):  # bins are 0.5 apart
        whole = ((scale - 1) * eye).expand(-1, -1, -1, 4, -1, -1)
        torch.testing.assert_close(inversion(rows_of(whole, local)), torch.tensor([want]))
    local[0, 0, 3::4, 1, 0, 0] = 0.8  # all three channels brighter in one bin of one cell: its step down is 0.3
    torch.testing.assert_close(inversion(rows_of(torch.zeros(1, 1, 12, 4, 1, 1), local)), torch.tensor([0.09 / 18]))


def test_mixing_is_of_what_makes_another_colour_and_not_of_grey() -> None:
    def matrix(*rows: tuple[float, float, float]) -> Tensor:
        changes = torch.cat((torch.tensor(rows) - torch.eye(3), torch.zeros(3, 1)), 1)
        return changes.reshape(1, 1, 12, 1, 1, 1).expand(-1, -1, -1, 4, -1, -1)

    def of(*rows: tuple[float, float, float]) -> float:
        return float(mixing(rows_of(matrix(*rows), torch.zeros(1, 1, 12, 4, 2, 3))))

    assert of((1, 0, 0), (0, 1, 0), (0, 0, 1)) == of((0.3, 0, 0), (0, -1, 0), (0, 0, 9)) == 0
    grey = [tuple(0.6 * weight + 0.4 * (k == c) for k, weight in enumerate(LUMA)) for c in range(3)]
    assert of(*grey) == pytest.approx(0, abs=1e-12)
    red, green, blue = LUMA
    across = 0.5 * torch.tensor([blue, -green]) / torch.tensor([blue, green]).norm()  # of the row of red
    assert of((1, *across.tolist()), (0, 1, 0), (0, 0, 1)) == pytest.approx(0.25 / 2 / 3)
    negative = of((1, -0.5 * green, -0.5 * blue), (0, 1, 0), (0, 0, 1))
    assert negative == pytest.approx(0.25 * (green**2 + blue**2) / 6)
    local = torch.zeros(1, 1, 12, 4, 2, 3)
    local[0, 0, 4, 1, 0, 2] = 0.7  # green of red, in one bin of one cell
    share = 0.7 * red / (red**2 + blue**2)
    want = ((0.7 - share * red) ** 2 + (share * blue) ** 2) / 2 / 3 / 24
    torch.testing.assert_close(mixing(rows_of(torch.zeros(1, 1, 12, 4, 1, 1), local)), torch.tensor([want]))
