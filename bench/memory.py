"""Count what a training step needs, and the longest clips and largest batch that fit a card.

    python bench/memory.py --preset workstation [--size 96x160 --frames 16 --memory frames] [--json F]

Bytes by weights, gradients, optimiser, activations and workspace: counted (`rlv2v.method.memory`) everywhere, on a
GPU also measured, as the allocator's own peak over real steps, with CUDA graphs and without. Then, counted, what fits a
card of `--card` GB, with each way to keep activations. All counts are of one rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import harness
import torch
from harness import Bench, Contender, Row, compare
from torch import Tensor

from rlv2v.cli import SizeFlag, run_command
from rlv2v.config import Config
from rlv2v.method.memory import CONTEXT_BYTES, FRAGMENTATION, GB, RUN, count, estimate, largest, some_clips
from rlv2v.method.optim import autocast
from rlv2v.method.step import Algorithm
from rlv2v.model.activation_memory import MEMORY
from rlv2v.model.build import build_nets
from rlv2v.runtime.cuda_graphs import NUM_PLAIN
from rlv2v.runtime.device import grow_segments
from rlv2v.runtime.memory import CPU

SIZES = (64, 128, 256)
"""Sides of the frames in the table of what fits, pixels."""
ROUNDS = 4
"""Of the timed generator steps."""


@dataclass(frozen=True)
class Args(harness.Args):
    """Count what a step of a preset needs, with some of its settings changed."""

    preset: str = "workstation"
    """Preset whose step is counted."""
    size: SizeFlag | None = None
    """Size of the crops instead of the preset's, pixels."""
    frames: int | None = None
    """Clip length T instead of the preset's."""
    memory: Literal["store", "recompute", "frames"] | None = None
    """Way to keep activations instead of the preset's."""
    card: float = 8.0
    """Memory of the card to fill, GB (1e9 bytes); 0: no table of what fits."""
    timed: bool = False
    """Time a generator step with each way to keep activations, on this CPU, one thread."""

    @property
    def config(self) -> Config:
        """The settings whose step is counted."""
        settings = {"size": self.size, "frames": self.frames, "memory": self.memory}
        given: dict[str, Any] = {flag: value for flag, value in settings.items() if value is not None}
        return Config.of(self.preset, **given).check()


def row_of(case: str, backend: str, config: Config, **fields: Any) -> Row:
    """Return a row of counts."""
    row: Row = {"case": case, "backend": backend, "pass": config.runtime.memory, "dtype": config.runtime.precision}
    return row | {"ours": True, **fields}


def name_of(config: Config) -> str:
    """Return the sizes of a step."""
    size = config.data.size
    return f"{size.height}x{size.width} T={config.data.frames}"


def counted_row(config: Config) -> Row:
    """Count the bytes of one step by what they are for."""
    counts = estimate(config)
    fields = counts._asdict() | {"with_reserve": counts.reserved}
    return row_of(f"step {name_of(config)}", "counted", config, **fields)


def measured_row(config: Config) -> Row:
    """Measure the peak of the CUDA allocator over real steps: what was allocated and what it holds."""
    torch.cuda.init()
    gc.collect()
    torch.cuda.empty_cache()
    device, steps_of_round = torch.device("cuda"), 2 * config.rl.every  # in which each domain has its turn
    settled = steps_of_round * (NUM_PLAIN + 1 if config.runtime.graphs else 1)  # moments exist, every phase is recorded
    algorithm = Algorithm(config.replace(replicas=1), device)
    for number in range(settled + 2 * steps_of_round):
        if number == settled:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with device:
            clips = some_clips(config, 1)
        algorithm.step(clips)
        algorithm.advance(float(number))
    torch.cuda.synchronize()
    held, (free, total) = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
    fields = {"held": held, "beside": total - free - torch.cuda.memory_reserved()}
    if not config.runtime.graphs:  # what a replay uses is not allocated anew
        fields["total"] = torch.cuda.max_memory_allocated()
    graphs = "graphs" if config.runtime.graphs else "no graphs"
    return row_of(f"step {name_of(config)}, {graphs}", "measured", config, **fields)


def timed_rows(config: Config) -> list[Row]:
    """Time a generator step on this CPU, forward and backward, with each way; processor time, in turns."""

    def process_us(call: Callable[[], object]) -> float:
        start = time.process_time_ns()
        call()
        return (time.process_time_ns() - start) / 1e3

    def step(forward: Callable[[], Tensor]) -> None:
        with autocast(config, CPU):
            loss = forward()
        loss.backward()

    contenders = []
    for memory in MEMORY:
        changed = config.replace(memory=memory)
        forward = RUN["generators"](build_nets(changed), changed, 1)
        fields = {"peak": count(changed, "generators").peak}
        call = lambda forward=forward: step(forward)  # noqa: E731
        contenders.append(Contender(memory, call, config.runtime.precision, ours=memory != "store", fields=fields))
    rows = compare(f"generators {name_of(config)}", "cpu", contenders, ROUNDS, process_us)
    for row in rows:
        row |= {"backend": "cpu", "pass": row["backend"]}
        row["time_ratio"] = round(row["median_us"] / rows[0]["median_us"], 3)
    return rows


def fitting_rows(args: Args, size: int) -> list[Row]:
    """Return the longest clips at the config's batch, and its largest multiple at T=16, for each way."""
    card, rows = int(args.card * GB), list[Row]()
    for memory in MEMORY:
        config = args.config.replace(memory=memory, size=size)
        fields = {
            "frames": largest(config.replace(frames=64), card, over="frames"),
            "batch_factor": largest(config.replace(frames=16), card, over="batch"),
        }
        rows.append(row_of(f"fits {size}x{size}", "counted", config, card=card, **fields))
    return rows


def main(args: Args) -> None:
    """Print all tables, and the JSON line."""
    config = args.config
    reserve = {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION}
    with Bench("memory", args, reserve=reserve) as bench:
        bench.add([counted_row(config)])
        if torch.cuda.is_available():
            grow_segments()
            for graphs in (False, True):
                bench.add([measured_row(config.replace(graphs=graphs))])
        if args.timed:
            bench.add(timed_rows(Config.of("paint", size=64, frames=16)))
        for size in (SIZES[:1] if args.quick else SIZES) if args.card else ():
            bench.add(fitting_rows(args, size))


if __name__ == "__main__":
    run_command(main, Args)
