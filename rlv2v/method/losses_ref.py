"""Equations 1-10 of RL-V2V-GAN to the letter: every network runs anew on every prefix, which costs O(T^2).

The definition that `rlv2v.method.losses` and `rlv2v.method.objective` are held to; tests and bench share it.
`last(net, v[:, :t])`
is `G(v[1:t])_t`, `P(v[1:t])` or `D(v[1:t])`. Readings as there: a sum over t is a mean, ||.||^2 a mean over elements,
and each expectation a mean over clips (and over D_Y's two heads where both judge). Each clip stands for itself, so this
does not describe `norm="batch"`, whose statistics also depend on which clips are run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rlv2v.config import Config
from rlv2v.method.clips import Clips
from rlv2v.method.losses import Score
from rlv2v.model.build import Nets

DISCRIMINATOR_SCORES = {
    "log": Score(lambda a: torch.log(torch.sigmoid(a)), lambda a: torch.log(1 - torch.sigmoid(a))),
    "nonsaturating": Score(lambda a: torch.log(torch.sigmoid(a)), lambda a: torch.log(1 - torch.sigmoid(a))),
    "hinge": Score(lambda a: -torch.relu(1 - a), lambda a: -torch.relu(1 + a)),
}
GENERATOR_SCORES = {
    "log": Score(torch.zeros_like, lambda a: torch.log(1 - torch.sigmoid(a))),
    "nonsaturating": Score(torch.zeros_like, lambda a: -torch.log(torch.sigmoid(a))),
    "hinge": Score(torch.zeros_like, lambda a: -a),
}
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda a, b: (a - b) ** 2,
    "l1": lambda a, b: (a - b).abs(),
}


def last(net: nn.Module, video: Tensor) -> Tensor:
    """What a network says of a video: its entry for the last frame."""
    entries: Tensor = net(video)[0]
    return entries[:, -1]


def mean(values: Iterable[Tensor]) -> Tensor:
    """Mean over t of what each step gives, itself a mean over clips, heads and elements."""
    return torch.stack([value.mean() for value in values]).mean()


def l_g_y_ref(
    score: Score,
    g_y: nn.Module,
    d_y: nn.Module,
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    s: Tensor | None,
    at: list[int],
) -> Tensor:
    """Eq. 1; y_s are the frames `at` of y (and of z), the fakes G_Y(x[1:t])_t those of the same t."""
    real, fake = score
    num_frames = x.shape[1]
    value = mean(real(last(d_y, y[:, t : t + 1])[:, 0]) for t in at)
    value = value + mean(real(last(d_y, y[:, :t])[:, 0]) for t in range(1, num_frames + 1))
    if z is not None:
        value = value + mean(real(last(d_y, z[:, t : t + 1])) for t in at)
        value = value + mean(real(last(d_y, z[:, :t])) for t in range(1, num_frames + 1))
    if s is not None:
        value = value + mean([real(last(d_y, s))])
    return value + mean(fake(last(d_y, last(g_y, x[:, : t + 1])[:, None])) for t in at)


def l_g_x_ref(score: Score, g_x: nn.Module, d_x: nn.Module, x: Tensor, yz: Tensor, at: list[int]) -> Tensor:
    """Eq. 2; y and z together."""
    real, fake = score
    value = mean(real(last(d_x, x[:, t : t + 1])) for t in at)
    value = value + mean(real(last(d_x, x[:, :t])) for t in range(1, x.shape[1] + 1))
    return value + mean(fake(last(d_x, last(g_x, yz[:, : t + 1])[:, None])) for t in at)


def l_tau_ref(distance: str, p: nn.Module, v: Tensor) -> Tensor:
    """Eq. 3 for v = x, eq. 4 for v = y and z together."""
    return mean(DISTANCES[distance](v[:, t], last(p, v[:, :t])) for t in range(1, v.shape[1]))


def l_rc_ref(distance: str, g_there: nn.Module, p_there: nn.Module, g_back: nn.Module, v: Tensor) -> Tensor:
    """Eq. 5 for v = x, there = Y; eq. 6 for v = y and z together, there = X."""

    def recycled(t: int) -> Tensor:
        there = g_there(v[:, :t])[0]
        return last(g_back, torch.cat((there, last(p_there, there)[:, None]), 1))

    return mean(DISTANCES[distance](v[:, t], recycled(t)) for t in range(1, v.shape[1]))


def l_v_x_ref(score: Score, g_x: nn.Module, d_x: nn.Module, x: Tensor, yz: Tensor) -> Tensor:
    """Eq. 8; y and z together."""
    return mean([score.real(last(d_x, x))]) + mean([score.fake(last(d_x, g_x(yz)[0]))])


def l_v_y_ref(score: Score, g_y: nn.Module, d_y: nn.Module, x: Tensor, y: Tensor, z: Tensor | None) -> Tensor:
    """Eq. 9."""
    value = mean([score.real(last(d_y, y)[:, 0])]) + mean([score.fake(last(d_y, g_y(x)[0]))])
    return value if z is None else value + mean([score.real(last(d_y, z))])


def adversarial_ref(nets: Nets, clips: Clips, score: Score, config: Config, at: list[int]) -> dict[str, Tensor]:
    """The terms of eq. 10 that judge, weighted: L_g^Y, L_g^X, and of eq. 7 L_v^Y, L_v^X."""
    x, y, z, s, yz = clips.x, clips.y, clips.z, clips.s, clips.yz
    return {
        "g_y": config.loss.l_adv * l_g_y_ref(score, nets.g_y, nets.d_y, x, y, z, s, at),
        "g_x": config.loss.l_adv * l_g_x_ref(score, nets.g_x, nets.d_x, x, yz, at),
        "v_y": config.loss.l_v * l_v_y_ref(score, nets.g_y, nets.d_y, x, y, z),
        "v_x": config.loss.l_v * l_v_x_ref(score, nets.g_x, nets.d_x, x, yz),
    }


def generator_losses_ref(nets: Nets, clips: Clips, config: Config, at: list[int]) -> dict[str, Tensor]:
    """Eq. 10 as G and P descend it, by the names of `objective.generator_losses`; nothing beyond the paper's terms."""
    x, yz = clips.x, clips.yz
    return adversarial_ref(nets, clips, GENERATOR_SCORES[config.loss.gan], config, at) | {
        "tau_x": config.loss.l_tau * l_tau_ref(config.loss.distance, nets.p_x, x),
        "tau_y": config.loss.l_tau * l_tau_ref(config.loss.distance, nets.p_y, yz),
        "rc_x": config.loss.l_rc * l_rc_ref(config.loss.distance, nets.g_y, nets.p_y, nets.g_x, x),
        "rc_y": config.loss.l_rc * l_rc_ref(config.loss.distance, nets.g_x, nets.p_x, nets.g_y, yz),
    }


def discriminator_losses_ref(nets: Nets, clips: Clips, config: Config, at: list[int]) -> dict[str, Tensor]:
    """Eq. 10 as D ascends it, its sign turned, by the names of `objective.discriminator_losses`."""
    terms = adversarial_ref(nets, clips, DISCRIMINATOR_SCORES[config.loss.gan], config, at)
    return {f"d_{name}": -term for name, term in terms.items()}
