"""One step of RL-V2V-GAN's Algorithm 1, and the networks and optimisers that it moves.

`Algorithm.step` goes through Algorithm 1 in the paper's order: the mini-batch M, the critic, the actor together with G
and P, the target networks, D. What it computes on the device is in three phases. A phase is a function of tensors and
never waits for a number on the host, so `rlv2v.runtime.cuda_graphs` can record it. Random draws come from (seed, step)
or (seed, step, replica), so a step is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from rlv2v.config import Config
from rlv2v.data.index import Dataset
from rlv2v.method.clips import Clips
from rlv2v.method.collector import Agent, InPlay, build_agents
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.optim import BookTime, OptimizerStep, autocast, no_timing
from rlv2v.method.patches import Draws, draw
from rlv2v.method.pretrain import warm_up
from rlv2v.method.rl import Transitions, actor_loss, critic_loss, critic_targets, frozen, polyak
from rlv2v.method.schedule import Schedule
from rlv2v.method.trainer import Generators, Logs
from rlv2v.model.build import build_nets
from rlv2v.runtime.cuda_graphs import Graphs, Recorder
from rlv2v.runtime.device import on_device
from rlv2v.runtime.distributed import World

GENERATORS, DISCRIMINATORS = ("g_x", "g_y", "p_x", "p_y"), ("d_x", "d_y")


class Algorithm:
    """The networks of a run and what moves them; `step` is one step of Algorithm 1.

    Args:
        config: with `replicas` settled, a multiple of the ranks.
        device: where it runs.
        rank, num_ranks: which replicas of the batch are this rank's.
        graphs: how phases run; by default they are recorded as CUDA graphs if the config says so, on a GPU.
    """

    def __init__(
        self, config: Config, device: torch.device, *, rank: int = 0, num_ranks: int = 1, graphs: Graphs | None = None
    ) -> None:
        assert config.runtime.replicas and config.runtime.replicas % num_ranks == 0
        self.config, self.device = config, device
        share = config.runtime.replicas // num_ranks
        self.replicas = range(rank * share, (rank + 1) * share)
        record = config.runtime.graphs and device.type == "cuda"
        self.graphs = graphs or Graphs(Recorder() if record else None)
        self.may_record = record or graphs is not None
        torch.manual_seed(config.seed)
        self.nets, self.targets = (build_nets(config).to(device) for _ in range(2))
        self.average = build_nets(config, discriminators=False).to(device)
        self.agents: dict[str, Agent] = {}
        if config.rl.enabled:  # a recording needs states of one shape
            self.agents = build_agents(self.nets, self.targets, config, self.replicas, crops=not self.may_record)
        self.schedule = Schedule(config, device)
        self.distance: Tensor | None = None
        """Of the last step's translations to the domains, by their patches; None without that term."""

        optim = config.optim

        def optimizer_step(names: tuple[str, ...], lr: float, limit: float, suffix: str) -> OptimizerStep:
            weights = [p for name in names for p in getattr(self.nets, name).parameters()]
            rate = torch.tensor(lr, device=device) if record else lr  # a number would become part of a recording
            adam = AdamW(weights, rate, optim.betas, weight_decay=optim.weight_decay, fused=True, capturable=record)
            return OptimizerStep(adam, limit, config, suffix)

        self.optimizer_steps = {
            "generators": optimizer_step(GENERATORS, optim.lr, optim.clip_grad, ""),
            "discriminators": optimizer_step(DISCRIMINATORS, optim.disc_lr, optim.clip_grad, "_d"),
        } | {
            f"critic_{domain}": optimizer_step((f"q_{domain}",), optim.disc_lr, 0.0, f"_q_{domain}")
            for domain in self.agents
        }

    @property
    def generators(self) -> Generators:
        """The networks that translate: the average of their weights, or the last ones without an average."""
        return self.average if self.config.optim.average else self.nets

    def pretrain(self, dataset: Dataset, world: World, stop: Callable[[], bool]) -> bool:
        """Pre-train (section 6.2), then start from it; return False if `stop` asked for the end."""
        if not warm_up(self.nets, dataset, self.config, world, stop):
            return False
        self.start()
        return True

    def start(self) -> None:
        """Set Q' = Q, pi' = pi, and the average, to the pre-trained networks (Algorithm 1, first lines)."""
        state = self.nets.state_dict()
        self.targets.load_state_dict(state)
        self.average.load_state_dict({key: state[key] for key in self.average.state_dict()})

    def step(self, clips: Clips, book_time: BookTime = no_timing) -> Logs:
        """Run one step on this rank's clips, and return its losses and norms."""
        config, schedule, graphs = self.config, self.schedule, self.graphs
        phase_time = no_timing if self.may_record else book_time  # a recording cannot be timed inside
        rng = np.random.default_rng([config.seed, schedule.step])
        length = clips.x.shape[1]
        num_frames = min(config.loss.disc_frames or length, length)
        indices = on_device(np.sort(rng.permutation(length)[:num_frames]), self.device)
        draws = draw(rng, config.runtime.replicas, self.replicas, self.device)
        for optimizer_step in self.optimizer_steps.values():
            optimizer_step.set_rate(schedule.lr_factor)
        logs: Logs = {}

        # M = m transitions of a clip v: a stored one with probability eta1, else a new one   (Algorithm 1, inner loop)
        agent = batch = None
        if self.agents and schedule.step % config.rl.every == 0:
            agent = self.agents["xy"[schedule.step // config.rl.every % 2]]
            rngs = [np.random.default_rng([config.seed, schedule.step, 1 + replica]) for replica in self.replicas]
            with autocast(config, self.device):
                batch, rows = agent.collect(self.pick_videos(clips, agent.domain, rngs), rngs, schedule.progress)
            book_time("replay")

            # critic: minimise mean (y - Q(s, a))^2,  y = r + gamma Q'(s', pi'(s'))              (section 3.3)
            critic_logs, errors = graphs(f"critics_{agent.domain}", self.critic_phase, agent, batch, phase_time)
            book_time("critics")
            logs |= critic_logs
            agent.prioritise(rows, errors)

        # actor: climb J = mean Q(s, pi(s)); G and P also descend L (reading 6); target networks follow
        name = f"generators_{agent.domain}" if agent else "generators"
        generator_logs, fakes = graphs(name, self.generator_phase, agent, batch, clips, indices, draws, phase_time)
        book_time("generators")

        # D ascends L - L_v on frames and prefixes, and L_v on complete clips         (Algorithm 1, last lines)
        discriminator_logs = graphs("discriminators", self.discriminator_phase, clips, fakes, indices, phase_time)
        book_time("discriminators")

        distances = [generator_logs[name] for name in ("patches_x", "patches_y") if name in generator_logs]
        self.distance = torch.stack(distances).sum() / config.loss.term("patches") if distances else None
        return logs | generator_logs | discriminator_logs

    def critic_phase(self, agent: Agent, batch: Transitions, book_time: BookTime) -> tuple[Logs, Tensor]:
        """Take the critic's step on M; return its logs and the errors y - Q(s, a), (n,)."""
        with autocast(self.config, self.device):
            targets = critic_targets(agent.q_target, agent.policies_target, batch, self.config.rl.gamma)
            loss, errors = critic_loss(agent.q, batch, targets)
        optimizer_step = self.optimizer_steps[f"critic_{agent.domain}"]
        return optimizer_step(loss, "critics", book_time) | {f"reward_{agent.domain}": batch.rewards.mean()}, errors

    def generator_phase(
        self,
        agent: Agent | None,
        batch: Transitions | None,
        clips: Clips,
        indices: Tensor,
        draws: Draws,
        book_time: BookTime,
    ) -> tuple[Logs, tuple[Tensor, Tensor]]:
        """Take the step of G and P, then move the targets; return the logs, G_Y(x), and G_X of y and z."""
        config, nets, ramp = self.config, self.nets, self.schedule.ramp
        for g in (nets.g_x, nets.g_y):
            g.limit_copying(ramp if config.loss.term("mask_prior") else torch.zeros_like(ramp))
        with frozen(nets.d_x, nets.d_y, nets.q_x, nets.q_y), autocast(config, self.device):
            terms, of_x, of_yz = generator_losses(nets, clips, config, self.schedule.gain, indices, draws)
            if agent and batch:
                loss_a = actor_loss(agent.q, agent.policies, batch.states, batch.lengths)
                terms[f"actor_{agent.domain}"] = config.rl.weight * loss_a
        loss = torch.stack(list(terms.values())).sum()
        logs = terms | self.optimizer_steps["generators"](loss, "generators", book_time)

        # theta' = (1 - tau) theta' + tau theta                                               (section 3.3)
        if agent:
            for name in (*GENERATORS, f"q_{agent.domain}"):
                polyak(getattr(self.targets, name), getattr(nets, name), config.rl.tau)
        for name in ("g_x", "g_y") if config.optim.average else ():
            polyak(getattr(self.average, name), getattr(nets, name), 1.0 - config.optim.average)
        return logs, (of_x.fake, of_yz.fake)

    def discriminator_phase(
        self, clips: Clips, fakes: tuple[Tensor, Tensor], indices: Tensor, book_time: BookTime
    ) -> Logs:
        """Take the step of D on clips and on the generators' translations of them; return its logs."""
        with autocast(self.config, self.device):
            terms = discriminator_losses(self.nets, clips, *fakes, self.config, indices)
        loss = torch.stack(list(terms.values())).sum()
        return terms | self.optimizer_steps["discriminators"](loss, "discriminators", book_time)

    def advance(self, seconds: float) -> Logs:
        """End a step, `seconds` into the run; return the ramp."""
        self.schedule.advance(seconds, self.distance)
        return {"ramp": self.schedule.ramp.clone()}

    def pick_videos(self, clips: Clips, domain: str, rngs: list[np.random.Generator]) -> list[InPlay]:
        """Return the clip v of a domain for each replica, drawn from the replica's share of the batch."""
        sets = {name: getattr(clips, name) for name in "xyz"}
        shares = {name: s.unflatten(0, (len(rngs), -1)) for name, s in sets.items() if s is not None}
        videos = []
        for replica, rng in enumerate(rngs):
            own = [
                (name, video) for name in shares if (name == "x") == (domain == "x") for video in shares[name][replica]
            ]
            name, video = own[int(rng.integers(len(own)))]
            frames = torch.cat([share[replica].flatten(0, 1) for share in shares.values()])
            videos.append(InPlay(video, frames, 1 if name == "y" else None))
        return videos

    @property
    def state_parts(self) -> Mapping[str, Any]:
        """The parts of the state that are the same on every rank, by name; each has a `state_dict`."""
        parts = {name: getattr(self, name) for name in ("nets", "targets", "average", "schedule")}
        for name, optimizer_step in self.optimizer_steps.items():
            parts |= {f"adam_{name}": optimizer_step.optimiser, f"scaler_{name}": optimizer_step.scaler}
        return parts

    def flush(self) -> None:
        """Let the replay buffers take in what is on its way to them, before they are saved."""
        for agent in self.agents.values():
            agent.flush()

    def replays(self) -> dict[int, dict[str, Any]]:
        """Return the replay buffers of each of this rank's replicas, by name."""
        return {
            replica: {f"replay_{domain}": agent.replays[number] for domain, agent in self.agents.items()}
            for number, replica in enumerate(self.replicas)
        }
