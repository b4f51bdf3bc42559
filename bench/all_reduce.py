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
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Bench, Call, Contender, TimedArgs, compare, run_python, wall_us

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.model.build import build_nets
from rlv2v.runtime.distributed import Reducer, connect, gather, mean


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time the all-reduce of gradients."""

    widths: tuple[int, ...] = (16, 32, 48)
    """Of the generators, whose gradients travel; more or wider ones for more bytes."""


def rank(out: Path, rounds: int, widths: list[int]) -> None:
    """Time both forms in turns as one rank; rank 0 writes the rows."""
    world, config = connect("cpu"), Config.of("default", widths=tuple(widths))
    weights = list(build_nets(config, discriminators=False).parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    reducer, flat = Reducer(weights), torch.ones(sum(weight.numel() for weight in weights))
    work = {"gb_s": float(flat.nbytes)}
    forms = [
        Contender("Reducer", reducer.finish, work=work, setup=world.barrier, ours=True),
        Contender("flat", lambda: mean(flat), work=work, setup=world.barrier),
    ]

    def slower_us(call: Call) -> float:
        return gather(torch.tensor([wall_us(call)], dtype=torch.float64)).max().item()

    rows = compare(f"{flat.nbytes} bytes, 2 ranks", "all_reduce", forms, rounds, slower_us)
    if world.first:
        out.write_text(json.dumps(rows))
    world.close()


def main(args: Args) -> None:
    """Start two ranks, print what they found and the JSON line."""
    with Bench("all_reduce", args) as bench, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__)
        run_python(*ranks, out, args.num_rounds, *args.widths, threads=args.threads)
        bench.add(json.loads(out.read_text()), ranks=2)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]), int(sys.argv[2]), [int(width) for width in sys.argv[3:]])
    else:
        run_command(main, Args)
