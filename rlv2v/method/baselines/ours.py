"""RL-V2V-GAN as one entry of the registry of methods; its modules are those of `rlv2v.method`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlv2v.method.baselines.base import Method
from rlv2v.model.build import Nets, build_nets

if TYPE_CHECKING:
    from rlv2v.config import Config
    from rlv2v.method.trainer import Footprint, Trainer


def trainer(config: Config, device: torch.device, rank: int, num_ranks: int) -> Trainer:
    """Return Algorithm 1; imported only now, because its modules read the config, which reads the registry."""
    from rlv2v.method.step import Algorithm

    return Algorithm(config, device, rank=rank, num_ranks=num_ranks)


def generators(config: Config) -> Nets:
    """Return G_X and G_Y."""
    return build_nets(config, discriminators=False)


def footprint(config: Config) -> Footprint:
    """Return what a run holds in memory, see `rlv2v.method.memory.footprint`."""
    from rlv2v.method import memory

    return memory.footprint(config)


METHOD = Method("rlv2v", "RL-V2V-GAN, this project's method", trainer, generators, footprint)
