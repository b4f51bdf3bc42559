"""`python -m rlv2v.train`: RL-V2V-GAN, Algorithm 1, from a folder of videos to a translator.

Top to bottom: the run's folder and data, the warm-up (section 6.2), the loop, the end. Each section of the loop opens
with the line or equation that it implements.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import AdamW

from rlv2v.additions import domain_gap, gap_floor
from rlv2v.checkpoint import build_nets, save_checkpoint, save_translators
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.pipeline import Loader
from rlv2v.ddpg import build_agents, polyak
from rlv2v.device import pick_device
from rlv2v.errors import UserError
from rlv2v.log import RunLog
from rlv2v.objective import Clips, discriminator_losses, generator_losses
from rlv2v.run import (
    Interrupt,
    claim_folder,
    descend,
    finite,
    open_data,
    parameters,
    pick_samples,
    prepare_folder,
    restore,
)
from rlv2v.schedule import Schedule
from rlv2v.translate import translate_clip
from rlv2v.warmup import warm_up

LOG_EVERY = 10  # steps
NUM_DIRECTIONS = 4  # of colour space, in domain_gap
GENERATORS, JUDGES, CRITICS = ("g_x", "g_y", "p_x", "p_y"), ("d_x", "d_y"), ("q_x", "q_y")


def train(config: Config) -> None:
    """Train as `config` says, in `config.out`; see the module.

    Raises:
        UserError: a setting, folder, file or checkpoint that the user can mend; a loss that is no number.
    """
    # the run: data, networks, optimisers, all of them restored when it is resumed
    config.check()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where the loader decodes with --decode gpu
    elif config.decode == "gpu":
        raise UserError(f"--decode gpu: expected to train on a CUDA device, got {device}; use --decode cpu")
    config = prepare_folder(config)
    dataset = open_data(config)
    torch.manual_seed(config.seed)
    nets, targets = (build_nets(config).to(device) for _ in range(2))
    average = build_nets(config, judges=False).to(device)
    learned, judged, critics = (parameters(nets, names) for names in (GENERATORS, JUDGES, CRITICS))
    optimisers = {
        name: AdamW(weights, lr, config.betas, weight_decay=config.weight_decay, fused=True)
        for name, weights, lr in (
            ("generators", learned, config.lr),
            ("judges", judged, config.judge_lr),
            ("critics", critics, config.judge_lr),
        )
    }
    loader = Loader(
        dataset,
        batch={
            "x": config.batch_x,
            "y": config.batch_y * (1 if dataset.sets["z"] else 2),
            "z": config.batch_z,
            "s": config.batch_s,
        },
        frames=config.frames,
        size=config.size,
        seed=config.seed,
        augment=config.augment,
        threads=config.loader_threads,
        device=config.decode,
    )
    agents = build_agents(nets, targets, config) if config.rl else {}
    schedule = Schedule(config)
    state: dict[str, Any] = {
        "nets": nets,
        "targets": targets,
        "average": average,
        "schedule": schedule,
        "loader": loader,
    }
    state |= {f"adam_{name}": optimiser for name, optimiser in optimisers.items()}
    state |= {f"replay_{domain}": agent.replay for domain, agent in agents.items()}

    if config.resume:
        restore(state, config, device)
    claim_folder(config)
    if not config.resume:
        # D, G, P = pre-trained; Q' = Q, pi' = pi                                         (Algorithm 1, first lines)
        schedule.seconds = warm_up(nets, dataset, config, device)
        targets.load_state_dict(nets.state_dict())
        average.load_state_dict({key: nets.state_dict()[key] for key in average.state_dict()})
    began = time.monotonic() - schedule.seconds
    snapshot_at = schedule.seconds + config.snapshot_seconds
    run_log = RunLog(config.out, step=schedule.step, seconds=schedule.seconds, total=config.length)
    samples = pick_samples(config)

    def snapshot() -> None:
        save_checkpoint(config.out, schedule.step, {name: part.state_dict() for name, part in state.items()})
        translators = average if config.average else nets
        save_translators(config.out, translators.g_x, translators.g_y, config)
        if samples:
            g = translators.g_y.eval()
            rows = [row for source, truth in samples for row in (source, translate_clip(g, config, source), *truth)]
            g.train()
            run_log.strip(config.out / "samples" / f"{schedule.step:08d}.png", rows)

    if not config.resume:
        snapshot()
    critic_told: dict[str, Tensor] = {}
    with Interrupt() as interrupted, closing(run_log), closing(loader):
        while schedule.progress < 1.0 and not interrupted.by:
            rng = np.random.default_rng([config.seed, schedule.step])
            clips = Clips.of(next(loader), device, config.per_frame)
            for optimiser in optimisers.values():
                for group in optimiser.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule.learning
            for g in (nets.g_x, nets.g_y):
                g.mask_gain.fill_(schedule.ramp if config.mask_prior else 0.0)
            length = clips.x.shape[1]
            num_frames = min(config.judge_frames or length, length)
            at = torch.from_numpy(np.sort(rng.permutation(length)[:num_frames]))
            directions = normalize(torch.from_numpy(rng.standard_normal((3, NUM_DIRECTIONS))).float(), dim=0).to(device)

            # M = m transitions of one clip v: stored with probability eta1, else new       (Algorithm 1, inner loop)
            # critic: minimise mean (y - Q(s, a))^2,  y = r + gamma Q'(s', pi'(s'))           (section 3.3)
            actor = agent = None
            if agents and schedule.step % config.rl_every == 0:
                agent = agents["xy"[schedule.step // config.rl_every % 2]]
                videos = clips.x if agent.domain == "x" else clips.yz
                batch, recall = agent.gather(videos[rng.integers(len(videos))], rng, schedule.progress)
                loss_q = agent.critic_loss(batch, recall)
                critic_told = {"loss_q": loss_q, "reward": batch.rewards.mean()}
                descend(optimisers["critics"], loss_q, critics, 0.0)
                actor = config.rl_weight * agent.actor_loss(batch)

            # G and P descend L (eq. 10; reading 6) and climb J = mean Q(s, pi(s))              (section 3.3)
            for judge in (nets.d_x, nets.d_y):
                judge.requires_grad_(False)
            terms, out, back = generator_losses(nets, clips, config, schedule.gains, at, directions)
            told = terms if actor is None else terms | {"actor": actor}
            told["loss"] = torch.stack(list(told.values())).sum()
            told["grad"] = descend(optimisers["generators"], told["loss"], learned, config.clip_grad)
            for judge in (nets.d_x, nets.d_y):
                judge.requires_grad_(True)

            # theta' = (1 - tau) theta' + tau theta                                           (section 3.3)
            if agent:
                for name in (*GENERATORS, f"q_{agent.domain}"):
                    polyak(getattr(targets, name), getattr(nets, name), config.tau)
            for name in ("g_x", "g_y") if config.average else ():
                polyak(getattr(average, name), getattr(nets, name), 1.0 - config.average)

            # D ascends L_g + l_v L_v on real and generated clips                              (Algorithm 1, last lines)
            judged_terms = discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, at)
            told |= judged_terms
            told["loss_d"] = torch.stack(list(judged_terms.values())).sum()
            told["grad_d"] = descend(optimisers["judges"], told["loss_d"], judged, config.clip_grad)

            # the schedule follows how near the translations have come to the target domain
            with torch.no_grad():
                gap = domain_gap(out.fake, clips.yz, directions).item()
                if schedule.step % LOG_EVERY == 0:
                    whole_gap = domain_gap(clips.x, clips.yz, directions).item()
                    schedule.measure(whole_gap, gap_floor(clips.yz, len(clips.x), directions).item())
            values = finite(told | critic_told, schedule.step + 1)
            schedule.advance(time.monotonic() - began, gap)
            if schedule.step % LOG_EVERY == 0 or schedule.step == 1 or schedule.progress >= 1.0:
                values |= {"gap": schedule.share, "ramp": schedule.ramp}
                run_log.write(schedule.step, schedule.seconds, values)
            run_log.advance(schedule.step, schedule.seconds)
            if schedule.seconds >= snapshot_at:
                snapshot()
                snapshot_at = schedule.seconds + config.snapshot_seconds
        snapshot()
    if interrupted.by:
        print(
            f"stopped by {interrupted.by} at step {schedule.step}; go on with --resume --out {config.out}",
            file=sys.stderr,
        )


def main(config: Config) -> None:
    """Train; the log goes to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    train(config)


if __name__ == "__main__":
    run_command(main, Config, Config.from_arguments)
