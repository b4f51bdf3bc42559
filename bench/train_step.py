"""One whole train step beside the same algorithm written plainly: eager, every loss prefix by prefix, replay in Python.

    python bench/train_step.py [--json F] [--frames 8 16] [--paper-frames 8] [--device auto]

Both take the same clips and draws. Before anything is timed, every loss and gradient norm that they tell is compared,
over one round of steps in float64 and `--check` rounds in float32, each step from the same weights; where they differ
nothing is timed and the exit code is 1. (Adam divides a gradient by its own size, so rounding alone soon parts two runs
in float32; tests/test_bench_train_step.py lets them run on in float64 and compares all weights in the end.)

A round is the steps in which each domain has one mini-batch of transitions: 4 in the default preset, 2 of them with.
The two alternate every `--stretch` rounds; a time is the mean of a round's steps, so that steps with and without
transitions count alike. (Who comes right after the other finds oneDNN's primitives driven out and pages given back to
the system: step by step ours took 1.1 s instead of 0.7. The medians leave most of that out, and oneDNN may keep more
primitives than by default, for both.) What the twin is: `train_step_plain`. The `paper` rows have its losses and
networks but for `norm="clip"`: statistics over a mini-batch
depend on what is run together, which is where the two differ.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read once, by the first convolution

import numpy as np
import torch
from machine import commit, machine
from torch import Tensor
from train_step_nets import plain_weights
from train_step_plain import Plain

from rlv2v.algorithm import Algorithm
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data import to_model
from rlv2v.data.synth import clip_of
from rlv2v.ddpg import Agent, Recall, Transitions
from rlv2v.device import pick_device
from rlv2v.errors import UserError
from rlv2v.objective import Clips

# Relative, of every step that is compared. Float64 tells that both are one algorithm. What float32 adds is rounding:
# the twin's normalisation divides by the root of mean(x^2) - mean(x)^2, which on even frames is small beside either,
# so that norms of gradients differ more than losses do.
LIMITS = {"losses": 1e-5, "gradients": 2e-3, "float64": 1e-9}
SMALL = 1e-3  # of what G and P descend in all: a term below it is measured by that
NUM_PLAIN_ROUNDS = 4  # after as many a recording of every phase is there: see rlv2v.graphs
COMPARABLE: dict[str, dict[str, Any]] = {"default": {}, "paper": {"norm": "clip", "judge_norm": "clip"}}

Result = TypeVar("Result")


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
    check: int = 2
    """Rounds in which they are compared, before; from the second on they draw stored transitions too."""
    device: str = "auto"
    """Torch device; auto: cuda where there is one."""
    graphs: bool = False
    """Record our step as CUDA graphs."""
    threads: int = 1
    """CPU threads."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""


class Told(NamedTuple):
    """What one step said, and how long it took in seconds."""

    fast: dict[str, float]
    plain: dict[str, float]
    fast_seconds: float
    plain_seconds: float


def clips_at(config: Config, step: int, device: torch.device, dtype: torch.dtype) -> Clips:
    """The synthetic set's clips of a step, each seen once, as a loader gives them."""

    def clips(name: str, num: int) -> Tensor:
        drawn = [
            clip_of(name, step * num + n, seed=config.seed, frames=config.frames, size=config.size)[0]
            for n in range(num)
        ]
        return to_model(torch.from_numpy(np.stack(drawn))).to(device, dtype)

    sets = {"trainX": config.batch_x, "trainY": config.batch_y, "trainZ": config.batch_z, "trainS": config.batch_s}
    return Clips(*(clips(name, num) for name, num in sets.items()))


class Pair:
    """`Algorithm` and `Plain`, one step of each in turn on the same clips and draws.

    dtype: of the networks and of all that they are given; float64 for tests.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.fast = Algorithm(config, device)
        for nets in (self.fast.nets, self.fast.targets, self.fast.average):
            nets.to(dtype)
        self.fast.start()
        self.ids: list[int] = []
        for agent in self.fast.agents.values():
            self.listen(agent)
        self.plain = Plain(self.fast)

    def listen(self, agent: Agent) -> None:
        """Hear which stored transitions an agent draws, for the twin; they and their rewards in the nets' dtype."""
        gather = agent.gather

        def heard(*given: Any) -> tuple[Transitions, Recall]:
            batch, recall = gather(*given)
            self.ids = [number for _, ids in recall.drawn for number in ids.tolist()]
            return Transitions(*(f.to(self.dtype) if f.is_floating_point() else f for f in batch)), recall

        agent.gather = heard  # type: ignore[method-assign,assignment]

    @property
    def round(self) -> int:
        """Steps of a round."""
        return 2 * self.config.rl_every if self.config.rl else 1

    def step(self) -> Told:
        """One step of each."""
        return self.steps(1)[0]

    def steps(self, num: int) -> list[Told]:
        """Some steps of ours, then the same ones of the twin's, each with the memory that its own steps left."""
        first = self.fast.schedule.step
        assert first == self.plain.schedule.step
        given = [clips_at(self.config, first + k, self.device, self.dtype) for k in range(num)]
        ours, recalled = [], []
        for clips in given:
            self.ids = []
            ours.append(self.timed(partial(self.fast_step, clips)))
            recalled.append(self.ids)
        theirs = [self.timed(partial(self.plain_step, clips, ids)) for clips, ids in zip(given, recalled, strict=True)]
        return [
            Told({name: value.item() for name, value in tensors.items()}, numbers, fast_seconds, plain_seconds)
            for (tensors, fast_seconds), (numbers, plain_seconds) in zip(ours, theirs, strict=True)
        ]

    def fast_step(self, clips: Clips) -> dict[str, Tensor]:
        told = self.fast.step(clips)
        self.fast.advance(0.0, told["distance"])
        return told

    def plain_step(self, clips: Clips, ids: list[int]) -> dict[str, float]:
        told = self.plain.step(clips, ids)
        self.plain.advance(0.0, told["distance"])
        return told

    def timed(self, call: Callable[[], Result]) -> tuple[Result, float]:
        """What a call gives, and its seconds."""
        began = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result, time.perf_counter() - began


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
    for _ in range(rounds * pair.round):
        pair.plain.load(pair.fast)
        told = pair.step()
        for kind in found:
            found[kind] = max(found[kind], difference(told.fast, told.plain, kind == "gradients"))
    return found


def time_rounds(pair: Pair, rounds: int, stretch: int) -> dict[str, list[float]]:
    """Microseconds a step of each form, the mean of each round."""
    times: dict[str, list[float]] = {"rlv2v": [], "plain": []}
    for first in range(0, rounds, stretch):
        told = pair.steps(min(stretch, rounds - first) * pair.round)
        for k in range(0, len(told), pair.round):
            here = told[k : k + pair.round]
            times["rlv2v"].append(1e6 * statistics.mean(step.fast_seconds for step in here))
            times["plain"].append(1e6 * statistics.mean(step.plain_seconds for step in here))
    return times


def case(preset: str, frames: int, args: Args, device: torch.device) -> list[dict[str, Any]]:
    """The two rows of one case; prints their lines of the table."""
    graphs = args.graphs and device.type == "cuda"
    changes = {"size": args.size, "frames": frames, "steps": 10000, "replicas": 1, "graphs": graphs}
    config = Config.of(preset, **(COMPARABLE[preset] | changes)).check()
    exact = compare(Pair(replace(config, graphs=False), device, torch.float64), 1)
    pair = Pair(config, device)
    found = compare(pair, args.check) | {"float64": max(exact.values())}
    valid = all(found[name] <= limit for name, limit in LIMITS.items())
    name = f"{preset} T={frames} {args.size}x{args.size}"
    print(f"{name}: relative differences " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()))
    times: dict[str, list[float]] = {}
    if valid:
        time_rounds(pair, max(0, NUM_PLAIN_ROUNDS - args.check) if graphs else 0, args.stretch)
        times = time_rounds(pair, args.rounds, args.stretch)
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
        or min(args.check, args.threads, args.stretch) < 1
        or min((*args.frames, *args.paper_frames), default=0) < 2
    ):
        raise UserError("--rounds, --check, --threads, --stretch, --frames: expected at least 2, 1, 1, 1, 2")
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    print("case | form | us a step p50 p20 p80 | x other form")
    cases = [("default", frames) for frames in args.frames] + [("paper", frames) for frames in args.paper_frames]
    rows = [row for preset, frames in cases for row in case(preset, frames, args, device)]
    text = json.dumps({"bench": "train_step", "commit": commit(), "machine": machine(args.threads), "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
