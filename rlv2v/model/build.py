"""The eight networks of a run, as a config describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rlv2v.model.grid import GridTranslator
from rlv2v.model.networks import Discriminator, Translator

if TYPE_CHECKING:  # the config reads the registries of `rlv2v.method`, which imports this package
    from rlv2v.config import Config


class Nets(nn.Module):
    """The eight networks, by the paper's names: generators, predictors, discriminators and critics."""

    g_x: Translator | GridTranslator
    g_y: Translator | GridTranslator
    p_x: Translator
    p_y: Translator
    d_x: Discriminator
    d_y: Discriminator
    q_x: Discriminator
    q_y: Discriminator


def build_nets(config: Config, *, discriminators: bool = True) -> Nets:
    """Return the Xavier-initialised networks of a config; the generators alone without `discriminators`."""
    model = config.model
    shared: dict[str, Any] = {"patch": model.patch, "memory": config.runtime.memory}
    shared["horizon"] = config.data.frames if model.chrono else 0
    # A critic's states are of unequal length, so they share no statistics.
    critic_norm = "clip" if model.disc_norm == "batch" else model.disc_norm

    def translator() -> Translator:
        head = "mask" if model.head == "grid" else model.head
        return Translator(model.widths, head=head, norm=model.norm, **shared)

    def generator() -> Translator | GridTranslator:
        if model.head == "grid":
            return GridTranslator(model.widths, bins=model.bins, norm=model.norm, **shared)
        return translator()

    def discriminator(heads: int, norm: str, positive: bool = False) -> Discriminator:
        return Discriminator(model.disc_widths, heads=heads, norm=norm, positive=positive, **shared)

    nets = Nets()
    nets.g_x, nets.g_y = generator(), generator()
    if discriminators:
        nets.p_x, nets.p_y = translator(), translator()
        nets.d_x, nets.d_y = discriminator(1, model.disc_norm), discriminator(2, model.disc_norm)
        nets.q_x, nets.q_y = (discriminator(1, critic_norm, model.q_positive) for _ in range(2))
    return nets
