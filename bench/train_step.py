"""One whole train step beside the same algorithm written plainly: eager, every loss prefix by prefix, replay in Python.

    python bench/train_step.py [--json F] [--frames 8 16] [--paper-frames 8] [--device auto]

Both take the same clips and draws. Before anything is timed, every loss and gradient norm that they tell is compared,
over one round of steps in float64 and `--check` rounds in float32, each step from the same weights; where they differ
nothing is timed and the exit code is 1. (Adam divides a gradient by its own size, so rounding alone soon parts two runs
in float32; tests/test_bench_train_step.py lets them run on in float64 and compares all weights in the end.)

A round is the steps in which each domain has one mini-batch of transitions: 4 in the default preset, 2 of them with.
Each form runs in a process of its own, with the memory and caches that its own steps leave, and waits while the other
has its `--stretch` rounds: in one process the twin's many shapes slowed ours by 15 %, and oneDNN, which may keep more
primitives than by default in both, drove out ours. A time is the mean of a round's steps, so that steps with and
without transitions count alike; the first `--warm` rounds are not counted. What the twin is: `train_step_plain`. The
`paper` rows have its losses and networks but for `norm="clip"`: statistics over a mini-batch depend on what is run
together, which is where the two differ.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read once, by the first convolution

import torch
from machine import commit, machine
from train_step_nets import plain_weights
from train_step_pair import Pair, Timed, hold, steps_of_round, time_fast, time_plain
from train_step_plain import Plain

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.step import Algorithm
from rlv2v.runtime.cuda_graphs import NUM_PLAIN
from rlv2v.runtime.device import pick_device

# Relative, of every step that is compared. Float64 tells that both are one algorithm. What float32 adds is rounding:
# the twin's normalisation divides by the root of mean(x^2) - mean(x)^2, which on even frames is small beside either,
# so that norms of gradients differ more than losses do.
LIMITS = {"losses": 1e-5, "gradients": 2e-3, "float64": 1e-9}
SMALL = 1e-3  # of what G and P descend in all: a term below it is measured by that
COMPARABLE: dict[str, dict[str, Any]] = {"default": {}, "paper": {"norm": "clip", "disc_norm": "clip"}}


@dataclass(frozen=True)
class Args:
    """Time the train step against its plain twin."""

    frames: tuple[int, ...] = (8, 16)
    """Clip lengths T of the default preset, one case each."""
    paper_frames: tuple[int, ...] = (8,)
    """Clip lengths of the paper's losses."""
    size: int = 32
    """Side of the frames, pixels."""
    rounds: int = 6
    """Timed rounds of each form."""
    stretch: int = 3
    """Rounds of one form before the other's turn."""
    warm: int = 2
    """Rounds of each before; at least 4 with graphs, after which every phase is recorded."""
    check: int = 2
    """Rounds in which they are compared, before; from the second on they draw stored transitions too."""
    device: str = "auto"
    """Torch device; auto: cuda where there is one."""
    graphs: bool = True
    """On a GPU record our step as CUDA graphs."""
    threads: int = 1
    """CPU threads."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""


def difference(ours: Mapping[str, float], theirs: Mapping[str, float], gradients: bool) -> float:
    """Largest relative difference of gradient norms or of losses; infinite where one is NaN or not told by both."""
    if ours.keys() != theirs.keys():
        return float("inf")
    names = [name for name in theirs if name.startswith("grad") == gradients]
    least = 0.0 if gradients else SMALL * abs(theirs.get("loss", 0.0))
    found = [abs(ours[name] - theirs[name]) / (max(abs(theirs[name]), least) or 1.0) for name in names]
    return float("inf") if any(map(math.isnan, found)) else max(found)


def weights_difference(fast: Algorithm, plain: Plain) -> float:
    """Relative difference of all weights: of networks, targets and averages."""
    pairs = ((fast.nets, plain.nets), (fast.targets, plain.targets), (fast.average, plain.average))
    differences, sizes = [], []
    for ours, theirs in pairs:
        converted, state = plain_weights(ours.state_dict()), theirs.state_dict()
        differences += [(converted[name] - value).norm() for name, value in state.items()]
        sizes += [value.norm() for value in state.values()]
    return (torch.stack(differences).norm() / torch.stack(sizes).norm()).item()


def compare(pair: Pair, rounds: int) -> dict[str, float]:
    """Largest difference of losses and of norms of gradients in steps that start from the same weights."""
    found = {"losses": 0.0, "gradients": 0.0}
    for _ in range(rounds * steps_of_round(pair.config)):
        pair.plain.load(pair.fast)
        told = pair.step()
        for kind in found:
            found[kind] = max(found[kind], difference(told.fast, told.plain, kind == "gradients"))
    return found


def time_rounds(
    fast: Callable[[int], list[Timed]],
    plain: Callable[[list[list[int]]], list[float]],
    round_steps: int,
    rounds: int,
    stretch: int,
) -> dict[str, list[float]]:
    """Microseconds a step of each form, the mean of each round; `fast`, `plain`: see `train_step_pair`."""
    times: dict[str, list[float]] = {"rlv2v": [], "plain": []}
    for first in range(0, rounds, stretch):
        taken = fast(min(stretch, rounds - first) * round_steps)
        seconds = {"rlv2v": [each.seconds for each in taken], "plain": plain([each.ids for each in taken])}
        for form, of_steps in seconds.items():
            times[form] += [
                1e6 * statistics.mean(of_steps[k : k + round_steps]) for k in range(0, len(of_steps), round_steps)
            ]
    return times


def timed(config: Config, args: Args, device: torch.device) -> dict[str, list[float]]:
    """`time_rounds`, each form in a process of its own."""
    alone = partial(
        ProcessPoolExecutor, 1, get_context("spawn"), initializer=hold, initargs=(config, device, args.threads)
    )
    with alone() as ours, alone() as theirs:

        def fast(num: int) -> list[Timed]:
            return ours.submit(time_fast, num).result()

        def plain(ids: list[list[int]]) -> list[float]:
            return theirs.submit(time_plain, ids).result()

        round_steps = steps_of_round(config)
        warm = max(args.warm, NUM_PLAIN + 1) if config.runtime.graphs else args.warm
        time_rounds(fast, plain, round_steps, warm, args.stretch)
        return time_rounds(fast, plain, round_steps, args.rounds, args.stretch)


def case(preset: str, frames: int, args: Args, device: torch.device) -> list[dict[str, Any]]:
    """The two rows of one case; prints their lines of the table."""
    graphs = args.graphs and device.type == "cuda"
    changes = {"size": args.size, "frames": frames, "steps": 10000, "replicas": 1, "graphs": graphs}
    config = Config.of(preset, **(COMPARABLE[preset] | changes)).check()
    exact = compare(Pair(config.replace(graphs=False), device, torch.float64), 1)
    pair = Pair(config, device)
    found = compare(pair, args.check) | {"float64": max(exact.values())}
    valid = all(found[name] <= limit for name, limit in LIMITS.items())
    name = f"{preset} T={frames} {args.size}x{args.size}"
    print(f"{name}: relative differences " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()))
    del pair
    times = timed(config, args, device) if valid else {}
    rows = []
    for backend, peer in (("rlv2v", "plain"), ("plain", "rlv2v")):
        row: dict[str, Any] = {"case": name, "backend": backend, "pass": "train step", "dtype": "float32"}
        row |= {"median_us": None, "p20_us": None, "p80_us": None, "percent_of_limit": None, "speedup_over": {}}
        if valid:
            p20, p50, p80 = statistics.quantiles(times[backend], n=10)[1::3]
            ratio = statistics.median(times[peer]) / p50
            row |= {"median_us": round(p50), "p20_us": round(p20), "p80_us": round(p80)}
            row["speedup_over"] = {peer: round(ratio, 3)}
            print(f"{name} | {backend:5} | {p50:9.0f} {p20:9.0f} {p80:9.0f} | {ratio:5.2f}", flush=True)
        rows.append(row | {"valid": valid, "difference": found})
    return rows


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 when the two forms differ."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if (
        args.rounds < 2
        or min(args.check, args.threads, args.stretch, args.warm) < 1
        or min((*args.frames, *args.paper_frames), default=0) < 2
    ):
        raise UserError("--rounds, --frames: expected at least 2; --check, --warm, --threads, --stretch: at least 1")
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 in both: the comparison asks for more digits than tf32 has
    print("case | form | us a step p50 p20 p80 | x other form")
    cases = [("default", frames) for frames in args.frames] + [("paper", frames) for frames in args.paper_frames]
    rows: list[dict[str, Any]] = []
    for preset, frames in cases:
        rows += case(preset, frames, args, device)
        text = json.dumps({"bench": "train_step", "commit": commit(), "machine": machine(args.threads), "rows": rows})
        if args.json is not None:  # after each case: a large T takes long
            args.json.write_text(text + "\n")
    print(text)
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
