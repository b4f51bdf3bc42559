"""One rank of test_ranks.py in float64: it makes some steps of a run's algorithm and leaves its weights in `OUT`.

python ranks_worker.py DATA OUT FLAGS...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data import to_model
from rlv2v.data.index import open_dataset
from rlv2v.data.loader import Loader
from rlv2v.method import collector
from rlv2v.method.clips import Clips
from rlv2v.method.step import Algorithm
from rlv2v.runtime import distributed as dist

STEPS = 5


def double(frames: Tensor) -> Tensor:
    return to_model(frames).double()


def main(data: Path, out: Path, preset: str) -> None:
    torch.set_num_threads(1)
    collector.to_model = double  # type: ignore[attr-defined]
    world = dist.connect("cpu")
    small = {"size": 16, "frames": 4, "rl_every": 1, "steps": 2 * STEPS, "replicas": 2, "replay_alpha": 0.6}
    config = Config.of(preset, widths=(4, 8), disc_widths=(4, 8, 8), **small).check()
    share = 2 // world.size
    loader = Loader(
        open_dataset(data, frames=4),
        batch={name: share * getattr(config.data, f"batch_{name}") for name in "xyzs"},
        frames=4,
        size=16,
        seed=0,
        rank=world.rank,
        world_size=world.size,
    )
    algorithm = Algorithm(config, world.device, rank=world.rank, num_ranks=world.size)
    for nets in (algorithm.nets, algorithm.targets, algorithm.average):
        nets.double()
    algorithm.start()
    for _ in range(STEPS):
        sets = [getattr(clips, name) for clips in [Clips.of(next(loader), world.device)] for name in "xyzs"]
        algorithm.step(Clips(*(s.double() for s in sets)))
        algorithm.advance(0.0)
    loader.close()
    if world.first:
        torch.save({name: algorithm.state_parts[name].state_dict() for name in ("nets", "targets", "average")}, out)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
