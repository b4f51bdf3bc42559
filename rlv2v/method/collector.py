"""The mini-batch M of Algorithm 1: acting, and the writes to the replay that may come later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.method.rewards import REWARDS, RewardInputs
from rlv2v.method.rl import (
    DOMAINS,
    Policies,
    Transitions,
    actor_loss,
    append,
    candidates,
    choose,
    critic_loss,
    critic_targets,
    last_of,
    q_values,
)
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets
from rlv2v.model.norm import local_stats
from rlv2v.replay import PrioritizedReplay, ReplayBatch
from rlv2v.runtime.device import HostCopy, KeepAlive, on_device


class ReplayRows(NamedTuple):
    """Which transitions of M came out of the replay buffers: for each replica where in M, and their ids there."""

    drawn: tuple[tuple[slice, Tensor], ...]


class Agent:
    """Algorithm 1's inner loop in one domain: gathers the mini-batch M, and gives the critic's and the actor's losses.

    Args:
        domain: "x" or "y"; transitions of Z belong to "y" (reading 5).
        nets, targets: the live networks and the Polyak-averaged copies pi', Q'.
        replays: this domain's buffers of uint8 frames, one for each replica of this rank.
        crops: leave out padding that all states of a mini-batch share.

    What a step adds to the buffers, and the priorities that it gives, are on their way from the device meanwhile: the
    buffers take them in at the next `collect`, or before a checkpoint by `settle`. The draws are the same either way.
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
        self.d: Discriminator = getattr(nets, f"d_{domain}")
        self.q: Discriminator = getattr(nets, f"q_{domain}")
        self.q_target: Discriminator = getattr(targets, f"q_{domain}")
        self.policies, self.policies_target = Policies.of(nets, domain), Policies.of(targets, domain)
        self.pending: list[Callable[[], object]] = []
        # Ranks whose normalisation runs over the clips of all want states of one shape.
        self.crops = crops and "batch" not in (config.model.norm, config.model.disc_norm)

    def flush(self) -> None:
        """Let the buffers take in what is on its way to them."""
        for take in self.pending:
            take()
        self.pending.clear()

    @torch.no_grad()
    def collect(
        self, videos: Sequence[Tensor], rngs: Sequence[np.random.Generator], progress: float
    ) -> tuple[Transitions, ReplayRows]:
        """M: for each replica m transitions, each a stored one with probability eta1, else a new one from its video.

        videos: (T,3,H,W) each.  rngs: of each replica.  Returns M, and where its stored part stands in the buffers.
        """
        self.flush()
        num, config = self.config.rl.transitions, self.config
        parts: list[Transitions] = []
        drawn: list[tuple[slice, Tensor]] = []
        longest = 1
        for replica, (replay, video, rng) in enumerate(zip(self.replays, videos, rngs, strict=True)):
            stored = int(explore(rng, num, annealed(*config.rl.eta1, progress)).numpy().sum()) if len(replay) else 0
            if stored < num:
                lengths = rng.integers(1, len(video), num - stored)  # p uniform in 1..T-1
                longest = max(longest, int(lengths.max()))
                new = self.act(video, lengths, rng, annealed(*config.rl.eta2, progress))
                parts.append(new)
                found = HostCopy(to_uint8(video), to_uint8(new.actions), new.rewards)
                self.pending.append(partial(store, replay, found, lengths.tolist()))
            if stored:
                sample = replay.sample(stored)
                longest = max(longest, int(sample.lengths.numpy().max()))
                parts.append(self.to_batch(sample, video.device))
                drawn.append((slice((replica + 1) * num - stored, (replica + 1) * num), sample.ids.clone()))
        batch = Transitions(*(torch.cat(field) for field in zip(*parts, strict=True)))
        if self.crops:
            batch = batch._replace(states=batch.states[:, :longest])
        return batch, ReplayRows(tuple(drawn))

    def act(self, video: Tensor, prefixes: np.ndarray, rng: np.random.Generator, eta2: float) -> Transitions:
        """New transitions, one a prefix length p: a is the critic's choice of a1, a2 or (1 - eta2) a random frame."""
        num, length, device = len(prefixes), len(video), video.device
        lengths = on_device(prefixes, device)
        states = video[None, : length - 1].expand(num, -1, -1, -1, -1)
        with local_stats(*self.policies, self.d):
            first, second = candidates(self.policies, states, lengths)
            actions = choose(first, second, *q_values(self.q, states, lengths, first, second))
            random_frames = video[on_device(rng.integers(0, length, num), device)]
            greedy = on_device(explore(rng, num, eta2), device)
            actions = torch.where(greedy[:, None, None, None], actions, random_frames)
            true_frames, terminals = video[lengths], lengths == length - 1
            video_logits = last_of(self.d(append(states, lengths, actions))[0], lengths + 1)
            judged = RewardInputs(self.d, states, lengths, actions, true_frames, terminals, first, second, video_logits)
            rewards = REWARDS[self.config.rl.reward].compute(judged, self.config)
        return Transitions(states, lengths, actions, rewards, true_frames, terminals, torch.ones_like(rewards))

    def to_batch(self, drawn: ReplayBatch, device: torch.device) -> Transitions:
        """Stored transitions as the networks see them."""
        states, actions, true_frames = (
            to_model(on_device(v, device)) for v in (drawn.states, drawn.actions, drawn.true_frames)
        )
        lengths, rewards, terminals, weights = (
            on_device(v, device) for v in (drawn.lengths, drawn.rewards, drawn.terminals, drawn.weights)
        )
        if device.type == "cuda":  # the buffer may not use the memory again while it is copied from
            self.pending.append(KeepAlive(drawn).wait)
        return Transitions(states, lengths, actions, rewards, true_frames, terminals, weights)

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """mean w (y - Q(s, a))^2, and the errors y - Q(s, a), (n,)."""
        return critic_loss(
            self.q, batch, critic_targets(self.q_target, self.policies_target, batch, self.config.rl.gamma)
        )

    def prioritise(self, recall: ReplayRows, errors: Tensor) -> None:
        """The errors become the stored transitions' priorities."""
        if not self.config.rl.replay_alpha:
            return
        found = HostCopy(errors.abs() + 1e-6)
        num = self.config.rl.transitions
        for where, ids in recall.drawn:
            self.pending.append(partial(prioritise, self.replays[where.start // num], ids, found, where))

    def actor_loss(self, batch: Transitions) -> Tensor:
        """-J on M's states; the critic's weights take no gradient from it."""
        self.q.requires_grad_(False)
        loss = actor_loss(self.q, self.policies, batch.states, batch.lengths)
        self.q.requires_grad_(True)
        return loss


def store(replay: PrioritizedReplay, found: HostCopy, lengths: Sequence[int]) -> None:
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
            config.rl.replay_capacity,
            (config.data.size, config.data.size, 3),
            config.data.frames - 1,
            alpha=config.rl.replay_alpha,
            beta=config.rl.replay_beta,
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
