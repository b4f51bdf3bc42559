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
    states: Tensor  # (n,L,3,H,W); frames after `lengths` are padding
    lengths: Tensor  # (n,) long, 1 <= p <= L
    actions: Tensor  # (n,3,H,W)
    true_frames: Tensor  # (n,3,H,W)
    terminals: Tensor  # (n,) bool: [s, a] is the complete video
    first: Tensor  # (n,3,H,W), the candidate a1
    second: Tensor  # (n,3,H,W), the candidate a2
    video_logits: Tensor  # (n,heads), D([s, a])

    def frame_logits(self, frames: Tensor) -> Tensor:
        """Return D's logits (n,heads) of single frames (n,3,H,W)."""
        return self.d(frames[:, None])[0][:, 0]


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
    """Return r = log D(a) - c ||a - a_true||, plus l_v log D(s') at the end of the video; (n,).

    Reading 3: this form of the reward depends on the action. ||.|| is the mean absolute difference, and logits
    (n,heads) are averaged over D's heads.
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
    """Return -l_v L_v when the video is complete, else -(L_g + l_tau L_tau + l_rc L_rc), section 3.3's letter; (n,).

    Each loss is (n,), of its transition's clip. Terms on real samples are left out, because no action changes them.
    """
    return torch.where(terminals, -weight_v * l_v, -(l_g + weight_tau * l_tau + weight_rc * l_rc))


def transition_reward(inputs: RewardInputs, config: Config) -> Tensor:
    """Return `reward_per_transition` with D's logits of the actions as single frames; (n,)."""
    return reward_per_transition(
        inputs.actions,
        inputs.true_frames,
        inputs.frame_logits(inputs.actions),
        inputs.video_logits,
        inputs.terminals,
        distance_weight=config.rl.reward_distance,
        l_v=config.loss.l_v,
    )


def paper_reward(inputs: RewardInputs, config: Config) -> Tensor:
    """Return `reward_paper` of the candidates a1 and a2 of each transition's clip; (n,)."""
    l_g = logsigmoid(-inputs.frame_logits(inputs.second)).mean(-1)
    l_tau, l_rc = ((a - inputs.true_frames).square().mean((1, 2, 3)) for a in (inputs.first, inputs.second))
    l_v = logsigmoid(-inputs.video_logits).mean(-1)
    weights = {"weight_tau": config.loss.l_tau, "weight_rc": config.loss.l_rc, "weight_v": config.loss.l_v}
    return reward_paper(l_g, l_tau, l_rc, l_v, inputs.terminals, **weights)


class Reward(NamedTuple):
    """A reward of the registry."""

    meaning: str
    compute: Callable[[RewardInputs, Config], Tensor]


REWARDS: dict[str, Reward] = {
    "transition": Reward("log D(a) - c ||a - a_true||, for each transition", transition_reward),
    "paper": Reward("the paper's losses with the sign turned", paper_reward),
}
