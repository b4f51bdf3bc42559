"""Pre-training (RL-V2V-GAN section 6.2): G as auto-encoder and P as predictor of real clips, copied to both domains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch.nn.functional import l1_loss
from tqdm import tqdm

from rlv2v.config import Config
from rlv2v.data.index import Dataset
from rlv2v.method.clips import Clips, make_loader, pool_size
from rlv2v.method.losses import l_tau
from rlv2v.method.optim import OptimizerStep, autocast
from rlv2v.model.build import Nets
from rlv2v.runtime.distributed import StepControl, World


def warm_up(nets: Nets, dataset: Dataset, config: Config, world: World, stop: Callable[[], bool]) -> bool:
    """Train g_y as auto-encoder and p_y as predictor on clips of X, Y and Z, then copy them to g_x and p_x.

    Adam descends mean |G(v) - v| + L_tau (eq. 3, 4). The copy mask is off meanwhile: a copy of its input would satisfy
    an auto-encoder at once.

    Returns:
        False if `stop` asked for the end on some rank.
    """
    if not config.optim.warmup_steps:
        world.broadcast_parameters(nets)
        return True
    g = None if nets.g_y.starts_as_copy else nets.g_y
    weights = [*(g.parameters() if g else ()), *nets.p_y.parameters()]
    optimizer_step = OptimizerStep(torch.optim.Adam(weights, config.optim.warmup_lr, fused=True), 0.0, config)
    for net in (nets.g_y, nets.p_y):
        net.limit_copying(torch.zeros(()))
    stopped = False
    pool, share = pool_size(config), config.runtime.replicas // world.size
    steps = tqdm(range(config.optim.warmup_steps), desc="warm-up", unit="step", leave=False, disable=not world.first)
    with closing(make_loader(config, dataset, world, stills=False)) as loader, closing(optimizer_step.reducer):
        for _ in steps:
            clips = Clips.of(next(loader), world.device, pool=pool, replicas=share)
            videos = torch.cat((clips.x, clips.yz))
            with autocast(config, world.device):
                losses = [l1_loss(g(videos)[0], videos)] if g else []
                if videos.shape[1] > 1:
                    losses.append(l_tau(videos, nets.p_y(videos)[0], "l1"))
                loss = torch.stack(losses).sum()
            optimizer_step(loss)
            if stopped := world.all_agree(StepControl(stop(), 0.0, False)).stop:
                break
    nets.p_y.mask_gain.fill_(1.0)
    if world.flush().stop or stopped:
        return False
    world.broadcast_parameters(nets)
    nets.g_x.load_state_dict(nets.g_y.state_dict())
    nets.p_x.load_state_dict(nets.p_y.state_dict())
    return True
