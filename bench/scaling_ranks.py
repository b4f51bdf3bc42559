"""One rank of bench/scaling.py, started by torchrun: times steps of training, or all-reduces; rank 0 writes what it found.

python scaling_ranks.py JOB.json OUT.json
JOB: {"what": "all_reduce", "sizes": [bytes], "repeats": n, "device": ...} or
     {"what": "step", "preset": ..., "changes": {...}, "batch": factor, "cycles": n, "device": ...}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scaling_trace import cycle, random_clips
from torch import Tensor

from rlv2v.algorithm import Algorithm
from rlv2v.config import Config
from rlv2v.dist import Orders, Reducer, World, connect, gather
from rlv2v.errors import UserError
from rlv2v.health import Watch
from rlv2v.objective import Clips
from rlv2v.timing import Clock

Job = dict[str, Any]
CONVERGED = 1_000_000  # steps of a run that a bench sees the beginning of: schedules stand still


def run_job(job: Job, num_ranks: int) -> Any:
    """What rank 0 of a job of `num_ranks` found. UserError if it failed."""
    return run_jobs([job], num_ranks)[0]


def run_jobs(jobs: Sequence[Job], num_ranks: int) -> list[Any]:
    """The same of jobs that run at the same time, each of `num_ranks` that know nothing of the others'."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, job in enumerate(jobs):
            given, out = Path(folder) / f"job-{number}.json", Path(folder) / f"out-{number}.json"
            given.write_text(json.dumps(job))
            arguments = [*line, __file__, str(given), str(out)]
            process = subprocess.Popen(
                arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            started.append((process, out))
        said = [process.communicate()[1] for process, _ in started]
        for (process, _), text in zip(started, said, strict=True):
            if process.returncode:
                raise UserError(f"a bench of {num_ranks} ranks failed: {text.strip()[-2000:]}")
        return [json.loads(out.read_text()) for _, out in started]


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(seconds: Sequence[float], world: World) -> list[float]:
    """Of each time the largest over the ranks."""
    if world.size == 1:
        return list(seconds)
    mine = torch.tensor(seconds, dtype=torch.float64, device=world.device)
    every: Tensor = gather(mine[None])
    return every.max(0).values.tolist()


def time_all_reduces(job: Job, world: World) -> dict[str, list[float]]:
    """Seconds by size of the mean over ranks of one gradient, through the Reducer that training uses."""
    times = {}
    for size in job["sizes"]:
        weight = torch.zeros(size // 4, device=world.device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        reducer, found = Reducer([weight]), []
        for repeat in range(job["repeats"] + 2):
            wait(world.device)
            world.meet()
            began = time.perf_counter()
            reducer.finish()
            wait(world.device)
            if repeat >= 2:  # the first arranges the buckets, the second has its memory to find
                found.append(time.perf_counter() - began)
        reducer.close()
        times[str(size)] = slowest(found, world)
    return times


def batch_times(config: Config, factor: int) -> Config:
    """The config with `factor` times the clips, stills and transitions a step."""
    names = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")
    return replace(config, **{name: factor * getattr(config, name) for name in names})


def time_steps(job: Job, world: World) -> dict[str, Any]:
    """Seconds of a step, the mean of each cycle of steps, and of its parts, the mean of all."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in job["changes"].items()}
    config = batch_times(Config.of(job["preset"], **changes), job["batch"])
    config = replace(config, replicas=world.size, steps=CONVERGED, budget=None).check()
    device = world.device
    algorithm = Algorithm(config, device, rank=world.rank, num_ranks=world.size)
    algorithm.start()
    torch.manual_seed(world.rank)
    given = random_clips(config)
    clips = Clips(*(None if s is None else s.to(device) for s in (given.x, given.y, given.z, given.s)))
    watch, clock, found = Watch(device), Clock(device), list[float]()
    for number in range(job["cycles"] + 1):
        wait(device)
        if number == 1:
            watch.read(everything=True)
            clock.read()
            world.meet()
        began = time.perf_counter()
        for _ in range(cycle(config)):
            told = algorithm.step(clips, clock.mark)
            orders = world.agree(Orders(False, 0.0, False))
            told |= algorithm.advance(orders.seconds, told.pop("distance"))
            watch.tell(algorithm.schedule.step, told)
            clock.step()
            watch.read()
            clock.mark("host")
        wait(device)
        if number:  # the first warms up
            found.append((time.perf_counter() - began) / cycle(config))
    watch.read(everything=True)
    return {"step": slowest(found, world), "parts": clock.read()}


def main(given: Path, out: Path) -> None:
    job: Job = json.loads(given.read_text())
    torch.set_num_threads(1)
    world = connect(job["device"])
    found = (time_all_reduces if job["what"] == "all_reduce" else time_steps)(job, world)
    if world.first:
        out.write_text(json.dumps(found))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
