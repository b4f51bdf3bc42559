"""The added loss terms: the functions behind them, their weights in the objective, and their registry."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from method_cases import CLIP_NORM, random_clips, random_draws, random_nets
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method.objective import generator_losses
from rlv2v.method.rollout import Rollout
from rlv2v.method.terms import (
    TERMS,
    contrast_loss,
    local_contrast,
    mask_prior,
)

PAIRS = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0)]
pytestmark = pytest.mark.usefixtures("one_thread")


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
            distances = []
            for dy, dx in PAIRS:
                for row in range(height):
                    for column in range(width):
                        if row + dy < height and 0 <= column + dx < width:
                            difference = video[b, t, :, row, column] - video[b, t, :, row + dy, column + dx]
                            distances.append(math.sqrt(difference.square().sum().item() / 4 + 1e-8))
            knee = 2 * sum(distances) / len(distances) + 0.05
            expected = [d / (d + knee) for d in distances]
            assert local_contrast(video)[b, t].tolist() == pytest.approx(expected, abs=1e-12)


def test_contrast_loss_is_about_edges_not_colours() -> None:
    video = frames(1, 2, 3, 8, 8)
    assert contrast_loss(video, video) == 0
    assert contrast_loss(video, -video) < 1e-12, "the same edges, other colours"
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


# --- in the objective ---


# The values of the terms are compared in the whole steps of tests/bench/test_bench_train_step.py.
OFF = [(name,) for name in (*TERMS, "l_v", "l_tau", "l_rc")] + [("l_tau", "l_rc"), ("l_tau", "l_rc", "cycle")]


@pytest.mark.parametrize("off", OFF, ids="+".join)
def test_a_weight_of_zero_leaves_its_terms_out_and_changes_no_other(off: tuple[str, ...]) -> None:
    config = Config.of("paint", **CLIP_NORM, l_tau=10.0, l_rc=10.0)
    if {"smoothness", "order", "hue"} & {*off}:
        config = config.replace(head="grid", smoothness=1.0, order=1.0, hue=1.0)
    nets, clips = random_nets(config), random_clips()

    def losses(config: Config) -> tuple[dict[str, Tensor], Rollout, Rollout]:
        return generator_losses(nets, clips, config, 1.0, torch.arange(2), random_draws())

    every, *_ = losses(config)
    terms, of_x, _ = losses(config.replace(**dict.fromkeys(off, 0.0)))
    names = tuple(f"{name.removeprefix('l_')}_" for name in off)
    assert every.keys() - terms.keys() == {key for key in every if key.startswith(names)} != set()
    torch.testing.assert_close(terms, {key: every[key] for key in terms}, rtol=1e-12, atol=0)
    # What no loss asks for is not computed.
    assert (of_x.same is None) == ("identity" in off)
    assert (of_x.predicted is None) == (of_x.recycled is None) == ({"l_tau", "l_rc"} <= {*off})
    assert (of_x.cycle is None) == (len(off) == 3)


ADD_A_TERM = """
import numpy as np, torch, tyro
from rlv2v.method.terms import TERMS, Term

def brightness(inputs):
    yield "y", inputs.x.fake.mean()

TERMS["brightness"] = Term("brightness", "mean of G_Y(x)", 0.5, brightness, paper=0.25, paint=0.75)
from rlv2v.config import Config
from rlv2v.flags import flags_type, resolve
from rlv2v.method.clips import Clips
from rlv2v.method.objective import generator_losses
from rlv2v.method.rollout import Rollout
from rlv2v.method.patches import draw
from rlv2v.model.build import build_nets

assert Config.of("default").loss.term("brightness") == 0.5
assert Config.of("paper").loss.term("brightness") == 0.25
assert Config.of("paint").loss.term("brightness") == 0.75
config = resolve(tyro.cli(flags_type(), args=["--preset", "tiny", "--brightness", "3"]))
assert Config.from_json(config.to_json(), "config").get("brightness") == 3
x, y = torch.rand(2, 2, 4, 3, 16, 16)
draws = draw(np.random.default_rng(0), 1, range(1), torch.device("cpu"))
terms, of_x, _ = generator_losses(build_nets(config), Clips(x, y, None, None), config, 1.0, torch.arange(2), draws)
torch.testing.assert_close(terms["brightness_y"], 3 * of_x.fake.mean())
"""


def test_a_term_of_the_registry_becomes_a_flag_a_preset_setting_and_a_loss() -> None:
    """In a process of its own, because the config reads the registry when it is imported."""
    subprocess.run([sys.executable, "-c", ADD_A_TERM], check=True, timeout=300)
