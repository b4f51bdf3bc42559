"""Pre-training (RL-V2V-GAN section 6.2): G as auto-encoder, P as predictor of real clips, copied to both domains."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.functional import l1_loss
from tqdm import tqdm

from rlv2v.checkpoint.export import VERSION
from rlv2v.config import Config
from rlv2v.data.index import Dataset
from rlv2v.data.loader import Loader
from rlv2v.files import write_atomically
from rlv2v.method.clips import Clips
from rlv2v.method.losses import l_tau
from rlv2v.method.optim import OptimizerStep, autocast
from rlv2v.model.build import Nets
from rlv2v.runtime.distributed import StepControl, World

log = logging.getLogger(__name__)
SHAPING = (
    "widths",
    "patch",
    "head",
    "norm",
    "chrono",
    "size",
    "frames",
    "augment",
    "seed",
    "warmup_steps",
    "warmup_lr",
    "method",
    "precision",
    "memory",
    "replicas",
)


def warm_up(nets: Nets, dataset: Dataset, config: Config, world: World, stop: Callable[[], bool]) -> float | None:
    """Train g_y as auto-encoder and p_y as predictor on clips of all sets, then copy them to g_x and p_x.

    The copy mask is off meanwhile: copying its input would satisfy an auto-encoder at once. Weights are kept in the
    user's cache folder under a hash of all that shapes them, unless `config.warmup_cache` is off.

    Returns:
        The seconds that it took; from the cache: that it took then, so that a budget means the same. None: `stop` said
        so on some rank.
    """
    if not config.warmup_steps:
        world.broadcast_parameters(nets)
        return 0.0
    began = time.monotonic()
    path = cache_path(dataset, config, world)
    seconds = world.broadcast_object(lambda: recall(nets, path) if config.warmup_cache else None)
    if seconds is None:
        if not learn(nets, dataset, config, world, stop):
            return None
        seconds = world.broadcast_object(lambda: time.monotonic() - began)
        if config.warmup_cache and world.first:
            remember(nets, path, seconds)
    world.broadcast_parameters(nets)
    nets.g_x.load_state_dict(nets.g_y.state_dict())
    nets.p_x.load_state_dict(nets.p_y.state_dict())
    return seconds


def learn(nets: Nets, dataset: Dataset, config: Config, world: World, stop: Callable[[], bool]) -> bool:
    """The warm-up itself: mean |G(v) - v| + L_tau, by Adam; False: it was stopped."""
    share = (config.replicas or world.size) // world.size
    loader = Loader(
        dataset,
        batch={"x": share * config.batch_x, "y": share * config.batch_y, "z": share * config.batch_z},
        frames=config.frames,
        size=config.size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        augment=config.augment,
    )
    weights = [*nets.g_y.parameters(), *nets.p_y.parameters()]
    optimizer_step = OptimizerStep(torch.optim.Adam(weights, config.warmup_lr, fused=True), 0.0, config)
    nets.g_y.mask_gain.zero_()
    nets.p_y.mask_gain.zero_()
    stopped = False
    with closing(loader), closing(optimizer_step.reducer):
        for _ in tqdm(range(config.warmup_steps), desc="warm-up", unit="step", leave=False, disable=not world.first):
            clips = Clips.of(next(loader), world.device, config.per_frame)
            videos = torch.cat((clips.x, clips.yz))
            with autocast(config, world.device):
                loss = l1_loss(nets.g_y(videos)[0], videos)
                if videos.shape[1] > 1:
                    loss = loss + l_tau(videos, nets.p_y(videos)[0], "l1")
            optimizer_step(loss)
            if stopped := world.all_agree(StepControl(stop(), 0.0, False)).stop:
                break
    nets.p_y.mask_gain.fill_(1.0)
    return not (world.flush().stop or stopped)


def cache_path(dataset: Dataset, config: Config, world: World) -> Path:
    """Where the warmed-up weights of this very set-up are kept."""
    shape = {name: getattr(config, name) for name in SHAPING} | {
        "batch": (config.batch_x, config.batch_y, config.batch_z)
    }
    where = (world.device.type, world.size, torch.get_num_threads())
    about = [VERSION, torch.__version__, where, dataset.fingerprint, shape]
    name = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "rlv2v" / f"warmup-{name}.safetensors"


def recall(nets: Nets, path: Path) -> float | None:
    """Load cached weights into g_y and p_y; the seconds they took, or None where there are none to use."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            seconds = float(file.metadata()["seconds"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name in ("g_y", "p_y"):
            net = getattr(nets, name)
            net.load_state_dict({key[len(name) + 1 :]: w for key, w in weights.items() if key.startswith(f"{name}.")})
    except (SafetensorError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: not a usable warm-up (%s); warming up anew", path, str(error).splitlines()[0])
        return None
    return seconds


def remember(nets: Nets, path: Path, seconds: float) -> None:
    """Keep g_y and p_y; a cache that cannot be written is said and does without."""
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name in ("g_y", "p_y")
        for key, value in getattr(nets, name).state_dict().items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"seconds": str(seconds)}))
    except (OSError, SafetensorError) as error:
        log.warning("%s: the warm-up could not be cached (%s)", path, error)
