"""Equations 1-10 of RL-V2V-GAN, and the one pass over a batch that gives all of them for all prefixes in O(T).

Every network is causal, so one run over a clip holds `G(x[1:t])_t`, `P(x[1:t])` and `D(x[1:t])` for every t at once,
and the recycle loss forks the recurrent state after each prefix (`rollout`). The equations are functions of what the
networks gave: logits of D and frames in [-1,1].

Readings, see docs/method.md: a sum over t is a mean over t and ||.||^2 a mean over a frame's elements, so that no
weight depends on T or on the size of a frame; a term of a set that is missing is None and drops out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, logsigmoid, mse_loss

Frames = Tensor  # (B,T,3,H,W) in [-1,1]
Logits = Tensor | None  # of D; any shape; None: that set is missing

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": mse_loss, "l1": l1_loss}


class Score(NamedTuple):
    """What one judgement adds to L, given its logit: `real` for a real sample, `fake` for a generated one."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]


def zero(logits: Tensor) -> Tensor:
    """Real samples add nothing to what a generator descends."""
    return torch.zeros((), device=logits.device)


def discriminator_score(kind: str) -> Score:
    """What D ascends. "log" and "nonsaturating": log D and log(1 - D); "hinge": -max(0, 1 -/+ logit)."""
    if kind == "hinge":
        return Score(lambda a: (a - 1).clamp(max=0).mean(), lambda a: (-1 - a).clamp(max=0).mean())
    return Score(lambda a: logsigmoid(a).mean(), lambda a: logsigmoid(-a).mean())


def generator_score(kind: str) -> Score:
    """What G descends. "log": log(1 - D), the paper's; "nonsaturating": -log D; "hinge": -logit."""
    if kind == "hinge":
        return Score(zero, lambda a: -a.mean())
    if kind == "nonsaturating":
        return Score(zero, lambda a: -logsigmoid(a).mean())
    return Score(zero, lambda a: logsigmoid(-a).mean())


def total(*terms: tuple[Callable[[Tensor], Tensor], Logits]) -> Tensor:
    """Sum of `score(logits)` over the terms whose set is there."""
    values = [score(logits) for score, logits in terms if logits is not None]
    return torch.stack(values).sum() if values else torch.zeros(())


def l_g_y(
    score: Score,
    *,
    frames_y: Logits = None,
    frames_z: Logits = None,
    stills: Logits = None,
    prefixes_y: Logits = None,
    prefixes_z: Logits = None,
    fakes: Logits = None,
) -> Tensor:
    """Eq. 1, adversarial loss of the target domain, for D_Y's logits (..., 2) = (in the domain, in the style).

        L_g^Y = log D_Y0(y_s) + log D_Y1(s) + mean_t log D_Y0(y[1:t]) + mean_t log(1 - D_Y0(G_Y(x[1:t])_t))
    Reading 1: single frames and prefixes of z and the stills s are real for both heads, y for head 0, and
    `fakes = D_Y(G_Y(x[1:t])_t)` fake for both.
    """
    real, fake = score
    return total(
        (real, head(frames_y, 0)),
        (real, head(prefixes_y, 0)),
        (real, frames_z),
        (real, prefixes_z),
        (real, stills),
        (fake, fakes),
    )


def l_g_x(
    score: Score,
    *,
    frames: Logits = None,
    prefixes: Logits = None,
    fakes_y: Logits = None,
    fakes_z: Logits = None,
) -> Tensor:
    """Eq. 2, adversarial loss of the source domain, for D_X's logits (..., 1).

        L_g^X = mean_t log D_X(x[1:t]) + mean_t log(1 - D_X(G_X(y[1:t])_t)) + mean_t log(1 - D_X(G_X(z[1:t])_t))
    Reading 1, as in eq. 1: single frames of x are real too. Fakes of y and z may come together as `fakes_y`.
    """
    real, fake = score
    return total((real, frames), (real, prefixes), (fake, fakes_y), (fake, fakes_z))


def l_tau(video: Frames, predicted: Frames, distance: str = "l2") -> Tensor:
    """Eq. 3 and each half of eq. 4, recurrent loss: mean_t || v[t+1] - P(v[1:t]) ||^2; predicted[:, t] = P(v[1:t])."""
    return DISTANCES[distance](predicted[:, :-1], video[:, 1:])


def l_rc(video: Frames, recycled: Frames, distance: str = "l2") -> Tensor:
    """Eq. 5 and each half of eq. 6, recycle loss: mean_t || v[t+1] - G([G'(v[1:t]), P'(G'(v[1:t]))])_{t+1} ||^2.

    `recycled` (B,T-1,3,H,W) as `rollout` gives it: the frames t+1 = 2..T.
    """
    return DISTANCES[distance](recycled, video[:, 1:])


def l_v_x(score: Score, *, video: Logits = None, fake_y: Logits = None, fake_z: Logits = None) -> Tensor:
    """Eq. 8, video loss: log D_X(x[1:T]) + log(1 - D_X(G_X(y[1:T]))) + log(1 - D_X(G_X(z[1:T])))."""
    return total((score.real, video), (score.fake, fake_y), (score.fake, fake_z))


def l_v_y(score: Score, *, video_y: Logits = None, video_z: Logits = None, fake: Logits = None) -> Tensor:
    """Eq. 9, video loss of the target domain.

    log D_Y0(y[1:T]) + log D_Y1(z[1:T]) + log(1 - D_Y0(G_Y(x[1:T]))) + log(1 - D_Y1(G_Y(x[1:T])))
    Reading 1: z is real for D_Y0 too.
    """
    return total((score.real, head(video_y, 0)), (score.real, video_z), (score.fake, fake))


def head(logits: Logits, index: int) -> Logits:
    """One head of D_Y's logits."""
    return None if logits is None else logits[..., index]
