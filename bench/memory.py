"""Count what a training step needs, and the longest clips and largest batch that fit a card.

    python bench/memory.py --preset workstation [--size 128 --frames 16 --memory frames ...] [--json F]

Bytes by weights, gradients, optimiser, activations and workspace: counted (`rlv2v.memory`) everywhere, and on a GPU
also measured, as the allocator's own peak over real steps, with CUDA graphs and without. Then, counted, what fits a
card of `--card` GB at `--sizes`, with each way to keep activations; with `--confirm` a GPU runs steps of that in as
much memory as such a card leaves. Flags are those of the training; all counts are of one rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import Bench, Contender, Row, compare
from torch import Tensor

from rlv2v.algorithm import Algorithm, autocast
from rlv2v.checkpoint import build_nets
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.device import grow_segments
from rlv2v.errors import UserError
from rlv2v.ghosts import CPU
from rlv2v.graphs import NUM_PLAIN
from rlv2v.memory import CONTEXT_BYTES, FRAGMENTATION, GB, RUN, altered, count, estimate, largest, scaled, some_clips
from rlv2v.model.parts import MEMORY

ROUNDS = 4
"""Of the timed generator steps."""


@dataclass(frozen=True)
class Args(Config):
    """Count what a step of these settings needs; the flags of the training, and some more."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists; written after each case."""
    card: float = 8.0
    """Memory of the card to fill, GB (1e9 bytes); 0: no table of what fits."""
    sizes: tuple[int, ...] = (64, 128, 256)
    """Sides of the frames in that table, pixels."""
    confirm: bool = False
    """Run, on this GPU, steps of what the table says fits, in the memory that such a card has beside a context."""
    timed: bool = False
    """Time a generator step with each way to keep activations, on this CPU, one thread."""
    quick: bool = False
    """About a minute: what fits at the first size only."""


def row_of(case: str, backend: str, config: Config, **fields: Any) -> Row:
    """Return a row of counts."""
    return {"case": case, "backend": backend, "pass": config.memory, "dtype": config.precision, "ours": True} | fields


def name_of(config: Config) -> str:
    """Return the name of a step's case."""
    return f"step {config.size}x{config.size} T={config.frames}"


def counted_row(config: Config, num_replicas: int) -> Row:
    """Count one step and print the bytes by what they are for."""
    counts = estimate(config, num_replicas=num_replicas)
    print(f"counted, a rank's step of {config.preset}, {config.size}x{config.size}, T={config.frames}, MB")
    fields = counts._asdict() | {"with_reserve": counts.reserved}
    for name, size in fields.items():
        print(f"    {name:12} {size / 1e6:10.1f}", flush=True)
    return row_of(name_of(config), "counted", config, **fields)


def run_steps(config: Config, num_replicas: int, num: int, settled: int = 0) -> None:
    """Take steps on this GPU; after `settled` of them the peaks count anew."""
    device = torch.device("cuda")
    algorithm = Algorithm(replace(config, replicas=num_replicas), device)
    for number in range(num):
        if number == settled:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            clips = some_clips(config, num_replicas)
        algorithm.advance(float(number), algorithm.step(clips).pop("distance"))
    torch.cuda.synchronize()


def release() -> None:
    """Give back the GPU memory of earlier steps."""
    torch.cuda.init()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measured_row(config: Config, num_replicas: int) -> Row:
    """Measure the peak of the CUDA allocator over real steps: what was allocated and what it holds."""
    release()
    steps_of_round = 2 * config.rl_every  # in which each domain has its turn
    settled = steps_of_round * (NUM_PLAIN + 1 if config.graphs else 1)  # moments exist, every phase is recorded
    run_steps(config, num_replicas, settled + 2 * steps_of_round, settled)
    held, (free, total) = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
    fields = {"held": held, "beside": total - free - torch.cuda.memory_reserved()}
    if not config.graphs:  # what a replay uses is not allocated anew
        fields["total"] = torch.cuda.max_memory_allocated()
    graphs = "graphs" if config.graphs else "no graphs"
    print(f"measured, {graphs}, MB: { ({name: round(size / 1e6, 1) for name, size in fields.items()}) }", flush=True)
    return row_of(f"{name_of(config)}, {graphs}", "measured", config, **fields)


def runs_within(config: Config, num_replicas: int, card: int) -> bool:
    """Return whether steps with transitions of either domain run in what a card has beside `CONTEXT_BYTES`."""
    release()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card - CONTEXT_BYTES) / total))
    try:
        run_steps(config, num_replicas, config.rl_every + 1)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


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
        changed = altered(config, memory=memory)
        forward = RUN["generators"](build_nets(changed), changed, 1)
        fields = {"peak": count(changed, "generators").peak}
        call = lambda forward=forward: step(forward)  # noqa: E731
        contenders.append(Contender(memory, call, config.precision, ours=memory != "store", fields=fields))
    return compare(f"generators {config.size}x{config.size} T={config.frames}", "cpu", contenders, ROUNDS, process_us)


def fitting_rows(args: Args, size: int, num_replicas: int) -> list[Row]:
    """Return the longest clips at the config's batch, and its largest multiple at T=16, for each way."""
    card, rows = int(args.card * GB), list[Row]()
    for memory in MEMORY:
        config = replace(altered(args, memory=memory), size=size)
        longest, widest = replace(config, frames=64), replace(config, frames=16)
        frames = largest(longest, card, over="frames", num_replicas=num_replicas, confirm=False)
        batch = largest(widest, card, over="batch", num_replicas=num_replicas, confirm=False)
        fields = {"frames": frames, "batch_factor": batch}
        if args.confirm:
            trials = {"frames": scaled(longest, "frames", frames), "batch_factor": scaled(widest, "batch", batch)}
            fields |= {f"{k}_ran": runs_within(trial, num_replicas, card) for k, trial in trials.items() if fields[k]}
        print(f"fits {card / GB:g} GB, {size}x{size}, {memory}: {fields}", flush=True)
        rows.append(row_of(f"fits {size}x{size}", "counted", config, card=card, **fields))
    return rows


def main(args: Args) -> None:
    """Print all tables, and the JSON line."""
    args.check()
    if args.confirm and not torch.cuda.is_available():
        raise UserError("--confirm: PyTorch sees no GPU")
    num_replicas = args.replicas or 1
    reserve = {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION}
    with Bench("memory", args, reserve=reserve) as bench:
        bench.add([counted_row(args, num_replicas)])
        if torch.cuda.is_available():
            grow_segments()
            for graphs in () if args.confirm else (False, True):
                bench.add([measured_row(replace(args, graphs=graphs), num_replicas)])
        if args.timed:
            torch.set_num_threads(1)
            bench.add(timed_rows(Config.of("default", size=64, frames=16)))
        for size in (args.sizes[:1] if args.quick else args.sizes) if args.card else ():
            bench.add(fitting_rows(args, size, num_replicas))


def start(arguments: list[str]) -> Args:
    """Return the defaults of the flags: the workstation preset, unless one is named."""
    named = any(argument.split("=")[0] == "--preset" for argument in arguments)
    args = Args.from_arguments(arguments if named else ["--preset", "workstation", *arguments])
    assert isinstance(args, Args)
    return args


if __name__ == "__main__":
    run_command(main, Args, start)
