"""Small networks and clips that the tests of the method share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method.clips import Clips
from rlv2v.method.patches import Draws, draw
from rlv2v.model.build import Nets, build_nets

T, SIZE = 4, 8
SETS = {"x": (2, T), "y": (1, T), "z": (3, T), "s": (2, 1)}
SMALL = {"widths": (4, 6), "disc_widths": (4, 6), "size": SIZE, "frames": T}
CLIP_NORM = SMALL | {"norm": "clip", "disc_norm": "clip"}


def random_clips(
    sets: str = "xyzs", height: int = SIZE, width: int = SIZE, dtype: torch.dtype = torch.float64
) -> Clips:
    """Return noise in [-1,1], the same in every call; None for the sets that are not named."""
    rng = torch.Generator().manual_seed(3)
    videos = {name: torch.rand(*n, 3, height, width, generator=rng, dtype=dtype) * 2 - 1 for name, n in SETS.items()}
    return Clips(**{name: videos[name] if name in sets else None for name in SETS})


def random_draws() -> Draws:
    """Return the draws of a step, the same in every call."""
    return draw(np.random.default_rng(5), 1, range(1), torch.device("cpu"))


def random_nets(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Nets:
    """Return networks whose weights are all away from 0, and D's logits far enough for every branch of the hinge."""
    torch.manual_seed(seed)
    nets = build_nets(config).to(dtype)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.1 * torch.randn(p.shape))  # the same numbers in any memory layout
        for d in (nets.d_x, nets.d_y):
            d.out.weight.mul_(4)
    return nets


def gradients(loss: Tensor, nets: Nets, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the gradients of the weights of the networks `names`; zeros where there is none."""
    weights = {f"{name}.{key}": p for name in names for key, p in getattr(nets, name).named_parameters()}
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), materialize_grads=True), strict=True))
