"""Reinforcement learning of RL-V2V-GAN (section 3.3): candidates, targets, critic and actor losses, target networks.

State s: a prefix of p frames, padded to (n,L,3,H,W), with its length p. Action a: the next frame, (n,3,H,W).
Frames are in [-1,1]. Every network is causal, so a padded prefix is run once and read at p, without a loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlv2v.model import Discriminator, GridTranslator, Translator
from rlv2v.model.build import Nets
from rlv2v.model.frames import attributes_set, map_state
from rlv2v.model.norm import stats_over

DOMAINS = ("x", "y")


class Policies(NamedTuple):
    """The networks that choose the next frame in a domain A, with B the other domain: P_A, G_B, P_B, G_A."""

    p_a: Translator
    g_b: Translator | GridTranslator
    p_b: Translator
    g_a: Translator | GridTranslator

    @classmethod
    def of(cls, nets: Nets, domain: str) -> Policies:
        """Return the policies of domain "x" or "y"."""
        other = {"x": "y", "y": "x"}[domain]
        return cls(*(getattr(nets, name) for name in (f"p_{domain}", f"g_{other}", f"p_{other}", f"g_{domain}")))


class Transitions(NamedTuple):
    """A mini-batch M of (s, a, r, s' = [s, a], a_true, p), all of one domain."""

    states: Tensor  # (n,L,3,H,W); frames after `lengths` are padding
    lengths: Tensor  # (n,) long, 1 <= p <= L
    actions: Tensor  # (n,3,H,W)
    rewards: Tensor  # (n,)
    true_frames: Tensor  # (n,3,H,W)
    terminals: Tensor  # (n,) bool: s' is the complete video
    weights: Tensor  # (n,) importance weights, 1 for new transitions


def last_of(frames: Tensor, lengths: Tensor) -> Tensor:
    """Return entry p (counted from 1) of each padded sequence: (n,L,...) -> (n,...)."""
    return frames[torch.arange(len(lengths), device=frames.device), lengths - 1]


def append(states: Tensor, lengths: Tensor, actions: Tensor) -> Tensor:
    """Return s' = [s, a]: (n,L,3,H,W), lengths p, (n,3,H,W) -> (n,L+1,3,H,W) whose frame p+1 is a."""
    longer = torch.cat((states, torch.zeros_like(states[:, :1])), 1)
    is_next = torch.arange(longer.shape[1], device=states.device) == lengths[:, None]
    return torch.where(is_next[..., None, None, None], actions[:, None], longer)


def candidates(policies: Policies, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two candidates of Algorithm 1, (n,3,H,W) each: a1 = P(s) and a2 = G'(P(G(s)))_last.

    For a2 the state is translated to the other domain, continued there by a predicted frame, and translated back. Each
    state is normalised by its own frames: neither the other states nor what pads them may change what is proposed.
    """
    with stats_over("clip", *policies):
        a1 = last_of(policies.p_a(states)[0], lengths)
        translated, _ = policies.g_b(states)
        predicted = last_of(policies.p_b(translated)[0], lengths)
        _, back_states = policies.g_a(translated, all_states=True)
        a2, _ = policies.g_a(predicted[:, None], map_state(lambda s: last_of(s, lengths), back_states))
    return a1, a2[:, 0]


def q_value(q: Discriminator, states: Tensor, lengths: Tensor, actions: Tensor) -> Tensor:
    """Return Q(s, a), (n,): the critic's score of the video [s, a]."""
    return last_of(q(append(states, lengths, actions))[0], lengths + 1).squeeze(-1)


def q_values(q: Discriminator, states: Tensor, lengths: Tensor, *actions: Tensor) -> tuple[Tensor, ...]:
    """Return `q_value` of several actions (n,3,H,W) in the same states, which are run only once.

    Each action is one more step. With a frozen critic no gradient goes through the states, so an action's backward
    pass is that one step.
    """
    _, all_states = q(states, all_states=True)
    q_states = map_state(lambda s: torch.cat([last_of(s, lengths)] * len(actions)), all_states)
    return q(torch.cat(actions)[:, None], q_states)[0][:, -1, 0].chunk(len(actions))


@torch.no_grad()
def critic_targets(q_target: Discriminator, policies_target: Policies, batch: Transitions, gamma: float) -> Tensor:
    """Return y = r + gamma Q'(s', pi'(s')), without the second term where the video ends (reading 5).

    pi'(s') is the better of the target policies' two candidates by Q'.
    """
    next_states, next_lengths = append(batch.states, batch.lengths, batch.actions), batch.lengths + 1
    first, second = candidates(policies_target, next_states, next_lengths)
    values = q_values(q_target, next_states, next_lengths, first, second)
    return batch.rewards + gamma * torch.maximum(*values).masked_fill(batch.terminals, 0.0)


def critic_loss(q: Discriminator, batch: Transitions, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean w (y - Q(s, a))^2 and the errors y - Q(s, a), (n,)."""
    errors = targets - q_value(q, batch.states, batch.lengths, batch.actions)
    return (batch.weights * errors.square()).mean(), errors.detach()


def actor_loss(q: Discriminator, policies: Policies, states: Tensor, lengths: Tensor) -> Tensor:
    """Return -mean Q(s, pi(s)) over both candidates: to descend it is the deterministic policy gradient.

    The critic only passes the gradient on; call this with the critic `frozen`.
    """
    return -torch.cat(q_values(q, states, lengths, *candidates(policies, states, lengths))).mean()


def frozen(*nets: nn.Module) -> AbstractContextManager[None]:
    """Return a context that keeps the weights of `nets` out of the graph; gradients pass through to their inputs."""
    return attributes_set((weight, "requires_grad", False) for net in nets for weight in net.parameters())


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Update theta' <- (1 - tau) theta' + tau theta, and copy the buffers."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
        for target_buffer, source_buffer in zip(target.buffers(), source.buffers(), strict=True):
            target_buffer.copy_(source_buffer)
