"""Reinforcement learning of RL-V2V-GAN (section 3.3): candidates, reward, critic, actor, target networks.

State s: a prefix of p frames, padded to `(n,L,3,H,W)` with its length p. Action a: one frame (n,3,H,W), the next.
Frames are in [-1,1]. Every network is causal, so a padded prefix is run whole and read at p: nothing is looped over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.device import Held, HostCopy, on_device
from rlv2v.losses import Nets
from rlv2v.model import Judge, Translator
from rlv2v.model.layers import apart, map_state
from rlv2v.replay import PrioritizedReplay, ReplayBatch

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


class Recall(NamedTuple):
    """Which transitions of M came out of the replay buffers: for each replica where in M, and their ids there."""

    drawn: tuple[tuple[slice, Tensor], ...]


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
    _, memory = policies.g_a(abroad, every=True)
    a2, _ = policies.g_a(guess[:, None], map_state(lambda s: last_of(s, lengths), memory))
    return a1, a2[:, 0]


def q_value(q: Judge, states: Tensor, lengths: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a), (n,): the critic's number for the video [s, a]."""
    return last_of(q(append(states, lengths, actions))[0], lengths + 1).squeeze(-1)


def q_values(q: Judge, states: Tensor, lengths: Tensor, *actions: Tensor) -> tuple[Tensor, ...]:
    """`q_value` of several actions (n,3,H,W) in the same states: the states are run once, each action is one more step.

    With a frozen critic no gradient goes through the states, and the backward of an action is that one step.
    """
    _, memory = q(states, every=True)
    memory = map_state(lambda s: torch.cat([last_of(s, lengths)] * len(actions)), memory)
    return q(torch.cat(actions)[:, None], memory)[0][:, -1, 0].chunk(len(actions))


def choose(first: Tensor, second: Tensor, q_first: Tensor, q_second: Tensor) -> Tensor:
    """argmax over two proposals of Q(s, a)."""
    return torch.where((q_first >= q_second)[:, None, None, None], first, second)


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


def td_target(rewards: Tensor, next_q: Tensor, terminals: Tensor, gamma: float) -> Tensor:
    """y = r + gamma Q'(s', pi'(s')); no bootstrap where the video ends (reading 5)."""
    return rewards + gamma * torch.where(terminals, torch.zeros_like(next_q), next_q)


@torch.no_grad()
def critic_targets(q_target: Judge, policies_target: Policies, batch: Transitions, gamma: float) -> Tensor:
    """`td_target` with pi'(s') = the better of the target policies' two candidates by Q'."""
    next_states, next_lengths = append(batch.states, batch.lengths, batch.actions), batch.lengths + 1
    first, second = candidates(policies_target, next_states, next_lengths)
    values = q_values(q_target, next_states, next_lengths, first, second)
    return td_target(batch.rewards, torch.maximum(*values), batch.terminals, gamma)


def critic_loss(q: Judge, batch: Transitions, targets: Tensor) -> tuple[Tensor, Tensor]:
    """mean w (y - Q(s, a))^2 and the errors y - Q(s, a), (n,)."""
    errors = targets - q_value(q, batch.states, batch.lengths, batch.actions)
    return (batch.weights * errors.square()).mean(), errors.detach()


def actor_loss(q: Judge, policies: Policies, states: Tensor, lengths: Tensor) -> Tensor:
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


class Agent:
    """Algorithm 1's inner loop in one domain: gathers the mini-batch M, and gives the critic's and the actor's losses.

    Args:
        domain: "x" or "y"; transitions of Z belong to "y" (reading 5).
        nets, targets: the live networks and the Polyak-averaged copies pi', Q'.
        replays: this domain's buffers of uint8 frames, one for each replica of this rank.
        crops: leave out padding that all states of a mini-batch share.

    What a step adds to the buffers, and the priorities that it gives, are on their way from the device meanwhile: the
    buffers take them in at the next `gather`, or before a checkpoint by `settle`. The draws are the same either way.
    """

    def __init__(
        self,
        domain: str,
        nets: Nets,
        targets: Nets,
        replays: Sequence[PrioritizedReplay],
        config: Config,
        *,
        crops: bool = True,
    ) -> None:
        self.domain, self.config, self.replays = domain, config, replays
        self.d: Judge = getattr(nets, f"d_{domain}")
        self.q: Judge = getattr(nets, f"q_{domain}")
        self.q_target: Judge = getattr(targets, f"q_{domain}")
        self.policies, self.policies_target = Policies.of(nets, domain), Policies.of(targets, domain)
        self.pending: list[Callable[[], object]] = []
        # Ranks whose normalisation runs over the clips of all want states of one shape.
        self.crops = crops and "batch" not in (config.norm, config.judge_norm)

    def settle(self) -> None:
        """Let the buffers take in what is on its way to them."""
        for take in self.pending:
            take()
        self.pending.clear()

    @torch.no_grad()
    def gather(
        self, videos: Sequence[Tensor], rngs: Sequence[np.random.Generator], progress: float
    ) -> tuple[Transitions, Recall]:
        """M: for each replica m transitions, each a stored one with probability eta1, else a new one from its video.

        videos: (T,3,H,W) each.  rngs: of each replica.  Returns M, and where its stored part stands in the buffers.
        """
        self.settle()
        num, config = self.config.transitions, self.config
        parts: list[Transitions] = []
        drawn: list[tuple[slice, Tensor]] = []
        longest = 1
        for replica, (replay, video, rng) in enumerate(zip(self.replays, videos, rngs, strict=True)):
            stored = int(explore(rng, num, annealed(*config.eta1, progress)).numpy().sum()) if len(replay) else 0
            if stored < num:
                lengths = rng.integers(1, len(video), num - stored)  # p uniform in 1..T-1
                longest = max(longest, int(lengths.max()))
                new = self.play(video, lengths, rng, annealed(*config.eta2, progress))
                parts.append(new)
                found = HostCopy(to_uint8(video), to_uint8(new.actions), new.rewards)
                self.pending.append(partial(remember, replay, found, lengths.tolist()))
            if stored:
                sample = replay.sample(stored)
                longest = max(longest, int(sample.lengths.numpy().max()))
                parts.append(self.recalled(sample, video.device))
                drawn.append((slice((replica + 1) * num - stored, (replica + 1) * num), sample.ids.clone()))
        batch = Transitions(*(torch.cat(field) for field in zip(*parts, strict=True)))
        if self.crops:
            batch = batch._replace(states=batch.states[:, :longest])
        return batch, Recall(tuple(drawn))

    def play(self, video: Tensor, prefixes: np.ndarray, rng: np.random.Generator, eta2: float) -> Transitions:
        """New transitions, one a prefix length p: a is the critic's choice of a1, a2 or (1 - eta2) a random frame."""
        num, length, device = len(prefixes), len(video), video.device
        lengths = on_device(prefixes, device)
        states = video[None, : length - 1].expand(num, -1, -1, -1, -1)
        with apart(*self.policies, self.d):
            first, second = candidates(self.policies, states, lengths)
            actions = choose(first, second, *q_values(self.q, states, lengths, first, second))
            random_frames = video[on_device(rng.integers(0, length, num), device)]
            greedy = on_device(explore(rng, num, eta2), device)
            actions = torch.where(greedy[:, None, None, None], actions, random_frames)
            true_frames, terminals = video[lengths], lengths == length - 1
            rewards = self.reward(states, lengths, actions, true_frames, terminals, first, second)
        return Transitions(states, lengths, actions, rewards, true_frames, terminals, torch.ones_like(rewards))

    def reward(
        self,
        states: Tensor,
        lengths: Tensor,
        actions: Tensor,
        true_frames: Tensor,
        terminals: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> Tensor:
        """r, (n,), of either form; the literal form judges the proposals a1, a2 of this transition's clip."""
        config = self.config
        whole = append(states, lengths, actions)
        video_logits = last_of(self.d(whole)[0], lengths + 1)
        if config.reward == "transition":
            frame_logits = self.d(actions[:, None])[0][:, 0]
            return reward_per_transition(
                actions,
                true_frames,
                frame_logits,
                video_logits,
                terminals,
                distance_weight=config.reward_distance,
                l_v=config.l_v,
            )
        l_g = logsigmoid(-self.d(second[:, None])[0][:, 0]).mean(-1)
        l_tau, l_rc = ((a - true_frames).square().mean((1, 2, 3)) for a in (first, second))
        return reward_paper(
            l_g,
            l_tau,
            l_rc,
            logsigmoid(-video_logits).mean(-1),
            terminals,
            weight_tau=config.l_tau,
            weight_rc=config.l_rc,
            weight_v=config.l_v,
        )

    def recalled(self, drawn: ReplayBatch, device: torch.device) -> Transitions:
        """Stored transitions as the networks see them."""
        states, actions, true_frames = (
            to_model(on_device(v, device)) for v in (drawn.states, drawn.actions, drawn.true_frames)
        )
        lengths, rewards, terminals, weights = (
            on_device(v, device) for v in (drawn.lengths, drawn.rewards, drawn.terminals, drawn.weights)
        )
        if device.type == "cuda":  # the buffer may not use the memory again while it is copied from
            self.pending.append(Held(drawn).wait)
        return Transitions(states, lengths, actions, rewards, true_frames, terminals, weights)

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """mean w (y - Q(s, a))^2, and the errors y - Q(s, a), (n,)."""
        return critic_loss(self.q, batch, critic_targets(self.q_target, self.policies_target, batch, self.config.gamma))

    def prioritise(self, recall: Recall, errors: Tensor) -> None:
        """The errors become the stored transitions' priorities."""
        if not self.config.replay_alpha:
            return
        found = HostCopy(errors.abs() + 1e-6)
        num = self.config.transitions
        for where, ids in recall.drawn:
            self.pending.append(partial(prioritise, self.replays[where.start // num], ids, found, where))

    def actor_loss(self, batch: Transitions) -> Tensor:
        """-J on M's states; the critic's weights take no gradient from it."""
        self.q.requires_grad_(False)
        loss = actor_loss(self.q, self.policies, batch.states, batch.lengths)
        self.q.requires_grad_(True)
        return loss


def remember(replay: PrioritizedReplay, found: HostCopy, lengths: Sequence[int]) -> None:
    """B += transitions of one clip: its frames uint8 (T,H,W,3), actions uint8 (n,H,W,3), rewards and lengths p (n,)."""
    frames, actions, rewards = found.read()
    clip = replay.put_clip(frames)
    replay.add(
        state=[(clip, 0, p) for p in lengths],
        action=actions,
        reward=rewards,
        true_frame=[(clip, p) for p in lengths],
        position=[p + 1 for p in lengths],
        terminal=[p == len(frames) - 1 for p in lengths],
    )
    clip.release()


def prioritise(replay: PrioritizedReplay, ids: Tensor, errors: HostCopy, where: slice) -> None:
    """Give transitions the priorities that stand at `where` in what has been copied."""
    replay.update_priorities(ids, errors.read()[0][where])


def build_agents(
    nets: Nets, targets: Nets, config: Config, replicas: Sequence[int] = (0,), *, crops: bool = True
) -> dict[str, Agent]:
    """The agents of both domains, each with a replay buffer a replica: draws come from (seed, replica, domain)."""

    def replay(domain: str, replica: int) -> PrioritizedReplay:
        address = np.random.SeedSequence([config.seed, replica, DOMAINS.index(domain)])
        return PrioritizedReplay(
            config.replay_capacity,
            (config.size, config.size, 3),
            config.frames - 1,
            alpha=config.replay_alpha,
            beta=config.replay_beta,
            seed=int(address.generate_state(1, np.uint64)[0]),
        )

    return {
        domain: Agent(domain, nets, targets, [replay(domain, replica) for replica in replicas], config, crops=crops)
        for domain in DOMAINS
    }


def annealed(start: float, end: float, progress: float) -> float:
    """A probability that moves linearly from `start` to `end` with the run's progress in [0,1]."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def explore(rng: np.random.Generator, num: int, eta: float) -> Tensor:
    """u ~ Bernoulli(eta), (num,) bool."""
    return torch.from_numpy(rng.random(num) < eta)
