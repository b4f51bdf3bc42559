"""What a training step needs, and the longest clips and largest batch that fit a card.

    python bench/memory.py --preset workstation [--size 128 --frames 16 --memory frames ...] [--json F]

Bytes by weights, gradients, optimiser, activations and workspace: counted (`rlv2v.memory`) everywhere, and on a GPU
also measured, as the allocator's own peak over real steps. Then, counted, what fits a card of `--card` GB at three
sizes, with each way to keep memory. Flags are those of the training; all that is counted is of one rank.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine

from rlv2v.algorithm import Algorithm, autocast
from rlv2v.checkpoint import build_nets
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.ghosts import CPU
from rlv2v.memory import CONTEXT_BYTES, FRAGMENTATION, GB, RUN, altered, count, estimate, largest, some_clips
from rlv2v.model.parts import MEMORY

SIZES = (64, 128, 256)
ROUNDS = 5  # the first warms up
NUM_STEPS = 3  # until every optimiser has its moments, and each domain had its turn
Row = dict[str, Any]


@dataclass(frozen=True)
class Args(Config):
    """Count what a step of these settings needs; the flags of the training, and three more."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    card: float = 8.0
    """Memory of the card that shall be filled, GB (1e9 bytes); 0: no table of what fits."""
    timed: bool = False
    """Time a generator step that keeps memory in each way, on this CPU, one thread."""


def row(case: str, backend: str, config: Config, **found: Any) -> Row:
    return {"case": case, "backend": backend, "pass": config.memory, "dtype": config.precision} | found


def counted(config: Config, share: int) -> Row:
    """The count, printed."""
    found = estimate(config, num_replicas=share)
    print(f"counted, a rank's step of {config.preset}, {config.size}x{config.size}, T={config.frames}, MB")
    for name, size in found._asdict().items():
        print(f"    {name:12} {size / 1e6:10.1f}")
    print(f"    {'with reserve':12} {found.reserved / 1e6:10.1f}", flush=True)
    case = f"step {config.size}x{config.size} T={config.frames}"
    return row(case, "counted", config, **found._asdict(), with_reserve=found.reserved)


def measured(config: Config, share: int) -> Row:
    """The peak of the CUDA allocator over real steps, of what was asked of it and of what it holds."""
    device = torch.device("cuda")
    algorithm = Algorithm(replace(config, replicas=share), device)
    for number in range(NUM_STEPS * config.rl_every * 2):
        if number == config.rl_every * 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            clips = some_clips(config, share)
        algorithm.advance(float(number), algorithm.step(clips).pop("distance"))
    torch.cuda.synchronize()
    total, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(f"measured: {total / 1e6:.1f} MB allocated at the peak, {held / 1e6:.1f} MB held", flush=True)
    case = f"step {config.size}x{config.size} T={config.frames}"
    return row(case, "measured", config, total=total, held=held)


def timed(config: Config) -> list[Row]:
    """A generator step on this CPU, forward and backward, keeping memory in each way; processor time, in turns."""
    times: dict[str, list[float]] = {memory: [] for memory in MEMORY}
    steps = {}
    for memory in MEMORY:
        nets = build_nets(of(config, memory))
        steps[memory] = RUN["generators"](nets, of(config, memory), 1)
    for _ in range(ROUNDS):
        for memory, step in steps.items():
            began = time.process_time()
            with autocast(config, CPU):
                loss = step()
            loss.backward()
            times[memory].append(time.process_time() - began)
    rows = []
    case = f"generators {config.size}x{config.size} T={config.frames}"
    for memory in MEMORY:
        peak = count(of(config, memory), "generators").peak
        p20, p50, p80 = statistics.quantiles(times[memory][1:], n=10)[1::3]
        ratio = p50 / statistics.median(times["store"][1:])
        print(
            f"{case} | {memory:9} | {peak / 1e6:8.1f} MB | {p50:6.2f} s | {ratio:5.2f} x the time of store", flush=True
        )
        found = {"median_us": round(p50 * 1e6), "p20_us": round(p20 * 1e6), "p80_us": round(p80 * 1e6)}
        rows.append(row(case, "cpu", of(config, memory), **found, peak=peak, time_ratio=round(ratio, 2)))
    return rows


def of(config: Config, memory: str) -> Config:
    return altered(config, memory=memory)


def fitting(config: Config, card: int) -> list[Row]:
    """The longest clips at the config's batch, and its largest multiple at T=16, by size and memory."""
    print(f"largest T | batch factor at T=16, that fit {card / GB:g} GB, the reserve included; from two counts each")
    rows = []
    for size in SIZES:
        for memory in MEMORY:
            config = replace(of(config, memory), size=size)
            frames = largest(replace(config, frames=64), card, over="frames", confirm=False)
            batch = largest(replace(config, frames=16), card, over="batch", confirm=False)
            print(f"    {size:3}x{size:<3} | {memory:9} | {frames:5} | {batch:4}", flush=True)
            rows.append(row(f"fits {size}x{size}", "counted", config, card=card, frames=frames, batch_factor=batch))
    return rows


def main(args: Args) -> None:
    """All tables, and the JSON line."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    args.check()
    share = args.replicas or 1
    print(
        f"reserve, assumed: {CONTEXT_BYTES / GB:g} GB for context and libraries, {FRAGMENTATION:.0%} for fragmentation"
    )
    rows = [counted(args, share)]
    if torch.cuda.is_available():
        rows.append(measured(args, share))
    if args.timed:
        torch.set_num_threads(1)
        rows += timed(Config.of("default", size=64, frames=16))
    if args.card:
        rows += fitting(args, int(args.card * GB))
    assumed = {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION}
    text = json.dumps({"bench": "memory", "commit": commit(), "machine": machine(), "assumed": assumed, "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


def start(arguments: list[str]) -> Args:
    """Where the flags start: the workstation, unless a preset is named."""
    named = any(argument.split("=")[0] == "--preset" for argument in arguments)
    found = Args.from_arguments(arguments if named else ["--preset", "workstation", *arguments])
    assert isinstance(found, Args)
    return found


if __name__ == "__main__":
    run_command(main, Args, start)
