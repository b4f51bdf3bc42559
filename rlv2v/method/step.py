"""One step of RL-V2V-GAN, Algorithm 1: the mini-batch M, critic, actor with G and P, target networks, and D.

Each section opens with the line or equation that it implements. What a phase computes is a function of tensors, without
a number that the host would have to wait for: `rlv2v.runtime.cuda_graphs` can record it. What every rank or
replica draws comes from
(seed, step) or (seed, step, replica), so that a step is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import AdamW

from rlv2v.config import Config
from rlv2v.method.clips import Clips
from rlv2v.method.collector import Agent, build_agents
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.optim import Mark, OptimizerStep, autocast, unmarked
from rlv2v.method.rl import Transitions, polyak
from rlv2v.method.schedule import Schedule
from rlv2v.method.terms import domain_gap, gap_floor
from rlv2v.model.build import build_nets
from rlv2v.runtime.cuda_graphs import Graphs, Recorder
from rlv2v.runtime.device import on_device

MEASURE_EVERY = 10  # steps from one measure of the distance between the domains to the next
NUM_DIRECTIONS = 4  # of colour space, in domain_gap
GENERATORS, DISCRIMINATORS = ("g_x", "g_y", "p_x", "p_y"), ("d_x", "d_y")


def detached(told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a phase says: with its autograd graph, a recording would keep the weights' accumulators of its stream."""
    return {name: value.detach() for name, value in told.items()}


def kept(told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a phase said, in memory that no recording writes to again."""
    return {name: value.clone() for name, value in told.items()}


class Algorithm:
    """The networks of a run and what moves them; `step` is one step of Algorithm 1.

    Args:
        config: with `replicas` settled, a multiple of the ranks.
        device: where it runs.
        rank, num_ranks: which replicas of the batch are this rank's.
        graphs: record the phases as CUDA graphs; by default as the config says, on a GPU.
    """

    def __init__(
        self, config: Config, device: torch.device, *, rank: int = 0, num_ranks: int = 1, graphs: Graphs | None = None
    ) -> None:
        assert config.runtime.replicas is not None and config.runtime.replicas % num_ranks == 0
        self.config, self.device = config, device
        share = config.runtime.replicas // num_ranks
        self.replicas = range(rank * share, (rank + 1) * share)
        record = config.runtime.graphs and device.type == "cuda"
        self.graphs = graphs or Graphs(Recorder() if record else None)
        self.quiet = record or graphs is not None  # a recording has no marks inside
        torch.manual_seed(config.seed)
        self.nets, self.targets = (build_nets(config).to(device) for _ in range(2))
        self.average = build_nets(config, discriminators=False).to(device)
        # A recording wants states of one shape.
        crops = not self.quiet
        self.agents = (
            build_agents(self.nets, self.targets, config, self.replicas, crops=crops) if config.rl.enabled else {}
        )
        self.schedule = Schedule(config, device)

        def optimizer_step(names: tuple[str, ...], lr: float, limit: float) -> OptimizerStep:
            weights = [p for name in names for p in getattr(self.nets, name).parameters()]
            # A number would become part of a recording.
            rate = torch.tensor(lr, device=device) if record else lr
            adam = AdamW(
                weights, rate, config.optim.betas, weight_decay=config.optim.weight_decay, fused=True, capturable=record
            )
            return OptimizerStep(adam, limit, config)

        self.optimizer_steps = {
            "generators": optimizer_step(GENERATORS, config.optim.lr, config.optim.clip_grad),
            "discriminators": optimizer_step(DISCRIMINATORS, config.optim.disc_lr, config.optim.clip_grad),
        } | {f"critic_{domain}": optimizer_step((f"q_{domain}",), config.optim.disc_lr, 0.0) for domain in self.agents}

    @property
    def parts(self) -> Mapping[str, Any]:
        """All that is alike on every rank, by name, each with a `state_dict`."""
        parts: dict[str, Any] = {"nets": self.nets, "targets": self.targets, "average": self.average}
        parts["schedule"] = self.schedule
        for name, optimizer_step in self.optimizer_steps.items():
            parts |= {f"adam_{name}": optimizer_step.optimiser, f"scaler_{name}": optimizer_step.scaler}
        return parts

    def start(self) -> None:
        """Q' = Q, pi' = pi, and the average, of warmed-up networks."""
        state = self.nets.state_dict()
        self.targets.load_state_dict(state)
        self.average.load_state_dict({key: state[key] for key in self.average.state_dict()})

    def step(self, clips: Clips, mark: Mark = unmarked) -> dict[str, Tensor]:
        """One step on this rank's clips; returns its losses and norms, () each.

        Among them `distance`, of the translations to the target domain, which `advance` wants.  mark: see
        `rlv2v.runtime.timer.StepTimer`.
        """
        config, schedule = self.config, self.schedule
        rng = np.random.default_rng([config.seed, schedule.step])
        length = clips.x.shape[1]
        num_frames = min(config.loss.disc_frames or length, length)
        at = on_device(np.sort(rng.permutation(length)[:num_frames]), self.device)
        directions = on_device(rng.standard_normal((3, NUM_DIRECTIONS)).astype(np.float32), self.device)
        directions = normalize(directions, dim=0)
        for optimizer_step in self.optimizer_steps.values():
            optimizer_step.set_rate(schedule.learning)
        told: dict[str, Tensor] = {}
        inner = unmarked if self.quiet else mark  # of what lies within a phase

        # M = m transitions of one clip v: stored with probability eta1, else new       (Algorithm 1, inner loop)
        agent = batch = None
        if self.agents and schedule.step % config.rl.every == 0:
            agent = self.agents["xy"[schedule.step // config.rl.every % 2]]
            rngs = [np.random.default_rng([config.seed, schedule.step, 1 + replica]) for replica in self.replicas]
            with autocast(config, self.device):
                batch, recall = agent.collect(self.videos(clips, agent.domain, rngs), rngs, schedule.progress)
            mark("replay")
            critics, name = partial(self.critics, agent, inner), f"critics_{agent.domain}"
            spoken, errors = self.graphs(name, critics, *batch)
            mark("critics")
            told |= kept(spoken)
            agent.prioritise(recall, errors)

        # G and P descend L and climb J, target networks follow
        name = f"generators_{agent.domain}" if agent else "generators"
        generators, given = partial(self.generators, agent, inner), (clips.x, clips.y, clips.z, clips.s)
        spoken, fake_y, fake_x = self.graphs(name, generators, *given, at, directions, *(batch or ()))
        mark("generators")
        told |= kept(spoken)

        # D ascends L_g + l_v L_v on real and generated clips                              (Algorithm 1, last lines)
        discriminators = partial(self.discriminators, inner)
        spoken = self.graphs("discriminators", discriminators, *given, fake_y, fake_x, at)
        mark("discriminators")
        told |= kept(spoken)

        if schedule.step % MEASURE_EVERY == 0:
            target = [clips.y] if clips.z is None else [clips.y, clips.z]
            with torch.no_grad():
                whole_gap = domain_gap(clips.x, clips.yz, directions)
                schedule.measure(whole_gap, gap_floor(target, len(clips.x), directions))
        return told

    def advance(self, seconds: float, distance: Tensor) -> dict[str, Tensor]:
        """End a step, `seconds` into the run: the schedule follows how near the target domain the translations are."""
        self.schedule.advance(seconds, distance)
        return {"gap": self.schedule.remaining_gap, "ramp": self.schedule.ramp.clone()}

    def videos(self, clips: Clips, domain: str, rngs: list[np.random.Generator]) -> list[Tensor]:
        """The clip (T,3,H,W) of a domain that each replica plays on, drawn from its share of the batch."""
        sets = [s for s in ((clips.x,) if domain == "x" else (clips.y, clips.z)) if s is not None]
        found = []
        for replica, rng in enumerate(rngs):
            shares = [s.unflatten(0, (len(rngs), -1))[replica] for s in sets]
            number = int(rng.integers(sum(map(len, shares))))
            found.append([video for share in shares for video in share][number])
        return found

    def critics(self, agent: Agent, mark: Mark, *batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Critic: minimise mean (y - Q(s, a))^2,  y = r + gamma Q'(s', pi'(s'))             (section 3.3)."""
        transitions, optimizer_step = Transitions(*batch), self.optimizer_steps[f"critic_{agent.domain}"]
        with autocast(self.config, self.device):
            loss_q, errors = agent.critic_loss(transitions)
        told = {"loss_q": loss_q, "reward": transitions.rewards.mean()}
        told["grad_q"] = optimizer_step(loss_q, "critics", mark)
        return detached(told | self.scale("scale_q", optimizer_step)), errors

    def generators(
        self, agent: Agent | None, mark: Mark, *inputs: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """G and P descend L (eq. 10; reading 6) and climb J = mean Q(s, pi(s)); then the targets follow (3.3)."""
        x, y, z, s, at, directions, *batch = inputs
        assert x is not None and y is not None and at is not None and directions is not None
        config, nets, optimizer_step = self.config, self.nets, self.optimizer_steps["generators"]
        for g in (nets.g_x, nets.g_y):
            g.mask_gain.copy_(
                self.schedule.ramp if config.loss.term("mask_prior") else torch.zeros_like(self.schedule.ramp)
            )
        clips = Clips(x, y, z, s)
        for judge in (nets.d_x, nets.d_y):
            judge.requires_grad_(False)
        with autocast(config, self.device):
            told, out, back = generator_losses(nets, clips, config, self.schedule.gains, at, directions)
            if agent:
                told["actor"] = config.rl.weight * agent.actor_loss(Transitions(*batch))  # type: ignore[arg-type]
        told["loss"] = torch.stack(list(told.values())).sum()
        told["grad"] = optimizer_step(told["loss"], "generators", mark)
        for judge in (nets.d_x, nets.d_y):
            judge.requires_grad_(True)

        # theta' = (1 - tau) theta' + tau theta                                           (section 3.3)
        if agent:
            for name in (*GENERATORS, f"q_{agent.domain}"):
                polyak(getattr(self.targets, name), getattr(nets, name), config.rl.tau)
        for name in ("g_x", "g_y") if config.optim.average else ():
            polyak(getattr(self.average, name), getattr(nets, name), 1.0 - config.optim.average)
        fake_y, fake_x = out.fake.detach(), back.fake.detach()
        if config.loss.term("colours"):
            told["distance"] = told["colours_y"].detach() / config.loss.term("colours")
        else:
            with torch.no_grad():
                told["distance"] = domain_gap(fake_y, clips.yz, directions)
        return detached(told | self.scale("scale", optimizer_step)), fake_y, fake_x

    def discriminators(self, mark: Mark, *inputs: Tensor | None) -> dict[str, Tensor]:
        """What D descends: the sign of eq. 10 turned, on clips and on the generators' translations of them."""
        x, y, z, s, fake_y, fake_x, at = inputs
        assert x is not None and y is not None and fake_y is not None and fake_x is not None and at is not None
        optimizer_step = self.optimizer_steps["discriminators"]
        with autocast(self.config, self.device):
            told = discriminator_losses(self.nets, Clips(x, y, z, s), fake_y, fake_x, self.config, at)
        told["loss_d"] = torch.stack(list(told.values())).sum()
        told["grad_d"] = optimizer_step(told["loss_d"], "discriminators", mark)
        return detached(told | self.scale("scale_d", optimizer_step))

    def scale(self, name: str, optimizer_step: OptimizerStep) -> dict[str, Tensor]:
        """A phase's loss scale in fp16, else nothing."""
        return {} if optimizer_step.scale is None else {name: optimizer_step.scale}

    def flush(self) -> None:
        """Let the replay buffers take in what is on its way to them; before they are saved."""
        for agent in self.agents.values():
            agent.flush()

    def replays(self) -> dict[int, dict[str, Any]]:
        """The replay buffers of each of this rank's replicas."""
        return {
            replica: {f"replay_{domain}": agent.replays[number] for domain, agent in self.agents.items()}
            for number, replica in enumerate(self.replicas)
        }
