"""Time one whole train step beside the same algorithm written plainly: eager, prefix by prefix, replay in Python.

    python bench/train_step.py [--json F] [--frames 8 16] [--paper-frames 8] [--device cuda]

Both take the same clips and draws. First every loss and gradient norm that they log is compared, over one round of
steps in float64 and two in float32, each step from the same weights (Adam divides a gradient by its own size, so
rounding alone soon parts two runs in float32; tests/bench lets them run on in float64). If they differ, nothing is
timed and the exit code is 1.

A round is the steps in which each domain has one mini-batch of transitions: 4 in the `paint` rows, 2 of them with. A
time is the mean of a round's steps; the first rounds do not count. Each form runs in a process of its own, with the
memory and caches that its own steps leave, and waits while the other has its rounds. `oracle.plain_step` is the twin.
The `paint` rows have P and the policy gradient as well, and not the term `patches`: it sorts, and rounding may swap two
neighbours. The `paper` rows have its losses and networks but for `norm="clip"`: statistics over a mini-batch depend on
what is run together, which is where the two differ.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read once, by the first convolution

import numpy as np
import torch
from harness import Bench, Contender, DeviceArgs, Row, process_of_its_own, rows_of
from oracle.plain_step import Plain
from torch import Tensor

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data import to_model
from rlv2v.data.scaling import centre_crop
from rlv2v.data.synth import clip_of
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips, pool_size
from rlv2v.method.collector import Agent, ReplayRows
from rlv2v.method.rl import Transitions
from rlv2v.method.step import Algorithm
from rlv2v.runtime.cuda_graphs import NUM_PLAIN

# Relative, of every step that is compared. Float64 shows that both are one algorithm. What float32 adds is rounding:
# the twin's normalisation divides by the root of mean(x^2) - mean(x)^2, which on even frames is small beside either,
# so that norms of gradients differ more than losses do.
LIMITS = {"losses": 1e-5, "gradients": 2e-3, "float64": 1e-9}
SMALL = 1e-3  # a term below this share of the whole generators' loss is measured by that
Draws = list[int]
"""Ids of the stored transitions that a step drew."""
Steps = Callable[[Sequence[Draws | None]], list[tuple[float, Draws]]]
STRETCH = 3
"""Rounds of one form until the other's turn."""
COMPARABLE: dict[str, dict[str, Any]] = {
    "default": {},  # in float64 only: it sorts
    "paint": {"rl": True, "l_tau": 10.0, "l_rc": 10.0, "patches": 0.0},
    "paper": {"norm": "clip", "disc_norm": "clip"},
}


@dataclass(frozen=True)
class Args(DeviceArgs):
    """Time the train step against its plain twin."""

    frames: tuple[int, ...] = (8, 16)
    """Clip lengths T of the preset paint, one case each."""
    paper_frames: tuple[int, ...] = (8,)
    """Clip lengths of the paper's losses."""
    size: int = 32
    """Side of the frames, pixels."""
    rounds: int = 6
    """Timed rounds of each form."""


def steps_of_round(config: Config) -> int:
    """Return the steps in which each domain has a mini-batch."""
    return 2 * config.rl.every if config.rl.enabled else 1


class Pair:
    """Run `Algorithm` and `Plain`, one step of each in turn, on the same clips and draws.

    dtype: of the networks and of all their inputs; float64 for comparisons.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.fast = Algorithm(config, device)
        with torch.no_grad():  # G that is a copy has losses |G(x) - x| of 0, and rounding decides their gradients
            for g in (self.fast.nets.g_x, self.fast.nets.g_y):
                for weight in g.parameters():
                    if not weight.any():
                        weight.copy_(0.01 * torch.randn(weight.shape))
        for nets in (self.fast.nets, self.fast.targets, self.fast.average):
            nets.to(dtype)
        self.fast.start()
        self.ids: list[int] = []
        for agent in self.fast.agents.values():
            self.record_draws(agent)
        self.plain = Plain(self.fast)

    def record_draws(self, agent: Agent) -> None:
        """Record for the twin which stored transitions an agent draws, and cast the mini-batch to the nets' dtype."""
        collect = agent.collect

        def recorded(*args: Any) -> tuple[Transitions, ReplayRows]:
            batch, rows = collect(*args)
            self.ids = [number for _, ids in rows.drawn for number in ids.tolist()]
            return Transitions(*(f.to(self.dtype) if f.is_floating_point() else f for f in batch)), rows

        agent.collect = recorded  # type: ignore[method-assign,assignment]

    def clips(self, step: int) -> Clips:
        """Return the synthetic set's clips of a step, each seen once, with a grain of half a level: of patches that are
        equal the order is any, and so is which of them a gradient goes to."""
        data, pool = self.config.data, pool_size(self.config)
        side = max(data.size.height, data.size.width)

        def clips(name: str, num: int, first: int = 0) -> Tensor:
            indices = range(first + step * num, first + (step + 1) * num)
            made = [clip_of(name, k, seed=self.config.seed, frames=data.frames, size=side)[0] for k in indices]
            crops = torch.from_numpy(np.stack([centre_crop(clip, data.size) for clip in made]))
            frames = to_model(crops).to(self.device, self.dtype)
            grain = np.random.default_rng([self.config.seed, *indices]).random(tuple(frames.shape)) / 255
            return 254 / 255 * frames + torch.from_numpy(grain).to(frames)

        own = Clips(*(clips(f"train{name.upper()}", getattr(data, f"batch_{name}")) for name in "xyzs"))
        if not pool:
            return own
        pool_x, *pool_yz = (clips(f"train{name}", pool, 10**6) for name in "XYZ")  # beyond what the other terms see
        return own._replace(pool_x=pool_x, pool_yz=torch.cat(pool_yz))

    def step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Take one step of each; return what ours and the twin logged."""
        assert self.fast.schedule.step == self.plain.schedule.step
        clips = self.clips(self.fast.schedule.step)
        logs = self.fast_step(clips)
        return {name: value.item() for name, value in logs.items()}, self.plain_step(clips, self.ids)

    def fast_step(self, clips: Clips) -> dict[str, Tensor]:
        """Take one step of ours."""
        self.ids = []
        logs = self.fast.step(clips)
        self.fast.advance(0.0)
        return logs

    def plain_step(self, clips: Clips, ids: list[int]) -> dict[str, float]:
        """Take one step of the twin."""
        logs = self.plain.step(clips, ids)
        self.plain.advance(0.0)
        return logs


_pairs: list[Pair] = []  # of a process that times one form; both are made, alike in every process, and one is used


def make_pair(config: Config, device: torch.device, threads: int) -> None:
    """Prepare a process that times one form."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    _pairs[:] = [Pair(config, device)]


def time_steps(draws: Sequence[Draws | None]) -> list[tuple[float, Draws]]:
    """Return the seconds and draws of the next steps: of ours where a draw is None, else of the twin with that draw."""
    (pair,), timed = _pairs, list[tuple[float, Draws]]()
    for drawn in draws:
        clips = pair.clips((pair.fast if drawn is None else pair.plain).schedule.step)
        start = time.perf_counter()
        if drawn is None:
            pair.fast_step(clips)
        else:
            pair.plain_step(clips, drawn)
        if pair.device.type == "cuda":
            torch.cuda.synchronize(pair.device)
        timed.append((time.perf_counter() - start, pair.ids))
    return timed


def difference(ours: Mapping[str, float], theirs: Mapping[str, float], gradients: bool) -> float:
    """Return the largest relative difference of gradient norms or of losses; infinity if one is NaN or missing."""
    if ours.keys() != theirs.keys():
        return float("inf")
    names = [name for name in theirs if name.startswith("grad") == gradients]
    least = 0.0 if gradients else SMALL * abs(theirs.get("loss", 0.0))
    ratios = [abs(ours[name] - theirs[name]) / (max(abs(theirs[name]), least) or 1.0) for name in names]
    return float("inf") if any(map(math.isnan, ratios)) else max(ratios)


def compare_steps(pair: Pair, rounds: int) -> dict[str, float]:
    """Return the largest differences of losses and gradient norms in steps that start from the same weights."""
    largest = {"losses": 0.0, "gradients": 0.0}
    for _ in range(rounds * steps_of_round(pair.config)):
        pair.plain.load(pair.fast)
        fast, plain = pair.step()
        for kind in largest:
            largest[kind] = max(largest[kind], difference(fast, plain, kind == "gradients"))
    return largest


def time_rounds(fast: Steps, plain: Steps, round_steps: int, rounds: int) -> dict[str, list[float]]:
    """Return the microseconds a step of each form, the mean of each round; fast, plain: `time_steps` of each."""
    times: dict[str, list[float]] = {"rlv2v": [], "plain": []}
    for first in range(0, rounds, STRETCH):
        taken = fast([None] * (min(STRETCH, rounds - first) * round_steps))
        for form, steps in (("rlv2v", taken), ("plain", plain([drawn for _, drawn in taken]))):
            seconds = [each for each, _ in steps]
            means = [statistics.mean(seconds[k : k + round_steps]) for k in range(0, len(steps), round_steps)]
            times[form] += [1e6 * mean for mean in means]
    return times


def time_forms(config: Config, args: Args, device: torch.device) -> dict[str, list[float]]:
    """Run `time_rounds`, each form in a process of its own."""
    arguments, round_steps = (config, device, args.threads), steps_of_round(config)
    with process_of_its_own(make_pair, *arguments) as ours, process_of_its_own(make_pair, *arguments) as theirs:
        fast, plain = (lambda draws, p=p: p.submit(time_steps, draws).result() for p in (ours, theirs))
        warm = NUM_PLAIN + 1 if config.runtime.graphs else 1 if args.quick else 2  # with graphs until all are recorded
        time_rounds(fast, plain, round_steps, warm)
        return time_rounds(fast, plain, round_steps, args.num_rounds)


def case_rows(preset: str, frames: int, args: Args) -> list[Row]:
    """Check and time the two forms of one case."""
    device, graphs = torch.device(args.device), args.device == "cuda"
    changes = {"size": args.size, "frames": frames, "steps": 10000, "replicas": 1, "graphs": graphs}
    config = Config.of(preset, **(COMPARABLE[preset] | changes)).check()
    exact = compare_steps(Pair(config.replace(graphs=False), device, torch.float64), 1)
    largest = compare_steps(Pair(config, device), 1 if args.quick else 2) | {"float64": max(exact.values())}
    valid = all(largest[name] <= limit for name, limit in LIMITS.items())
    times, fields = time_forms(config, args, device) if valid else {}, {"difference": largest}
    contenders = [Contender(name, ours=name == "rlv2v", valid=valid, fields=fields) for name in ("rlv2v", "plain")]
    by_key = {(name, "float32"): us for name, us in times.items()}
    return rows_of(f"{preset} T={frames} {args.size}x{args.size}", "train step", contenders, by_key)


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 if the two forms differ."""
    if min((*args.frames, *args.paper_frames), default=0) < 2:
        raise UserError("--frames: expected at least 2")
    torch.backends.cudnn.allow_tf32 = False  # float32 in both: the comparison asks for more digits than tf32 has
    cases = [("paint", frames) for frames in args.frames] + [("paper", frames) for frames in args.paper_frames]
    if args.quick:
        args, cases = replace(args, rounds=2, size=16), [("paint", 3)]
    with Bench("train_step", args) as bench:
        for preset, frames in cases:
            bench.add(case_rows(preset, frames, args))


if __name__ == "__main__":
    run_command(main, Args)
