"""One rank of tests/test_bench_scaling.py: what it gives torch.distributed in each step, left in `OUT`.

python scaling_worker.py CONFIG.json OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from scaling_trace import cycle, random_clips

from rlv2v.config import Config
from rlv2v.method.step import Algorithm
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.nan_guard import NanGuard


def main(given: Path, out: Path) -> None:
    torch.set_num_threads(1)
    config = Config.from_json(given.read_text(), str(given))
    world, given_away = dist.connect("cpu"), list[tuple[str, int]]()
    real = {name: getattr(dist.dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            given_away.append((name, tensor.numel() * tensor.element_size()))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist.dist, name, counting(name))
    algorithm = Algorithm(config, world.device, rank=world.rank, num_ranks=world.size)
    algorithm.start()
    clips, watch, steps = random_clips(config), NanGuard(world.device), []
    for _ in range(2 * cycle(config)):
        given_away.clear()
        told = algorithm.step(clips)
        told |= algorithm.advance(0.0, told.pop("distance"))
        watch.record(algorithm.schedule.step, told)
        world.all_agree(dist.StepControl(False, 0.0, False))
        steps.append(list(given_away))
    if world.first:
        out.write_text(json.dumps(steps[cycle(config) :]))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
