"""One rank of bench/scaling.py, started by torchrun: times steps of training, or all-reduces.

python scaling_ranks.py JOB.json OUT.json
JOB: {"what": "all_reduce", "sizes": [bytes], "repeats": n, "device": ...} or
     {"what": "step", "config": text of Config.to_json, "cycles": n, "device": ...}
OUT: what rank 0 found: `time_all_reduces` or `time_steps`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scaling_trace import cycle, random_clips
from torch import Tensor

from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.step import Algorithm
from rlv2v.runtime.cuda_graphs import NUM_PLAIN
from rlv2v.runtime.distributed import Reducer, StepControl, World, connect, gather
from rlv2v.runtime.nan_guard import NanGuard
from rlv2v.runtime.timer import StepTimer

Job = dict[str, Any]
LENGTH = 1_000_000  # steps of a run of which a bench sees the beginning


def run_jobs(jobs: Sequence[Job], num_ranks: int) -> list[Any]:
    """What rank 0 of each job found; they run at the same time, `num_ranks` each. UserError if one failed."""
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
    """Seconds by size of the mean over ranks of one gradient, through the Reducer that training uses; sizes in turn."""
    reducers, times = {}, {str(size): list[float]() for size in job["sizes"]}
    for size in job["sizes"]:
        weight = torch.zeros(size // 4, device=world.device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        reducers[str(size)] = Reducer([weight])
    for repeat in range(job["repeats"] + 3):  # the first arranges the buckets, the next have their memory to find
        for name, reducer in reducers.items():
            wait(world.device)
            world.barrier()
            began = time.perf_counter()
            reducer.finish()
            wait(world.device)
            if repeat >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: slowest(found, world) for name, found in times.items()}


def time_steps(job: Job, world: World) -> dict[str, Any]:
    """Seconds of a step, the mean of each cycle of steps, and of its parts, the mean of all."""
    config = Config.from_json(job["config"], "JOB")
    config = config.replace(replicas=world.size, steps=LENGTH, budget=None)
    device = world.device
    algorithm = Algorithm(config, device, rank=world.rank, num_ranks=world.size)
    algorithm.start()
    torch.manual_seed(world.rank)
    clips = random_clips(config, device)
    watch, clock, found = NanGuard(device), StepTimer(device), list[float]()
    warm = NUM_PLAIN + 1 if config.runtime.graphs and device.type == "cuda" else 1  # until every phase is recorded
    for number in range(job["cycles"] + warm):
        wait(device)
        if number == warm:
            watch.read(everything=True)
            clock.read()
            world.barrier()
        began = time.perf_counter()
        for _ in range(cycle(config)):
            told = algorithm.step(clips, clock.mark)
            control = world.all_agree(StepControl(False, 0.0, False))
            told |= algorithm.advance(control.seconds, told.pop("distance"))
            watch.record(algorithm.schedule.step, told)
            clock.step()
            watch.read()
            clock.mark("host")
        wait(device)
        if number >= warm:
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
