"""What a training step needs, and the longest clips and largest batch that fit a card.

    python bench/memory.py --preset workstation [--size 128 --frames 16 --memory frames ...] [--json F]

Bytes by weights, gradients, optimiser, activations and workspace: counted (`rlv2v.method.memory`) everywhere,
and on a GPU
also measured, as the allocator's own peak over real steps, as CUDA graphs and without. Then, counted, what fits a card
of `--card` GB at `--sizes`, with each way to keep memory; with `--confirm` a GPU runs steps of that within as much
memory as such a card leaves. Flags are those of the training; all that is counted is of one rank.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GB,
    RUN,
    count,
    estimate,
    largest,
    scaled,
    some_clips,
)
from rlv2v.method.optim import autocast
from rlv2v.method.step import Algorithm
from rlv2v.model.activation_memory import MEMORY
from rlv2v.model.build import build_nets
from rlv2v.runtime.cuda_graphs import NUM_PLAIN
from rlv2v.runtime.device import grow_segments

SIZES = (64, 128, 256)
ROUNDS = 5  # the first warms up
Row = dict[str, Any]


@dataclass(frozen=True)
class Args(Config):
    """Count what a step of these settings needs; the flags of the training, and three more."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    card: float = 8.0
    """Memory of the card that shall be filled, GB (1e9 bytes); 0: no table of what fits."""
    sizes: tuple[int, ...] = SIZES
    """Of the frames in that table, pixels."""
    confirm: bool = False
    """Instead of a step of these settings run, on this GPU, steps of what the table says fits, in no more memory than
    the card has beside a context."""
    timed: bool = False
    """Time a generator step that keeps memory in each way, on this CPU, one thread."""


def row(case: str, backend: str, config: Config, **found: Any) -> Row:
    return {"case": case, "backend": backend, "pass": config.runtime.memory, "dtype": config.runtime.precision} | found


def counted(config: Config, share: int) -> Row:
    """The count, printed."""
    found = estimate(config, num_replicas=share)
    print(
        f"counted, a rank's step of {config.preset}, {config.data.size}x{config.data.size}, T={config.data.frames}, MB"
    )
    for name, size in found._asdict().items():
        print(f"    {name:12} {size / 1e6:10.1f}")
    print(f"    {'with reserve':12} {found.reserved / 1e6:10.1f}", flush=True)
    case = f"step {config.data.size}x{config.data.size} T={config.data.frames}"
    return row(case, "counted", config, **found._asdict(), with_reserve=found.reserved)


def run_steps(config: Config, share: int, num: int, settled: int = 0) -> None:
    """Steps on this GPU; after `settled` of them peaks count anew."""
    device = torch.device("cuda")
    algorithm = Algorithm(config.replace(replicas=share), device)
    for number in range(num):
        if number == settled:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            clips = some_clips(config, share)
        algorithm.advance(float(number), algorithm.step(clips).pop("distance"))
    torch.cuda.synchronize()


def forget() -> None:
    """Give back what earlier steps held."""
    torch.cuda.init()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measured(config: Config, share: int) -> Row:
    """The peak of the CUDA allocator over real steps, of what was asked of it and of what it holds."""
    forget()
    of_round = 2 * config.rl.every  # in which each domain has its turn
    settled = of_round * (
        NUM_PLAIN + 1 if config.runtime.graphs else 1
    )  # all moments are there, every phase is recorded
    run_steps(config, share, settled + 2 * of_round, settled)
    held, (free, whole) = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
    beside = whole - free - torch.cuda.memory_reserved()
    found = {"held": held, "beside": beside}
    how = "graphs" if config.runtime.graphs else "no graphs"
    if not config.runtime.graphs:  # what a replay uses is not allocated anew
        found["total"] = torch.cuda.max_memory_allocated()
        print(f"measured, {how}: {found['total'] / 1e6:.1f} MB allocated at the peak")
    print(
        f"measured, {how}: {held / 1e6:.1f} MB held by the allocator, {beside / 1e6:.1f} MB of the device beside: "
        f"context, kernels, other programs",
        flush=True,
    )
    return row(f"step {config.data.size}x{config.data.size} T={config.data.frames}, {how}", "measured", config, **found)


def confirmed(config: Config, share: int, card: int) -> bool:
    """Whether steps with transitions of either domain run in what a card has beside `CONTEXT_BYTES`."""
    forget()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card - CONTEXT_BYTES) / whole))
    try:
        run_steps(config, share, config.rl.every + 1)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


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
            with autocast(config, torch.device("cpu")):
                loss = step()
            loss.backward()
            times[memory].append(time.process_time() - began)
    rows = []
    case = f"generators {config.data.size}x{config.data.size} T={config.data.frames}"
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
    return config.replace(memory=memory)


def fitting(args: Args, share: int) -> list[Row]:
    """The longest clips at the config's batch, and its largest multiple at T=16, by size and memory."""
    card = int(args.card * GB)
    print(f"largest T | batch factor at T=16, that fit {card / GB:g} GB, the reserve included; from two counts each")
    rows = []
    for size in args.sizes:
        for memory in MEMORY:
            config = replace(of(args, memory), size=size)
            longest, widest = config.replace(frames=64), config.replace(frames=16)
            frames = largest(longest, card, over="frames", num_replicas=share)
            batch = largest(widest, card, over="batch", num_replicas=share)
            found = {"card": card, "frames": frames, "batch_factor": batch}
            if args.confirm:
                tried = {"frames": scaled(longest, "frames", frames), "batch_factor": scaled(widest, "batch", batch)}
                found |= {f"{name}_ran": confirmed(trial, share, card) for name, trial in tried.items() if found[name]}
            print(
                f"    {size:3}x{size:<3} | {memory:9} | {frames:5} | {batch:4}"
                + "".join(f" | {name} {value}" for name, value in found.items() if name.endswith("_ran")),
                flush=True,
            )
            rows.append(row(f"fits {size}x{size}", "counted", config, **found))
    return rows


def main(args: Args) -> None:
    """All tables, and the JSON line."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    args.check()
    if args.confirm and not torch.cuda.is_available():
        raise UserError("--confirm: PyTorch sees no GPU here")
    share = args.replicas or 1
    print(f"reserve: {CONTEXT_BYTES / GB:g} GB for context and libraries, {FRAGMENTATION:.0%} for fragmentation")
    rows = [counted(args, share)]
    if torch.cuda.is_available():
        grow_segments()
    if torch.cuda.is_available() and not args.confirm:
        rows += [measured(replace(args, graphs=graphs), share) for graphs in (False, True)]
    if args.timed:
        torch.set_num_threads(1)
        rows += timed(Config.of("default", size=64, frames=16))
    if args.card:
        rows += fitting(args, share)
    reserve = {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION}
    text = json.dumps({"bench": "memory", "commit": commit(), "machine": machine(), "reserve": reserve, "rows": rows})
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
