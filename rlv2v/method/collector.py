"""The mini-batch M of Algorithm 1: acting, and the writes to the replay buffers, which may come later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.method import rl
from rlv2v.method.rewards import REWARDS, RewardInputs
from rlv2v.method.rl import Policies, Transitions
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets
from rlv2v.model.norm import stats_over
from rlv2v.replay import PrioritizedReplay, ReplayBatch
from rlv2v.runtime.device import HostCopy, KeepAlive, on_device


class ReplayRows(NamedTuple):
    """Which transitions of M came out of the replay buffers: for each replica its rows of M, and their ids there."""

    drawn: tuple[tuple[slice, Tensor], ...]


class InPlay(NamedTuple):
    """A clip that an agent plays on."""

    video: Tensor
    """(T,3,H,W)."""
    frames: Tensor
    """Of all sets, (N,3,H,W): random actions are drawn from them."""
    num_heads: int | None = None
    """Of D, that its reward counts: one for a clip of Y, which is no example of the style; None: all."""


class Agent:
    """Algorithm 1's inner loop in one domain: it acts, and collects the mini-batch M of new and stored transitions.

    Args:
        domain: "x" or "y"; transitions of Z belong to "y" (reading 5).
        nets, targets: the live networks, and the Polyak-averaged copies pi', Q'.
        replays: this domain's buffers of uint8 frames, one for each replica of this rank.
        crops: cut off padding that all states of a mini-batch share.

    What a step adds to the buffers, and its new priorities, are still on their way from the device when the step ends.
    The buffers take them in at the next `collect`, or by `flush` before a checkpoint. The draws do not change by that.
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
        self.crops = crops

    def flush(self) -> None:
        """Let the buffers take in what is on its way to them."""
        for write in self.pending:
            write()
        self.pending.clear()

    @torch.no_grad()
    def collect(
        self, videos: Sequence[InPlay], rngs: Sequence[np.random.Generator], progress: float
    ) -> tuple[Transitions, ReplayRows]:
        """Return M, and where its stored transitions are in the buffers.

        M has m transitions for each replica, each a stored one with probability eta1, else a new one of its video.
        videos, rngs: one a replica.  progress: share of the run that is done.
        """
        self.flush()
        num, eta1, eta2 = self.config.rl.transitions, self.config.rl.eta1, self.config.rl.eta2
        batches: list[Transitions] = []
        drawn: list[tuple[slice, Tensor]] = []
        longest = 1
        for replica, (replay, play, rng) in enumerate(zip(self.replays, videos, rngs, strict=True)):
            video = play.video
            num_stored = int((rng.random(num) < annealed(*eta1, progress)).sum()) if len(replay) else 0
            if num_stored < num:
                lengths = rng.integers(1, len(video), num - num_stored)  # p uniform in 1..T-1
                longest = max(longest, int(lengths.max()))
                new = self.act(play, lengths, rng, annealed(*eta2, progress))
                batches.append(new)
                copies = HostCopy(to_uint8(video), to_uint8(new.actions), new.rewards)
                self.pending.append(partial(store, replay, copies, lengths.tolist()))
            if num_stored:
                sample = replay.sample(num_stored)
                longest = max(longest, int(sample.lengths.numpy().max()))
                batches.append(self.to_batch(sample, video.device))
                drawn.append((slice((replica + 1) * num - num_stored, (replica + 1) * num), sample.ids.clone()))
        batch = Transitions(*(torch.cat(field) for field in zip(*batches, strict=True)))
        if self.crops:
            batch = batch._replace(states=batch.states[:, :longest])
        return batch, ReplayRows(tuple(drawn))

    def act(self, play: InPlay, prefixes: np.ndarray, rng: np.random.Generator, eta2: float) -> Transitions:
        """Return new transitions, one for each prefix length p in `prefixes` (n,).

        The action is the critic's choice of a1 and a2 with probability eta2, else a random frame of the data.
        """
        video = play.video
        num, length, device = len(prefixes), len(video), video.device
        lengths = on_device(prefixes, device)
        states = video[None, : length - 1].expand(num, -1, -1, -1, -1)
        with stats_over("rank", self.d):
            first, second = rl.candidates(self.policies, states, lengths)
            q_first, q_second = rl.q_values(self.q, states, lengths, first, second)
            chosen = torch.where((q_first >= q_second)[:, None, None, None], first, second)
            random_frames = play.frames[on_device(rng.integers(0, len(play.frames), num), device)]
            is_greedy = on_device(rng.random(num) < eta2, device)
            actions = torch.where(is_greedy[:, None, None, None], chosen, random_frames)
            true_frames, terminals = video[lengths], lengths == length - 1
            # [s, a], continued by the clip's own frames; D that normalises over a mini-batch sees real ones beside
            is_action = (torch.arange(length, device=device) == lengths[:, None])[..., None, None, None]
            real = video[None][: int(self.config.model.disc_norm == "batch")]
            videos = torch.cat((torch.where(is_action, actions[:, None], video), real))
            video_logits = rl.last_of(self.d(videos)[0][:num], lengths + 1)
            inputs = RewardInputs(
                self.d,
                play.num_heads,
                actions,
                true_frames,
                terminals,
                first,
                second,
                video_logits[:, : play.num_heads],
                real.flatten(0, 1),
            )
            rewards = REWARDS[self.config.rl.reward].compute(inputs, self.config)
        return Transitions(states, lengths, actions, rewards, true_frames, terminals, torch.ones_like(rewards))

    def to_batch(self, sample: ReplayBatch, device: torch.device) -> Transitions:
        """Return stored transitions as the networks see them."""
        fields = {name: on_device(getattr(sample, name), device) for name in Transitions._fields}
        for name in ("states", "actions", "true_frames"):
            fields[name] = to_model(fields[name])
        if device.type == "cuda":  # the buffer may not reuse the memory while it is copied from
            self.pending.append(KeepAlive(sample).wait)
        return Transitions(**fields)

    def prioritise(self, rows: ReplayRows, errors: Tensor) -> None:
        """Make the errors (n,) of M the priorities of its stored transitions."""
        if not self.config.rl.replay_alpha:
            return
        copies, num = HostCopy(errors.abs() + 1e-6), self.config.rl.transitions

        def write() -> None:
            (priorities,) = copies.read()
            for in_batch, ids in rows.drawn:
                self.replays[in_batch.start // num].update_priorities(ids, priorities[in_batch])

        self.pending.append(write)


def store(replay: PrioritizedReplay, copies: HostCopy, lengths: Sequence[int]) -> None:
    """Add transitions of one clip to B: its frames uint8 (T,H,W,3), actions uint8 (n,H,W,3), rewards and p (n,)."""
    frames, actions, rewards = copies.read()
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


def build_agents(
    nets: Nets, targets: Nets, config: Config, replicas: Sequence[int] = (0,), *, crops: bool = True
) -> dict[str, Agent]:
    """Return the agents of both domains, with a replay buffer a replica; its seed is (seed, replica, domain)."""

    def replay(domain: str, replica: int) -> PrioritizedReplay:
        seed = np.random.SeedSequence([config.seed, replica, rl.DOMAINS.index(domain)])
        return PrioritizedReplay(
            config.rl.replay_capacity,
            (config.data.size.height, config.data.size.width, 3),
            config.data.frames - 1,
            alpha=config.rl.replay_alpha,
            beta=config.rl.replay_beta,
            seed=int(seed.generate_state(1, np.uint64)[0]),
        )

    return {
        domain: Agent(domain, nets, targets, [replay(domain, replica) for replica in replicas], config, crops=crops)
        for domain in rl.DOMAINS
    }


def annealed(start: float, end: float, progress: float) -> float:
    """Return a probability that moves linearly from `start` to `end` with the run's progress in [0,1]."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
