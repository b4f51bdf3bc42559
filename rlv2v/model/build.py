"""The eight networks of a run, as a config describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rlv2v.model.networks import Discriminator, Translator

if TYPE_CHECKING:  # the config reads the registries of `rlv2v.method`, which is above this package
    from rlv2v.config import Config


class Nets(nn.Module):
    """The eight networks: generators, predictors, discriminators and critics, by the paper's names."""

    g_x: Translator
    g_y: Translator
    p_x: Translator
    p_y: Translator
    d_x: Discriminator
    d_y: Discriminator
    q_x: Discriminator
    q_y: Discriminator


def build_nets(config: Config, *, discriminators: bool = True) -> Nets:
    """The networks of a config, Xavier-initialised; without `judges` the generators alone."""

    shared: dict[str, Any] = {"patch": config.model.patch, "memory": config.runtime.memory}
    shared["horizon"] = config.data.frames if config.model.chrono else 0

    def translator() -> Translator:
        return Translator(config.model.widths, head=config.model.head, norm=config.model.norm, **shared)

    def discriminator(heads: int, norm: str, positive: bool = False) -> Discriminator:
        return Discriminator(config.model.disc_widths, heads=heads, norm=norm, positive=positive, **shared)

    norm_q = (
        "clip" if config.model.disc_norm == "batch" else config.model.disc_norm
    )  # states of unequal length share no statistics
    nets = Nets()
    nets.g_x, nets.g_y = translator(), translator()
    if discriminators:
        nets.p_x, nets.p_y = translator(), translator()
        nets.d_x, nets.d_y = discriminator(1, config.model.disc_norm), discriminator(2, config.model.disc_norm)
        nets.q_x, nets.q_y = (discriminator(1, norm_q, config.model.q_positive) for _ in range(2))
    return nets
