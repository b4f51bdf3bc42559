"""Time the all-reduce of a model's gradients over two local ranks, beside one flat all-reduce of the same bytes.

    python bench/all_reduce.py [--json F] [--quick]

`Reducer` is what training uses: few buckets, filled from the gradients and copied back. `flat` is one all-reduce of one
tensor that is ready, the least that the link can take. gloo on CPUs, one thread a rank; a time is the slower rank's.
GB/s are of the gradients' bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Bench, Contender, TimedArgs, rows_of, run_python

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.model.build import build_nets
from rlv2v.runtime.distributed import Reducer, connect, gather, mean

WARM_UP = 3
"""The first call arranges the buckets, the next have their memory to find."""


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time the all-reduce of gradients."""

    widths: tuple[int, ...] = (16, 32, 48)
    """Of the generators, whose gradients travel; more or wider ones for more bytes."""


def rank(out: Path, rounds: int, widths: list[int]) -> None:
    """Time both forms in turns as one rank; rank 0 writes the microseconds of the slower one."""
    world, config = connect("cpu"), Config.of("default", widths=tuple(widths))
    weights = list(build_nets(config, discriminators=False).parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    reducer, flat = Reducer(weights), torch.ones(sum(weight.numel() for weight in weights))
    forms: dict[str, Callable[[], object]] = {"Reducer": reducer.finish, "flat": lambda: mean(flat)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + WARM_UP):
        for name, call in forms.items():
            world.barrier()
            start = time.perf_counter()
            call()
            us = 1e6 * (time.perf_counter() - start)
            slower = gather(torch.tensor([us], dtype=torch.float64)).max().item()
            if turn >= WARM_UP:
                times[name].append(slower)
    if world.first:
        out.write_text(json.dumps({"bytes": flat.nbytes, "times": times}))
    world.close()


def main(args: Args) -> None:
    """Start two ranks, print what they found and the JSON line."""
    with Bench("all_reduce", args) as bench, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__)
        run_python(*ranks, out, args.num_rounds, *args.widths, threads=args.threads)
        measured = json.loads(out.read_text())
        work = {"gb_s": float(measured["bytes"])}
        contenders = [Contender(name, work=work, ours=name == "Reducer") for name in measured["times"]]
        times = {contender.key: measured["times"][contender.name] for contender in contenders}
        bench.add(rows_of(f"{measured['bytes']} bytes, 2 ranks", "all_reduce", contenders, times), ranks=2)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]), int(sys.argv[2]), [int(width) for width in sys.argv[3:]])
    else:
        run_command(main, Args)
