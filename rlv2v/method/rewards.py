"""Rewards of the policy gradient (RL-V2V-GAN section 3.3), and their registry: what `--reward` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:  # `rlv2v.config` reads the registry, and these read the config
    from rlv2v.config import Config
    from rlv2v.model import Discriminator


class RewardInputs(NamedTuple):
    """What a reward may look at: n transitions of one clip, the domain's D, and the candidates of Algorithm 1."""

    d: Discriminator
    num_heads: int | None  # of D that count; None: all
    actions: Tensor  # (n,3,H,W)
    true_frames: Tensor  # (n,3,H,W)
    terminals: Tensor  # (n,) bool: [s, a] is the complete video
    first: Tensor  # (n,3,H,W), the candidate a1
    second: Tensor  # (n,3,H,W), the candidate a2
    video_logits: Tensor  # (n,heads), D([s, a]) of the heads that count
    real: Tensor  # (m,3,H,W), real frames that D sees in the same mini-batch; none where it normalises over no batch

    def frame_logits(self, frames: Tensor) -> Tensor:
        """Return D's logits (n,heads) of single frames (n,3,H,W).

        Statistics of generated frames alone would take away the very level by which D knows them.
        """
        return self.d(torch.cat((frames, self.real))[:, None])[0][: len(frames), 0, : self.num_heads]


def transition_reward(inputs: RewardInputs, config: Config) -> Tensor:
    """Return r = log D(a) - c ||a - a_true||, plus l_v log D(s') at the end of the video; (n,).

    Reading 3: this form of the reward depends on the action. ||.|| is the mean absolute difference, and log D is
    averaged over D's heads.
    """
    distance = (inputs.actions - inputs.true_frames).abs().mean((1, 2, 3))
    end = torch.where(inputs.terminals, config.loss.l_v * logsigmoid(inputs.video_logits).mean(-1), 0.0)
    return logsigmoid(inputs.frame_logits(inputs.actions)).mean(-1) - config.rl.reward_distance * distance + end


def paper_reward(inputs: RewardInputs, config: Config) -> Tensor:
    """Return -l_v L_v when the video is complete, else -(L_g + l_tau L_tau + l_rc L_rc), section 3.3's letter; (n,).

    L_g and L_rc are those of the candidate a2, L_tau that of a1. Terms on real samples are left out, because no action
    changes them.
    """
    l_g = logsigmoid(-inputs.frame_logits(inputs.second)).mean(-1)
    l_tau, l_rc = ((a - inputs.true_frames).square().mean((1, 2, 3)) for a in (inputs.first, inputs.second))
    l_v = logsigmoid(-inputs.video_logits).mean(-1)
    weights = config.loss
    return torch.where(inputs.terminals, -weights.l_v * l_v, -(l_g + weights.l_tau * l_tau + weights.l_rc * l_rc))


class Reward(NamedTuple):
    """A reward of the registry."""

    meaning: str
    compute: Callable[[RewardInputs, Config], Tensor]


REWARDS: dict[str, Reward] = {
    "transition": Reward("log D(a) - c ||a - a_true||, for each transition", transition_reward),
    "paper": Reward("the paper's losses with the sign turned", paper_reward),
}
