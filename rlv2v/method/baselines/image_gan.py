"""What the image baselines share: the least-squares losses, the pool of earlier images, and one step of training.

Sources: Zhu et al. 2017, arXiv:1703.10593 (CycleGAN), sections 4 and 7.1; Mao et al. 2017, arXiv:1611.04076 (LSGAN),
eq. 9; Shrivastava et al. 2017, arXiv:1612.07828, section 2.3 (the pool).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from rlv2v.method.baselines.image_networks import ImageGenerator, PatchDiscriminator
from rlv2v.method.clips import Clips
from rlv2v.method.optim import BookTime, OptimizerStep, autocast, no_timing
from rlv2v.method.rl import frozen, polyak
from rlv2v.method.schedule import Schedule
from rlv2v.method.trainer import Footprint, Generators, Logs, Phase

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config
    from rlv2v.data.index import Dataset
    from rlv2v.runtime.distributed import World

POOL_SIZE = 50  # images (Zhu et al. 2017, section 4)
SETTINGS: Mapping[str, Any] = {
    # Adam with beta1 0.5 and a learning rate of 2e-4, halfway on falling to 0; one image a step (section 4, 7.1)
    **{"lr": 2e-4, "disc_lr": 2e-4, "betas": (0.5, 0.999), "weight_decay": 0.0, "clip_grad": 0.0, "average": 0.0},
    **{"batch_x": 1, "batch_y": 1, "batch_z": 1, "batch_s": 1, "batch_pool": 0},
    # a quarter of the paper's widths: an eighth of a second a step at 32x32 on one core
    **{"patch": 1, "widths": (16, 32, 64), "disc_widths": (32, 64, 128)},
    # what these methods do not have
    **{"rl": False, "warmup_steps": 0, "graphs": False},
}
"""The settings of both image baselines: their papers', but for widths that a CPU can train in minutes."""


def lsgan(logits: Tensor, real: bool) -> Tensor:
    """Return mean (D(.) - 1)^2, what makes D call its input real, or mean D(.)^2 (Mao et al. 2017, eq. 9)."""
    return (logits - 1.0 if real else logits).square().mean()


def disc_loss(d: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return what D descends: half of mean (D(real) - 1)^2 + mean D(fake)^2 (Zhu et al. 2017, section 4 and 7.1).

    real, fake: (n,3,H,W) and (m,3,H,W). No norm looks at several images, so D runs once over both.
    """
    of_real, of_fake = d(torch.cat((real, fake))).split((len(real), len(fake)))
    return 0.5 * (lsgan(of_real, True) + lsgan(of_fake, False))


class ImagePool:
    """The last images that a generator made, so that D does not forget them (Shrivastava et al. 2017, section 2.3).

    While it is not full, it takes every image and gives it back. Then, with probability 1/2, it gives back an earlier
    one, and the new image takes its place (CycleGAN's `ImagePool`).
    """

    def __init__(self, size: int = POOL_SIZE) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def query(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return images (n,3,H,W) for D in place of new ones; they carry no gradient."""
        chosen = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif rng.random() < 0.5:
                place = int(rng.integers(self.size))
                image, self.images[place] = self.images[place], image.clone()
            chosen.append(image)
        return torch.stack(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the images."""
        return {"images": list(self.images)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the images of a `state_dict`."""
        self.images = [image.clone() for image in state["images"]]


class ImageNets(nn.Module):
    """The networks of an image baseline: two generators and two discriminators."""

    g_x: ImageGenerator
    g_y: ImageGenerator
    d_x: PatchDiscriminator
    d_y: PatchDiscriminator

    def __init__(self, config: Config, *, discriminators: bool = True) -> None:
        super().__init__()
        self.g_x, self.g_y = (ImageGenerator(config.model.widths) for _ in range(2))
        if discriminators:
            self.d_x, self.d_y = (PatchDiscriminator(config.model.disc_widths) for _ in range(2))


class Made(NamedTuple):
    """What the generators made in a step for D to see, of both domains."""

    disc_y: Tensor  # (n,3,H,W)
    disc_x: Tensor


class ImageGan(ABC):
    """Train an image baseline; `rlv2v.method.trainer.Trainer` says what training calls.

    A step shows each replica k neighbouring frames of each of its clips of X, and as many of the target domain: of its
    clips of Y and Z, and, for k = 1, of its stills of S. All of them are drawn by (seed, step, replica).
    """

    frames: ClassVar[int] = 1
    """k, the neighbouring frames of a clip that a step looks at."""
    nets_type: ClassVar[type[ImageNets]] = ImageNets
    descended: ClassVar[tuple[str, ...]] = ("g_x", "g_y")
    """The networks that descend `generator_losses`."""

    def __init__(self, config: Config, device: torch.device, rank: int = 0, num_ranks: int = 1) -> None:
        self.config, self.device = config, device
        share = config.runtime.replicas // num_ranks
        self.replicas = range(rank * share, (rank + 1) * share)
        torch.manual_seed(config.seed)
        self.nets = self.nets_type(config).to(device)
        self.average = self.nets_type(config, discriminators=False).to(device) if config.optim.average else None
        self.schedule = Schedule(config, device)
        self.pools = [{name: ImagePool() for name in ("pool_x", "pool_y")} for _ in self.replicas]
        optim = config.optim

        def optimizer_step(names: tuple[str, ...], lr: float, suffix: str) -> OptimizerStep:
            weights = [p for name in names for p in getattr(self.nets, name).parameters()]
            adam = Adam(weights, lr, optim.betas, weight_decay=optim.weight_decay, fused=True)
            return OptimizerStep(adam, optim.clip_grad, config, suffix)

        self.optimizer_steps = {
            "generators": optimizer_step(self.descended, optim.lr, ""),
            "discriminators": optimizer_step(("d_x", "d_y"), optim.disc_lr, "_d"),
        }

    @staticmethod
    @abstractmethod
    def generator_losses(nets: Any, x: Tensor, y: Tensor, config: Config) -> tuple[dict[str, Tensor], Made]:
        """Return the weighted terms that the generators descend, by name; x, y are frames (n,k,3,H,W)."""

    @staticmethod
    def discriminator_losses(nets: Any, x: Tensor, y: Tensor, made_x: Tensor, made_y: Tensor) -> dict[str, Tensor]:
        """Return what the discriminators descend, by name; x, y are frames (n,k,3,H,W), the others are of pools."""
        return {
            "d_y": disc_loss(nets.d_y, y.flatten(0, 1), made_y),
            "d_x": disc_loss(nets.d_x, x.flatten(0, 1), made_x),
        }

    @property
    def generators(self) -> Generators:
        """The networks that translate: the last ones, or with `--average` the average of their weights."""
        return self.average or self.nets

    def pretrain(self, dataset: Dataset, world: World, stop: Callable[[], bool]) -> bool:
        """Give all ranks the same networks; there is no pre-training."""
        world.broadcast_parameters(self.nets)
        if self.average:
            self.average.load_state_dict({key: self.nets.state_dict()[key] for key in self.average.state_dict()})
        return True

    def pick(self, clips: Clips, rngs: list[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Return frames of X and as many of the target domain, two (n,k,3,H,W)."""

        def shares(videos: Tensor | None) -> list[list[Tensor]]:
            if videos is None or videos.shape[1] < self.frames:
                return [[] for _ in rngs]
            return [list(share) for share in videos.unflatten(0, (len(rngs), -1))]

        def some_frames(video: Tensor, rng: np.random.Generator) -> Tensor:
            start = int(rng.integers(len(video) - self.frames + 1))
            return video[start : start + self.frames]

        of_x, of_y = list[Tensor](), list[Tensor]()
        for xs, *others, rng in zip(shares(clips.x), *map(shares, (clips.y, clips.z, clips.s)), rngs, strict=True):
            of_x += [some_frames(video, rng) for video in xs]
            targets = [video for videos in others for video in videos]
            of_y += [some_frames(targets[int(rng.integers(len(targets)))], rng) for _ in xs]
        return torch.stack(of_x), torch.stack(of_y)

    def step(self, clips: Clips, book_time: BookTime = no_timing) -> Logs:
        """Run one step on this rank's clips: the generators', then the discriminators'; return the logs."""
        config, nets, schedule = self.config, self.nets, self.schedule
        rngs = [np.random.default_rng([config.seed, schedule.step, 1 + replica]) for replica in self.replicas]
        for optimizer_step in self.optimizer_steps.values():
            optimizer_step.set_rate(schedule.lr_factor)
        x, y = self.pick(clips, rngs)

        with frozen(nets.d_x, nets.d_y), autocast(config, self.device):
            terms, made = self.generator_losses(nets, x, y, config)
        loss = torch.stack(list(terms.values())).sum()
        logs = terms | self.optimizer_steps["generators"](loss, "generators", book_time)
        if self.average:
            for name in ("g_x", "g_y"):
                polyak(getattr(self.average, name), getattr(nets, name), 1.0 - config.optim.average)
        book_time("generators")

        def pooled(name: str, images: Tensor) -> Tensor:
            shares = images.unflatten(0, (len(rngs), -1))
            queried = [pool[name].query(*of_one) for pool, *of_one in zip(self.pools, shares, rngs, strict=True)]
            return torch.cat(queried)

        made_y, made_x = pooled("pool_y", made.disc_y), pooled("pool_x", made.disc_x)
        with autocast(config, self.device):
            terms = self.discriminator_losses(nets, x, y, made_x, made_y)
        loss = torch.stack(list(terms.values())).sum()
        logs |= terms | self.optimizer_steps["discriminators"](loss, "discriminators", book_time)
        book_time("discriminators")

        return {name: value.detach() for name, value in logs.items()}

    def advance(self, seconds: float) -> Logs:
        """End a step, `seconds` into the run."""
        self.schedule.advance(seconds)
        return {}

    @property
    def state_parts(self) -> Mapping[str, Any]:
        """The parts of the state that are the same on every rank, by name."""
        parts: dict[str, Any] = {"nets": self.nets, "schedule": self.schedule}
        parts |= {"average": self.average} if self.average else {}
        for name, optimizer_step in self.optimizer_steps.items():
            parts |= {f"adam_{name}": optimizer_step.optimiser, f"scaler_{name}": optimizer_step.scaler}
        return parts

    def replays(self) -> Mapping[int, Mapping[str, Any]]:
        """Return the pools of each of this rank's replicas, by name."""
        return dict(zip(self.replicas, self.pools, strict=True))

    def flush(self) -> None:  # noqa: B027
        """Do nothing: a step leaves nothing for later."""

    @classmethod
    def footprint(cls, config: Config) -> Footprint:
        """Return what a run holds in memory: the networks once, and the two phases of a step."""

        def some_frames(num_replicas: int) -> Tensor:
            size = config.data.size
            return torch.rand(num_replicas * config.data.batch_x, cls.frames, 3, size.height, size.width) * 2 - 1

        def generators(nets: Any, config: Config, num_replicas: int) -> Callable[[], Tensor]:
            x, y = some_frames(num_replicas), some_frames(num_replicas)
            return lambda: torch.stack(list(cls.generator_losses(nets, x, y, config)[0].values())).sum()

        def discriminators(nets: Any, config: Config, num_replicas: int) -> Callable[[], Tensor]:
            x, y = some_frames(num_replicas), some_frames(num_replicas)
            made = (frames.flatten(0, 1) for frames in (x, y))
            losses = cls.discriminator_losses
            return lambda: torch.stack(list(losses(nets, x, y, *made).values())).sum()

        phases = {
            "generators": Phase(cls.descended, generators),
            "discriminators": Phase(("d_x", "d_y"), discriminators),
        }
        return Footprint(lambda: cls.nets_type(config), phases, ("g_x", "g_y") if config.optim.average else ())
