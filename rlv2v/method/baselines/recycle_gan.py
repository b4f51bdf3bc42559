"""Recycle-GAN (Bansal et al. 2018, arXiv:1808.05174): image generators, and predictors that look along time.

With x1, x2, x3 neighbouring frames, and the mirror image of each line for y:

    L_g = mean (D_Y(.) - 1)^2 over G_Y(x1), G_Y(x2) and P_Y(G_Y(x1), G_Y(x2)), a sum of three         (eq. 1)
    L_tau = |x3 - P_X(x1, x2)|, the recurrent loss                                                    (eq. 4)
    L_r = |x3 - G_X(P_Y(G_Y(x1), G_Y(x2)))|, the recycle loss                                         (eq. 5)
    L = L_g + 10 L_tau + 10 L_r                                                                       (section 3)
    D descends 1/2 [mean (D(real) - 1)^2 + mean D(fake)^2], summed over those three and P_Y(y1, y2)
The weights are `--l-rc` (recycle) and `--l-tau` (recurrent). The paper's equations have squared distances and log D;
its code (aayushbansal/Recycle-GAN, `models/recycle_gan_model.py`) has L1 distances and least squares, and the three
fakes of L_g. We follow the code. Its second model (`models/reCycle_gan_model.py`) adds CycleGAN's terms on x1 and x2:

    |G_X(G_Y(x_t)) - x_t|, weight 10;  |G_X(x_t) - x_t|, weight 5;  a sum over t = 1, 2
They are `--cycle 10 --identity 5`, and off by default, as in the paper.

Generators, discriminators, pool and optimisers are CycleGAN's, as there; the predictor is a U-Net on the two frames
before, with as many levels as there are widths instead of down to one pixel. The generators have no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from rlv2v.method.baselines.base import Method
from rlv2v.method.baselines.image_gan import SETTINGS, ImageGan, ImageNets, Made, disc_loss, lsgan
from rlv2v.method.baselines.image_networks import FramePredictor

if TYPE_CHECKING:
    from rlv2v.config import Config


class RecycleNets(ImageNets):
    """The networks of Recycle-GAN: those of CycleGAN and a predictor for each domain."""

    p_x: FramePredictor
    p_y: FramePredictor

    def __init__(self, config: Config, *, discriminators: bool = True) -> None:
        super().__init__(config, discriminators=discriminators)
        if discriminators:
            self.p_x, self.p_y = (FramePredictor(config.model.widths) for _ in range(2))


def domain_losses(
    nets: Any, name: str, other: str, frames: Tensor, config: Config
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the terms of one direction, what D of the other domain will see, and what that of the same domain will.

    Args:
        name, other: the domain of `frames` and the one that they are translated to, "x" and "y" or the reverse.
        frames: three neighbouring frames, (n,3,3,H,W).
    """
    g, g_back, d = (getattr(nets, net) for net in (f"g_{other}", f"g_{name}", f"d_{other}"))
    p, p_other = (getattr(nets, net) for net in (f"p_{name}", f"p_{other}"))
    weights, num = config.loss, len(frames)
    first, second, third = frames.unbind(1)
    both = torch.cat((first, second))
    fakes = g.images(both)
    fake_first, fake_second = fakes.split(num)
    fake_third = p_other(fake_first, fake_second)
    made = torch.cat((fakes, fake_third))
    terms = {f"g_{other}": 3.0 * lsgan(d(made), True)}
    predicted = p(first, second)
    if weights.l_tau:
        terms[f"tau_{name}"] = weights.l_tau * l1_loss(predicted, third)
    if weights.l_rc:
        terms[f"rc_{name}"] = weights.l_rc * l1_loss(g_back.images(fake_third), third)
    if cycle := weights.term("cycle"):
        terms[f"cycle_{name}"] = 2.0 * cycle * l1_loss(g_back.images(fakes), both)
    if identity := weights.term("identity"):
        terms[f"identity_{name}"] = 2.0 * identity * l1_loss(g_back.images(both), both)
    # By clip, as the pools of the replicas share them out: frames 1, 2 and 3, and the prediction that d_<name> sees.
    seen = torch.stack((fake_first, fake_second, fake_third), 1)
    return terms, seen, predicted


def generator_losses(nets: RecycleNets, x: Tensor, y: Tensor, config: Config) -> tuple[dict[str, Tensor], Made]:
    """Return the weighted terms that G and P descend, of three neighbouring frames each of x and y (n,3,3,H,W)."""
    terms_x, seen_y, predicted_x = domain_losses(nets, "x", "y", x, config)
    terms_y, seen_x, predicted_y = domain_losses(nets, "y", "x", y, config)
    disc_y = torch.cat((seen_y, predicted_y[:, None]), 1).flatten(0, 1)
    disc_x = torch.cat((seen_x, predicted_x[:, None]), 1).flatten(0, 1)
    return terms_x | terms_y, Made(disc_y, disc_x)


def discriminator_losses(nets: RecycleNets, x: Tensor, y: Tensor, made_x: Tensor, made_y: Tensor) -> dict[str, Tensor]:
    """Return what D_X and D_Y descend: the sum of four losses, of frames 1, 2, 3, 3 against what was made of them."""

    def loss(d: Any, real: Tensor, made: Tensor) -> Tensor:
        return 4.0 * disc_loss(d, torch.cat((real, real[:, -1:]), 1).flatten(0, 1), made)

    return {"d_y": loss(nets.d_y, y, made_y), "d_x": loss(nets.d_x, x, made_x)}


class RecycleGan(ImageGan):
    """Train Recycle-GAN, three neighbouring frames of each clip a step."""

    frames = 3
    nets_type = RecycleNets
    descended = ("g_x", "g_y", "p_x", "p_y")
    generator_losses = staticmethod(generator_losses)
    discriminator_losses = staticmethod(discriminator_losses)


METHOD = Method(
    "recycle-gan",
    "Recycle-GAN (2018): image generators with predictors along time",
    RecycleGan,
    lambda config: RecycleNets(config, discriminators=False),
    RecycleGan.footprint,
    {**SETTINGS, "cycle": 0.0, "identity": 0.0, "l_tau": 10.0, "l_rc": 10.0},
    min_frames=3,
)
