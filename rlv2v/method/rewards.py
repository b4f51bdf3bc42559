"""Rewards of the policy gradient (RL-V2V-GAN section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_per_transition(
    actions: Tensor,
    true_frames: Tensor,
    frame_logits: Tensor,
    video_logits: Tensor,
    terminals: Tensor,
    *,
    distance_weight: float,
    l_v: float,
) -> Tensor:
    """r = log D(a) - c ||a - a_true||, plus l_v log D(s') at the end of the video; (n,).

    Reading 3: the form of the reward that depends on the action. ||.|| is the mean absolute difference, and logits
    (n,heads) average over D's heads.
    """
    distance = (actions - true_frames).abs().mean((1, 2, 3))
    end = torch.where(terminals, l_v * logsigmoid(video_logits).mean(-1), 0.0)
    return logsigmoid(frame_logits).mean(-1) - distance_weight * distance + end


def reward_paper(
    l_g: Tensor,
    l_tau: Tensor,
    l_rc: Tensor,
    l_v: Tensor,
    terminals: Tensor,
    *,
    weight_tau: float,
    weight_rc: float,
    weight_v: float,
) -> Tensor:
    """Section 3.3 to the letter: r = -l_v L_v when the video is complete, else -(L_g + l_tau L_tau + l_rc L_rc); (n,).

    Each loss is (n,), of its transition's clip; the terms on real samples, which no action changes, are left out.
    """
    return torch.where(terminals, -weight_v * l_v, -(l_g + weight_tau * l_tau + weight_rc * l_rc))
