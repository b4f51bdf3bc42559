"""Equations 1-10 of RL-V2V-GAN, as functions of D's logits and of frames (B,T,3,H,W) in [-1,1].

Every network is causal. One run over a clip therefore holds `G(x[1:t])_t`, `P(x[1:t])` and `D(x[1:t])` for every t, and
`rollout` gets all of them for all prefixes in O(T).

Readings, see docs/method.md: a sum over t is a mean over t and ||.||^2 is a mean over a frame's elements, so that no
weight depends on T or on the size of a frame. A term of a missing set is None and drops out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, logsigmoid, mse_loss

Frames = Tensor  # (B,T,3,H,W) in [-1,1]
Logits = Tensor | None  # of D, any shape; None: the set is missing

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": mse_loss, "l1": l1_loss}


class Score(NamedTuple):
    """What logits of D add to L: `real` those of real samples, `fake` those of generated ones."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]


def discriminator_score(kind: str) -> Score:
    """Return what D ascends. "log" and "nonsaturating": log D and log(1 - D); "hinge": -max(0, 1 -/+ logit)."""
    if kind == "hinge":
        return Score(lambda a: (a - 1).clamp(max=0).mean(), lambda a: (-1 - a).clamp(max=0).mean())
    return Score(lambda a: logsigmoid(a).mean(), lambda a: logsigmoid(-a).mean())


def generator_score(kind: str) -> Score:
    """Return what G descends. "log": log(1 - D), the paper's; "nonsaturating": -log D; "hinge": -logit.

    Real samples add nothing.
    """
    fake: dict[str, Callable[[Tensor], Tensor]] = {
        "hinge": lambda a: -a.mean(),
        "nonsaturating": lambda a: -logsigmoid(a).mean(),
        "log": lambda a: logsigmoid(-a).mean(),
    }
    return Score(lambda a: a.new_zeros(()), fake[kind])


def total(*terms: tuple[Callable[[Tensor], Tensor], Logits]) -> Tensor:
    """Return the sum of `score(logits)` over the terms whose set is there."""
    values = [score(logits) for score, logits in terms if logits is not None]
    return torch.stack(values).sum() if values else torch.zeros(())


def head(logits: Logits, index: int) -> Logits:
    """Return one head of D_Y's logits."""
    return None if logits is None else logits[..., index]


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
    """Return eq. 1, the adversarial loss of the target domain; D_Y's logits (..., 2) are (in domain, in style).

        L_g^Y = log D_Y0(y_s) + log D_Y1(s) + mean_t log D_Y0(y[1:t]) + mean_t log(1 - D_Y0(G_Y(x[1:t])_t))
    Reading 1: single frames and prefixes of z, and the stills s, are real for both heads; y is real for head 0;
    `fakes = D_Y(G_Y(x[1:t])_t)` are fake for both.
    """
    real, fake = score
    of_y = (real, head(frames_y, 0)), (real, head(prefixes_y, 0))
    return total(*of_y, (real, frames_z), (real, prefixes_z), (real, stills), (fake, fakes))


def l_g_x(score: Score, *, frames: Logits = None, prefixes: Logits = None, fakes_y: Logits = None) -> Tensor:
    """Return eq. 2, the adversarial loss of the source domain, of D_X's logits (..., 1); `fakes_y` are of y and z.

        L_g^X = mean_t log D_X(x[1:t]) + mean_t log(1 - D_X(G_X(y[1:t])_t)) + mean_t log(1 - D_X(G_X(z[1:t])_t))
    Reading 1: single frames of x are real too, as in eq. 1.
    """
    return total((score.real, frames), (score.real, prefixes), (score.fake, fakes_y))


def l_tau(video: Frames, predicted: Frames, distance: str = "l2") -> Tensor:
    """Return eq. 3 or a half of eq. 4, the recurrent loss, with predicted[:, t] = P(v[1:t]).

    mean_t || v[t+1] - P(v[1:t]) ||^2
    """
    return DISTANCES[distance](predicted[:, :-1], video[:, 1:])


def l_rc(video: Frames, recycled: Frames, distance: str = "l2") -> Tensor:
    """Return eq. 5 or a half of eq. 6, the recycle loss; `rollout` gives `recycled` (B,T-1,3,H,W), t+1 = 2..T.

    mean_t || v[t+1] - G([G'(v[1:t]), P'(G'(v[1:t]))])_{t+1} ||^2
    """
    return DISTANCES[distance](recycled, video[:, 1:])


def l_v_x(score: Score, *, video: Logits = None, fakes_y: Logits = None) -> Tensor:
    """Return eq. 8, the video loss of the source domain; `fakes_y` are of every prefix of G_X(y) and G_X(z).

        log D_X(x[1:T]) + log(1 - D_X(G_X(y[1:T]))) + log(1 - D_X(G_X(z[1:T])))
    Reading 15: what is generated counts at every t, as a mean over t.
    """
    return total((score.real, video), (score.fake, fakes_y))


def l_v_y(score: Score, *, video_y: Logits = None, video_z: Logits = None, fakes: Logits = None) -> Tensor:
    """Return eq. 9, the video loss of the target domain; `fakes` are of every prefix of G_Y(x).

        log D_Y0(y[1:T]) + log D_Y1(z[1:T]) + log(1 - D_Y0(G_Y(x[1:T]))) + log(1 - D_Y1(G_Y(x[1:T])))
    Reading 1: z is real for D_Y0 too. Reading 15: what is generated counts at every t, as a mean over t.
    """
    return total((score.real, head(video_y, 0)), (score.real, video_z), (score.fake, fakes))
