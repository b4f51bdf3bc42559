"""A batch of clips as the networks see it, and the one rule by which training makes batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlv2v.data import to_model
from rlv2v.data.index import Dataset
from rlv2v.data.loader import Batch, Loader
from rlv2v.runtime.device import on_device
from rlv2v.runtime.distributed import World

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config


class Clips(NamedTuple):
    """A batch as the networks see it, in [-1,1]; None where the dataset has no such set."""

    x: Tensor  # (B,T,3,H,W)
    y: Tensor  # (B,T,3,H,W)
    z: Tensor | None  # (B,T,3,H,W)
    s: Tensor | None  # stills, (B,1,3,H,W)
    pool_x: Tensor | None = None  # more clips, at which statistics alone look, (B',T,3,H,W); None: no more
    pool_yz: Tensor | None = None

    @property
    def yz(self) -> Tensor:
        """The clips of Y and then those of Z."""
        return self.y if self.z is None else torch.cat((self.y, self.z))

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, pool: int = 0, replicas: int = 1) -> Clips:
        """Move a loader's batch to the device; the last `pool` clips of each replica and set are for statistics."""

        def shares(frames: Tensor | None) -> list[Tensor]:
            return [] if frames is None else [to_model(on_device(frames, device)).unflatten(0, (replicas, -1))]

        def first(sets: list[Tensor]) -> Tensor | None:
            return sets[0][:, : sets[0].shape[1] - pool].flatten(0, 1) if sets else None

        def rest(sets: list[Tensor]) -> Tensor | None:
            return torch.cat([share[:, share.shape[1] - pool :] for share in sets], 1).flatten(0, 1) if pool else None

        x, y, z = shares(batch.x), shares(batch.y), shares(batch.z)
        own_x, own_y = first(x), first(y)
        assert own_x is not None and own_y is not None
        stills = None if batch.s is None else to_model(on_device(batch.s, device)[:, None])
        return cls(own_x, own_y, first(z), stills, rest(x), rest(y + z))


def pool_size(config: Config) -> int:
    """Return the clips of each set of videos that a replica takes for statistics alone."""
    return config.data.batch_pool if config.loss.term("patches") else 0


def batch_sizes(config: Config, num_replicas: int, *, has_z: bool) -> dict[str, int]:
    """Return the clips of each set in a step of `num_replicas` replicas: twice as many of Y where there is no Z."""
    data = config.data
    pool = pool_size(config)
    sizes = {
        "x": data.batch_x + pool,
        "y": data.batch_y * (1 if has_z else 2) + pool,
        "z": data.batch_z + pool,
        "s": data.batch_s,
    }
    return {name: num_replicas * size for name, size in sizes.items()}


def make_loader(config: Config, dataset: Dataset, world: World, *, stills: bool = True) -> Loader:
    """Return the loader of this rank's share of every batch, from step 0 on; `stills=False` leaves S out."""
    data = config.data
    batch = batch_sizes(config, config.runtime.replicas // world.size, has_z=bool(dataset.sets["z"]))
    return Loader(
        dataset,
        batch=batch if stills else batch | {"s": 0},
        frames=data.frames,
        size=data.size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        augment=data.augment,
        threads=data.loader_threads,
        device=data.decode,
    )
