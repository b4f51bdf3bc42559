"""Equations 1-10 of RL-V2V-GAN to the letter: every network runs anew on every prefix, which costs O(T^2).

The one-pass losses of `rlv2v.method` are compared with this, in tests and in a bench. `last(net, v[:, :t])` is
`G(v[1:t])_t`, `P(v[1:t])` or `D(v[1:t])`. The readings are the same: a sum over t is a mean, ||.||^2 is a mean over
elements, and each expectation is a mean over clips (and over both heads of D_Y where both count). Each clip stands for
itself, so this does not describe `norm="batch"`, whose statistics also depend on which clips are run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rlv2v.config import Config
from rlv2v.method.clips import Clips
from rlv2v.method.losses import Score
from rlv2v.model.build import Nets


def log_d(a: Tensor) -> Tensor:
    """Return log D of logits."""
    return torch.log(torch.sigmoid(a))


def log_not_d(a: Tensor) -> Tensor:
    """Return log(1 - D) of logits."""
    return torch.log(1 - torch.sigmoid(a))


DISCRIMINATOR_SCORES = {
    "log": Score(log_d, log_not_d),
    "nonsaturating": Score(log_d, log_not_d),
    "hinge": Score(lambda a: -torch.relu(1 - a), lambda a: -torch.relu(1 + a)),
}
GENERATOR_SCORES = {
    "log": Score(torch.zeros_like, log_not_d),
    "nonsaturating": Score(torch.zeros_like, lambda a: -log_d(a)),
    "hinge": Score(torch.zeros_like, lambda a: -a),
}
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda a, b: (a - b) ** 2,
    "l1": lambda a, b: (a - b).abs(),
}


def last(net: nn.Module, video: Tensor) -> Tensor:
    """Return a network's output for the last frame of a video."""
    outputs: Tensor = net(video)[0]
    return outputs[:, -1]


def mean(values: Iterable[Tensor]) -> Tensor:
    """Return the mean over t of values, each of which is averaged over clips, heads and elements."""
    return torch.stack([value.mean() for value in values]).mean()


def l_g_y_ref(
    score: Score,
    g_y: nn.Module,
    d_y: nn.Module,
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    s: Tensor | None,
    indices: list[int],
) -> Tensor:
    """Return eq. 1; y_s are the frames `indices` of y (and of z), the fakes G_Y(x[1:t])_t those of the same t."""
    real, fake = score
    num_frames = x.shape[1]
    value = mean(real(last(d_y, y[:, t : t + 1])[:, 0]) for t in indices)
    value = value + mean(real(last(d_y, y[:, :t])[:, 0]) for t in range(1, num_frames + 1))
    if z is not None:
        value = value + mean(real(last(d_y, z[:, t : t + 1])) for t in indices)
        value = value + mean(real(last(d_y, z[:, :t])) for t in range(1, num_frames + 1))
    if s is not None:
        value = value + mean([real(last(d_y, s))])
    return value + mean(fake(last(d_y, last(g_y, x[:, : t + 1])[:, None])) for t in indices)


def l_g_x_ref(score: Score, g_x: nn.Module, d_x: nn.Module, x: Tensor, yz: Tensor, indices: list[int]) -> Tensor:
    """Return eq. 2, y and z together."""
    real, fake = score
    value = mean(real(last(d_x, x[:, t : t + 1])) for t in indices)
    value = value + mean(real(last(d_x, x[:, :t])) for t in range(1, x.shape[1] + 1))
    return value + mean(fake(last(d_x, last(g_x, yz[:, : t + 1])[:, None])) for t in indices)


def l_tau_ref(distance: str, p: nn.Module, v: Tensor) -> Tensor:
    """Return eq. 3 for v = x, eq. 4 for v = y and z together."""
    return mean(DISTANCES[distance](v[:, t], last(p, v[:, :t])) for t in range(1, v.shape[1]))


def l_rc_ref(distance: str, g_out: nn.Module, p_out: nn.Module, g_back: nn.Module, v: Tensor) -> Tensor:
    """Return eq. 5 for v = x, with G_Y, P_Y, G_X; eq. 6 for v = y and z together, with G_X, P_X, G_Y."""

    def recycled(t: int) -> Tensor:
        fake = g_out(v[:, :t])[0]
        return last(g_back, torch.cat((fake, last(p_out, fake)[:, None]), 1))

    return mean(DISTANCES[distance](v[:, t], recycled(t)) for t in range(1, v.shape[1]))


def l_v_x_ref(score: Score, g_x: nn.Module, d_x: nn.Module, x: Tensor, yz: Tensor) -> Tensor:
    """Return eq. 8, y and z together."""
    fakes = (score.fake(last(d_x, g_x(yz[:, :t])[0])) for t in range(1, yz.shape[1] + 1))
    return mean([score.real(last(d_x, x))]) + mean(fakes)


def l_v_y_ref(score: Score, g_y: nn.Module, d_y: nn.Module, x: Tensor, y: Tensor, z: Tensor | None) -> Tensor:
    """Return eq. 9."""
    fakes = (score.fake(last(d_y, g_y(x[:, :t])[0])) for t in range(1, x.shape[1] + 1))
    value = mean([score.real(last(d_y, y)[:, 0])]) + mean(fakes)
    return value if z is None else value + mean([score.real(last(d_y, z))])


def adversarial_ref(nets: Nets, clips: Clips, score: Score, config: Config, indices: list[int]) -> dict[str, Tensor]:
    """Return the terms of eq. 10 with D in them, weighted: L_g^Y, L_g^X, and of eq. 7 L_v^Y, L_v^X."""
    x, y, z, s, yz = clips.x, clips.y, clips.z, clips.s, clips.yz
    return {
        "g_y": config.loss.l_adv * l_g_y_ref(score, nets.g_y, nets.d_y, x, y, z, s, indices),
        "g_x": config.loss.l_adv * l_g_x_ref(score, nets.g_x, nets.d_x, x, yz, indices),
        "v_y": config.loss.l_v * l_v_y_ref(score, nets.g_y, nets.d_y, x, y, z),
        "v_x": config.loss.l_v * l_v_x_ref(score, nets.g_x, nets.d_x, x, yz),
    }


def generator_losses_ref(nets: Nets, clips: Clips, config: Config, indices: list[int]) -> dict[str, Tensor]:
    """Return the paper's terms of eq. 10 that G and P descend, by the names of `objective.generator_losses`."""
    x, yz = clips.x, clips.yz
    return adversarial_ref(nets, clips, GENERATOR_SCORES[config.loss.gan], config, indices) | {
        "tau_x": config.loss.l_tau * l_tau_ref(config.loss.distance, nets.p_x, x),
        "tau_y": config.loss.l_tau * l_tau_ref(config.loss.distance, nets.p_y, yz),
        "rc_x": config.loss.l_rc * l_rc_ref(config.loss.distance, nets.g_y, nets.p_y, nets.g_x, x),
        "rc_y": config.loss.l_rc * l_rc_ref(config.loss.distance, nets.g_x, nets.p_x, nets.g_y, yz),
    }


def discriminator_losses_ref(nets: Nets, clips: Clips, config: Config, indices: list[int]) -> dict[str, Tensor]:
    """Return eq. 10 as D ascends it, its sign turned, by the names of `objective.discriminator_losses`."""
    terms = adversarial_ref(nets, clips, DISCRIMINATOR_SCORES[config.loss.gan], config, indices)
    return {f"d_{name}": -term for name, term in terms.items()}
