"""Reinforcement learning of RL-V2V-GAN (section 3.3): candidates, reward, critic, actor, target networks.

State s: a prefix of p frames, padded to `(n,L,3,H,W)` with its length p. Action a: one frame (n,3,H,W), the next.
Frames are in [-1,1]. Every network is causal, so a padded prefix is run whole and read at p: nothing is looped over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlv2v.model import Discriminator, Translator
from rlv2v.model.build import Nets
from rlv2v.model.frames import map_state

DOMAINS = ("x", "y")


class Policies(NamedTuple):
    """The networks that choose the next frame in a domain A with B as the other: P_A, G_B, P_B, G_A."""

    p_a: Translator
    g_b: Translator
    p_b: Translator
    g_a: Translator

    @classmethod
    def of(cls, nets: Nets, domain: str) -> Policies:
        """The policies of domain "x" or "y"."""
        other = {"x": "y", "y": "x"}[domain]
        return cls(*(getattr(nets, name) for name in (f"p_{domain}", f"g_{other}", f"p_{other}", f"g_{domain}")))


class Transitions(NamedTuple):
    """A mini-batch M of (s, a, r, s' = [s, a], a_true, p), of one domain."""

    states: Tensor  # (n,L,3,H,W), frames after `lengths` are padding
    lengths: Tensor  # (n,) long, 1 <= p <= L
    actions: Tensor  # (n,3,H,W)
    rewards: Tensor  # (n,)
    true_frames: Tensor  # (n,3,H,W)
    terminals: Tensor  # (n,) bool: s' is the whole video
    weights: Tensor  # (n,) importance weights, 1 for new transitions


def last_of(frames: Tensor, lengths: Tensor) -> Tensor:
    """Entry p of each padded sequence (1-based): (n,L,...) -> (n,...)."""
    return frames[torch.arange(len(lengths), device=frames.device), lengths - 1]


def append(states: Tensor, lengths: Tensor, actions: Tensor) -> Tensor:
    """s' = [s, a]: (n,L,3,H,W), lengths p, (n,3,H,W) -> (n,L+1,3,H,W) whose frame p+1 is a."""
    longer = torch.cat((states, torch.zeros_like(states[:, :1])), 1)
    here = torch.arange(longer.shape[1], device=states.device) == lengths[:, None]
    return torch.where(here[..., None, None, None], actions[:, None], longer)


def candidates(policies: Policies, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The two proposals of Algorithm 1: a1 = P(s), and a2 = G'(P(G(s)))_last: out to the other domain, on, and back.

    a2 continues the translated prefix by the frame predicted there, and translates both back. Each (n,3,H,W).
    """
    a1 = last_of(policies.p_a(states)[0], lengths)
    abroad, _ = policies.g_b(states)
    guess = last_of(policies.p_b(abroad)[0], lengths)
    _, memory = policies.g_a(abroad, all_states=True)
    a2, _ = policies.g_a(guess[:, None], map_state(lambda s: last_of(s, lengths), memory))
    return a1, a2[:, 0]


def q_value(q: Discriminator, states: Tensor, lengths: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a), (n,): the critic's number for the video [s, a]."""
    return last_of(q(append(states, lengths, actions))[0], lengths + 1).squeeze(-1)


def q_values(q: Discriminator, states: Tensor, lengths: Tensor, *actions: Tensor) -> tuple[Tensor, ...]:
    """`q_value` of several actions (n,3,H,W) in the same states: the states are run once, each action is one more step.

    With a frozen critic no gradient goes through the states, and the backward of an action is that one step.
    """
    _, memory = q(states, all_states=True)
    memory = map_state(lambda s: torch.cat([last_of(s, lengths)] * len(actions)), memory)
    return q(torch.cat(actions)[:, None], memory)[0][:, -1, 0].chunk(len(actions))


def choose(first: Tensor, second: Tensor, q_first: Tensor, q_second: Tensor) -> Tensor:
    """argmax over two proposals of Q(s, a)."""
    return torch.where((q_first >= q_second)[:, None, None, None], first, second)


def td_target(rewards: Tensor, next_q: Tensor, terminals: Tensor, gamma: float) -> Tensor:
    """y = r + gamma Q'(s', pi'(s')); no bootstrap where the video ends (reading 5)."""
    return rewards + gamma * torch.where(terminals, torch.zeros_like(next_q), next_q)


@torch.no_grad()
def critic_targets(q_target: Discriminator, policies_target: Policies, batch: Transitions, gamma: float) -> Tensor:
    """`td_target` with pi'(s') = the better of the target policies' two candidates by Q'."""
    next_states, next_lengths = append(batch.states, batch.lengths, batch.actions), batch.lengths + 1
    first, second = candidates(policies_target, next_states, next_lengths)
    values = q_values(q_target, next_states, next_lengths, first, second)
    return td_target(batch.rewards, torch.maximum(*values), batch.terminals, gamma)


def critic_loss(q: Discriminator, batch: Transitions, targets: Tensor) -> tuple[Tensor, Tensor]:
    """mean w (y - Q(s, a))^2 and the errors y - Q(s, a), (n,)."""
    errors = targets - q_value(q, batch.states, batch.lengths, batch.actions)
    return (batch.weights * errors.square()).mean(), errors.detach()


def actor_loss(q: Discriminator, policies: Policies, states: Tensor, lengths: Tensor) -> Tensor:
    """-mean Q(s, pi(s)) over both candidates: descending it is the deterministic policy gradient.

    The critic only passes the gradient on; freeze its parameters around the call.
    """
    return -torch.cat(q_values(q, states, lengths, *candidates(policies, states, lengths))).mean()


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """theta' <- (1 - tau) theta' + tau theta, buffers copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
        for mine, theirs in zip(target.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)
