"""CycleGAN on single frames (Zhu et al. 2017, arXiv:1703.10593), with this project's networks and optimiser.

    L = L_GAN(G_Y, D_Y) + L_GAN(G_X, D_X) + 10 |G_X(G_Y(x)) - x| + 10 |G_Y(G_X(y)) - y| + 5 |G(y) - y|   (eq. 3; 5.2)
Nothing looks along time. Unlike that paper it has no patch discriminator and no pool of earlier images.
"""

from __future__ import annotations

from rlv2v.method.baselines.base import Method

OFF = dict.fromkeys(("l_v", "l_tau", "l_rc", "contrast", "mask_prior", "colours"), 0.0)
METHOD = Method(
    "cyclegan",
    "the per-frame baseline: adversarial, cycle and identity losses",
    {**OFF, "cycle": 10.0, "identity": 5.0, "adversarial_end": 1.0, "rl": False},
    per_frame=True,
)
