"""CycleGAN on single frames (Zhu et al. 2017, arXiv:1703.10593).

    L_GAN(G_Y, D_Y) = mean (D_Y(G_Y(x)) - 1)^2 for G;  1/2 [mean (D_Y(y) - 1)^2 + mean D_Y(G_Y(x))^2] for D
                                                                              (eq. 1 in the form of section 4)
    L_cyc = |G_X(G_Y(x)) - x| + |G_Y(G_X(y)) - y|                             (eq. 2)
    L = L_GAN(G_Y, D_Y) + L_GAN(G_X, D_X) + 10 L_cyc                          (eq. 3)
    L_identity = |G_Y(y) - y| + |G_X(x) - x|, weight 5                        (section 5.2, half of eq. 3's weight)
The weights are `--cycle` and `--identity`. ResNet generators of six blocks, PatchGAN discriminators, instance
normalisation, a pool of 50 images, Adam and its decay are the paper's (section 4, 7.1, 7.2).

It differs where frames of 32 to 64 pixels on a CPU ask for it: a quarter of the generators' widths (16, 32, 64) and
half of the discriminators', which have a layer less: they judge patches of 34 pixels instead of 70. The length of a run
is a budget, not 200 epochs. Target images are drawn from the clips of Y and Z and from the stills of S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from rlv2v.method.baselines.base import Method
from rlv2v.method.baselines.image_gan import SETTINGS, ImageGan, ImageNets, Made, lsgan

if TYPE_CHECKING:
    from rlv2v.config import Config


def generator_losses(nets: ImageNets, x: Tensor, y: Tensor, config: Config) -> tuple[dict[str, Tensor], Made]:
    """Return the weighted terms of eq. 3 and section 5.2 that the generators descend, of frames (n,1,3,H,W).

    No norm looks at several images, so a generator runs once for all that enter it at the same stage.
    """
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    num, cycle, identity = len(x), config.loss.term("cycle"), config.loss.term("identity")
    to_y = nets.g_y.images(torch.cat((x, y)) if identity else x)
    to_x = nets.g_x.images(torch.cat((y, x)) if identity else y)
    fake_y, fake_x = to_y[:num], to_x[:num]
    terms = {"g_y": lsgan(nets.d_y(fake_y), True), "g_x": lsgan(nets.d_x(fake_x), True)}
    if cycle:
        terms["cycle_x"] = cycle * l1_loss(nets.g_x.images(fake_y), x)
        terms["cycle_y"] = cycle * l1_loss(nets.g_y.images(fake_x), y)
    if identity:
        terms["identity_y"] = identity * l1_loss(to_y[num:], y)
        terms["identity_x"] = identity * l1_loss(to_x[num:], x)
    return terms, Made(fake_y, fake_x)


class CycleGan(ImageGan):
    """Train CycleGAN, a frame of each clip a step."""

    generator_losses = staticmethod(generator_losses)


METHOD = Method(
    "cyclegan",
    "CycleGAN (2017) on single frames: ResNet generators, patch discriminators, image pool",
    CycleGan,
    lambda config: ImageNets(config, discriminators=False),
    CycleGan.footprint,
    {**SETTINGS, "cycle": 10.0, "identity": 5.0},
)
