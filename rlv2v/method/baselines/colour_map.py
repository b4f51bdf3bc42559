"""Colour maps: no network, fitted to unpaired clips in seconds, and hard to beat where a change of colours is enough.

    colour-map            per channel, y = mean_Y + (x - mean_X) std_Y / std_X, over all frames of a domain
    colour-map-index      the same for each frame index t of a clip; beyond T the last index's
    colour-map-transport  optimal transport of the distribution of colours for each frame index, as a 3-D table

The first two are Reinhard et al. 2001, "Color transfer between images", section 2, in RGB instead of l-alpha-beta: the
logarithm there has no black. The third is in `rlv2v.method.baselines.colour_transport`. It is fitted by index because
that is harder to beat: it can do whatever a map of whole domains can, and it solves the background of the synthetic
set, which changes along time. Every map is a function of a pixel's colour and its frame's index, so it works at a
video's own size. Both directions are fitted, and training ends after `NUM_BATCHES` batches of the loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlv2v.method.baselines.base import Method
from rlv2v.method.baselines.colour_transport import ColourTable, frame_indices, transport_table
from rlv2v.method.clips import Clips
from rlv2v.method.optim import BookTime, no_timing
from rlv2v.method.schedule import Schedule
from rlv2v.method.trainer import Footprint, Generators, Logs
from rlv2v.model.frames import State
from rlv2v.model.generator import Generator
from rlv2v.runtime.device import on_device
from rlv2v.runtime.distributed import gather

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config
    from rlv2v.data.index import Dataset
    from rlv2v.runtime.distributed import World

NUM_BATCHES = 64  # that a map is fitted to: 512 clips of X, and as many of Y and Z together
NUM_PIXELS = 64  # of each domain, frame index and batch, for the transport: 4096 in all
SETTINGS: Mapping[str, Any] = {
    **{"batch_x": 8, "batch_y": 4, "batch_z": 4, "batch_s": 1, "batch_pool": 0, "augment": "none"},
    **{"rl": False, "warmup_steps": 0, "graphs": False},
}
LEAST_STD = 0.5 / 127.5  # of a channel that has a spread at all: half of a grey level


class ColourAffine(Generator):
    """y = scale x + shift for each channel, by frame index: scale and shift are (T,3), or (1,3) for all frames.

    Its state is the number of frames seen, int64 (), not counted further than T.
    """

    any_size = True
    scale: Tensor
    shift: Tensor

    def __init__(self, num_indices: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_indices, 3))
        self.register_buffer("shift", torch.zeros(num_indices, 3))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map frames (B,T,3,H,W)."""
        indices, state = frame_indices(x, state, len(self.scale))
        scale, shift = (values[indices][:, :, None, None] for values in (self.scale, self.shift))
        return torch.addcmul(shift, scale, x).clamp(-1.0, 1.0), state


class Moments(nn.Module):
    """Sums over the pixels of a domain, by frame index: their number, the colours, and their squares; float64."""

    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, num_indices: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        for name in ("total", "square"):
            self.register_buffer(name, torch.zeros(num_indices, 3, dtype=torch.float64))

    def add(self, clips: Tensor) -> None:
        """Add clips (B,T,3,H,W); where there is one index, it stands for all T."""
        frames = clips.double()
        means = torch.stack((frames.mean((0, 3, 4)), frames.square().mean((0, 3, 4))), 1)  # (T,2,3)
        means = means if len(self.total) > 1 else means.mean(0, keepdim=True)
        self.count += 1.0
        self.total += means[:, 0]
        self.square += means[:, 1]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (T,3) each."""
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp(min=0.0).sqrt()


def affine(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return scale and shift that give `source` the mean and the standard deviation of `target` (Reinhard et al.)."""
    (mean, std), (target_mean, target_std) = source, target
    scale = torch.where(std < LEAST_STD, 1.0, target_std / std.clamp(min=LEAST_STD))
    return scale, target_mean - scale * mean


class Maps(nn.Module):
    """The two maps of a run."""

    g_x: Generator
    g_y: Generator

    def __init__(self, make: Callable[[], Generator]) -> None:
        super().__init__()
        self.g_x, self.g_y = make(), make()


class FitSchedule(Schedule):
    """The schedule of a fit: it ends after `NUM_BATCHES` steps, or as many as the config has, whatever the budget."""

    @property
    def length(self) -> tuple[str, float]:
        """The length of the run."""
        unit, length = super().length
        return "step", min(NUM_BATCHES, length) if unit == "step" else NUM_BATCHES


class ColourTrainer(ABC):
    """Fit a colour map in both directions; `rlv2v.method.trainer.Trainer` says what training calls.

    A step takes in a batch of clips: X is one domain, Y and Z, equally many of each, are the other.
    """

    def __init__(self, config: Config, device: torch.device, rank: int, num_ranks: int) -> None:
        self.config, self.device = config, device
        share = config.runtime.replicas // num_ranks
        self.replicas = range(rank * share, (rank + 1) * share)
        self.schedule: Schedule = FitSchedule(config, device)
        self.nets = self.build(config).to(device)
        self.x, self.y = (self.statistics().to(device) for _ in range(2))

    @staticmethod
    @abstractmethod
    def build(config: Config) -> Maps:
        """Return the maps of a run, which change nothing yet."""

    @abstractmethod
    def statistics(self) -> nn.Module:
        """Return what is kept of a domain's clips: a module of buffers."""

    @abstractmethod
    def take_in(self, x: Tensor, y: Tensor) -> None:
        """Take in the clips of a step, of all ranks: (B,T,3,H,W) of X, and (C,T,3,H,W) of Y and Z."""

    @abstractmethod
    def fit(self, steps: int) -> None:
        """Fit the maps to what was taken in in so many steps."""

    @property
    def generators(self) -> Generators:
        """The maps, as fitted so far."""
        if self.schedule.step:
            self.fit(self.schedule.step)
        return self.nets

    def pretrain(self, dataset: Dataset, world: World, stop: Callable[[], bool]) -> bool:
        """Do nothing: there is no pre-training."""
        return True

    def step(self, clips: Clips, book_time: BookTime = no_timing) -> Logs:
        """Take in the clips; the last step fits the maps. Return nothing: there is no loss."""
        x, *yz = (gather(videos) for videos in (clips.x, clips.y, clips.z) if videos is not None)
        self.take_in(x, torch.cat(yz))
        if self.schedule.step + 1 >= self.schedule.length[1]:
            self.fit(self.schedule.step + 1)
        book_time("generators")
        return {}

    def advance(self, seconds: float) -> Logs:
        """End a step, `seconds` into the run."""
        self.schedule.advance(seconds)
        return {}

    @property
    def state_parts(self) -> Mapping[str, Any]:
        """The parts of the state, by name."""
        return {"nets": self.nets, "schedule": self.schedule, "pixels_x": self.x, "pixels_y": self.y}

    def replays(self) -> Mapping[int, Mapping[str, Any]]:
        """Return nothing for each of this rank's replicas."""
        return {replica: {} for replica in self.replicas}

    def flush(self) -> None:  # noqa: B027
        """Do nothing: a step leaves nothing for later."""


class AffineTrainer(ColourTrainer):
    """Fit `ColourAffine`, by domain or by frame index; that is cheap enough for every step."""

    x: Moments
    y: Moments
    by_index = False

    @classmethod
    def build(cls, config: Config) -> Maps:
        """Return the maps of a run, which change nothing yet."""
        return Maps(partial(ColourAffine, config.data.frames if cls.by_index else 1))

    def statistics(self) -> Moments:
        """Return the moments of a domain that has no clips yet."""
        return Moments(self.config.data.frames if self.by_index else 1)

    def take_in(self, x: Tensor, y: Tensor) -> None:
        """Add to the moments of both domains, and fit."""
        self.x.add(x)
        self.y.add(y)
        self.fit(self.schedule.step + 1)

    def fit(self, steps: int) -> None:
        """Give each domain the moments of the other."""
        x, y = self.x.read(), self.y.read()
        for g, source, target in ((self.nets.g_y, x, y), (self.nets.g_x, y, x)):
            scale, shift = affine(source, target)
            g.load_state_dict({"scale": scale, "shift": shift})


class IndexAffineTrainer(AffineTrainer):
    """Fit `ColourAffine` by frame index."""

    by_index = True


class Pixels(nn.Module):
    """A sample of the colours of a domain, by frame index: (T, NUM_BATCHES * NUM_PIXELS, 3) in [-1,1]."""

    sample: Tensor

    def __init__(self, num_indices: int) -> None:
        super().__init__()
        self.register_buffer("sample", torch.zeros(num_indices, NUM_BATCHES * NUM_PIXELS, 3))

    def add(self, clips: Tensor, step: int, rng: np.random.Generator) -> None:
        """Put pixels of the clips (B,T,3,H,W) of a step in their place."""
        colours = clips.permute(1, 0, 3, 4, 2).flatten(1, 3)  # (T, B*H*W, 3)
        places = on_device(rng.integers(colours.shape[1], size=NUM_PIXELS), clips.device)
        self.sample[:, step * NUM_PIXELS : (step + 1) * NUM_PIXELS] = colours[:, places]


class TransportTrainer(ColourTrainer):
    """Fit `ColourTable` to samples of pixels, at the end of the run and for every checkpoint."""

    x: Pixels
    y: Pixels

    @staticmethod
    def build(config: Config) -> Maps:
        """Return the maps of a run, which change nothing yet."""
        return Maps(partial(ColourTable, config.data.frames))

    def statistics(self) -> Pixels:
        """Return the sample of a domain that has no clips yet."""
        return Pixels(self.config.data.frames)

    def take_in(self, x: Tensor, y: Tensor) -> None:
        """Add to the samples of both domains, by draws of (seed, step)."""
        step = self.schedule.step
        rng = np.random.default_rng([self.config.seed, step, 1])
        self.x.add(x, step, rng)
        self.y.add(y, step, rng)

    fitted = 0
    """Steps that the maps are fitted to; a resumed run fits them anew."""

    def fit(self, steps: int) -> None:
        """Transport the colours of each domain to the other's, index by index, by draws of (seed, index)."""
        if self.fitted == steps:
            return
        self.fitted, num = steps, steps * NUM_PIXELS
        x, y = (pixels.sample[:, :num].double().cpu().numpy() for pixels in (self.x, self.y))
        for g, source, target in ((self.nets.g_y, x, y), (self.nets.g_x, y, x)):
            tables = [transport_table(source[t], target[t], [self.config.seed, t]) for t in range(len(source))]
            g.load_state_dict({"table": torch.from_numpy(np.stack(tables))})


def colour_method(name: str, meaning: str, trainer: type[ColourTrainer]) -> Method:
    """Return the entry of a colour map."""

    def footprint(config: Config) -> Footprint:
        return Footprint(lambda: trainer.build(config), {})

    return Method(name, meaning, trainer, trainer.build, footprint, SETTINGS)


METHODS = (
    colour_method("colour-map", "mean and deviation of each colour channel (2001), fitted in seconds", AffineTrainer),
    colour_method("colour-map-index", "the same for each frame index of a clip", IndexAffineTrainer),
    colour_method("colour-map-transport", "optimal transport of colours (2007) for each index", TransportTrainer),
)
