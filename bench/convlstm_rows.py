"""What all rows of the ConvLSTM's bench share: who competes, in turn and against what limit, and a row's form."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels.reference import LIMITS

Row = dict[str, Any]
Times = dict[str, list[float]]
Call = Callable[[], object]
StepTimer = Callable[[Call], float]
HEADER = "case | pass | backend | us p50 p20 p80 | GB/s or GFLOP/s | % of limit | x eager"
PEER_SLACK = (
    2  # times our own limits: in 16 bits most peers keep the cells in 16 bits, and none is to be left out for that
)
SHORT_US = 2000  # a shorter call is repeated in its turn, after one that is not counted: it had another one's caches


@dataclass(frozen=True)
class Contender:
    """Somebody who is timed: a backend of ours, a peer, or a limit: a bare GEMM, convolution or copy."""

    name: str
    """Of all contenders of a case the only one so called."""
    dtype: torch.dtype
    """Of the arithmetic."""
    call: Call
    work: Mapping[str, float]
    """What a call stands for: FLOPs as `gflop_s`, bytes as `gb_s`; the first one's rate is told."""
    ours: bool = False
    limit: bool = False
    backend: str = ""
    """What the row says; the name when empty."""
    group: str = ""
    """The fastest peer of a group is a peer too, called `best <group>`."""


@dataclass
class Case:
    """Contenders for the same work, and what was found of them before anything was timed."""

    name: str
    passes: str
    contenders: list[Contender]
    found: dict[str, dict[str, float]] = field(default_factory=dict)
    """Differences from float64, by contender; limits have none."""

    def valid(self, contender: Contender) -> bool:
        slack = 1 if contender.ours else PEER_SLACK
        return contender.limit or within(self.found[contender.name], contender.dtype, slack)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def within(found: Mapping[str, float], dtype: torch.dtype, slack: float = 1) -> bool:
    """Whether no difference is above `slack` times the kernels' limits; one that is not a number is."""
    limit = LIMITS[dtype]
    return found["value"] <= slack * limit.value and found["gradient"] <= slack * limit.gradient


def differences(got: tuple[Tensor, ...], want: tuple[Tensor, ...], num_values: int) -> dict[str, float]:
    """The largest absolute one of the first tensors, and the largest ratio of norms of the others, the gradients."""
    pairs = [(a.detach().double().cpu(), b.double().cpu()) for a, b in zip(got, want, strict=True)]
    value = torch.stack([(a - b).abs().max() for a, b in pairs[:num_values]]).max()
    gradient = torch.stack([(a - b).norm() / b.norm() for a, b in pairs[num_values:]]).max()
    return {"value": value.item(), "gradient": gradient.item()}


def rounded(tensor: Tensor) -> Tensor:
    """In float64, to values that every dtype here holds: all contenders and the reference get the same."""
    return tensor.bfloat16().half().double()


def frame_major(frames: Tensor) -> Tensor:
    """(...,B,T,C,H,W) dense in the order T,B,H,W,C, as our layers hand it on; itself where it is so."""
    return frames.transpose(-5, -4).movedim(-3, -1).contiguous().movedim(-1, -3).transpose(-5, -4)


def wall_us(call: Call) -> float:
    """Microseconds of a call on the CPU."""
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


def cuda_us(call: Call) -> float:
    """Microseconds between events around a call, nothing queued before it: the gaps between its launches count."""
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3


def in_turn(calls: Mapping[str, Call], rounds: int, clock: StepTimer = wall_us) -> Times:
    """Microseconds of each, all of them in every round, in an order of its own; each is warmed up before."""
    times: Times = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(20, int(SHORT_US / max(clock(call), 1.0))))
    order, rng = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                if repeats[name] > 1:
                    calls[name]()
                times[name] += [clock(calls[name]) for _ in range(repeats[name])]
    finally:
        gc.enable()
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = quantiles(times, n=10, method="inclusive")[1::3]
    return p20, p50, p80


def copy(num_bytes: float, dtype: torch.dtype, device: str = "cpu") -> Contender:
    """A copy that moves so many bytes, half of them read and half written, into memory that is there: a limit."""
    source = torch.ones(int(num_bytes) // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    work = {"gb_s": 2.0 * source.numel()}
    return Contender(f"copy {name_of(dtype)}", dtype, lambda: target.copy_(source), work, limit=True, backend="copy")


def peers_of(timed: Iterable[Contender], medians: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of the peers, and of the fastest of each group."""
    peers: dict[str, float] = {}
    for c in timed:
        if not (c.ours or c.limit):
            peers[c.name] = medians[c.name]
            if c.group:
                peers[f"best {c.group}"] = min(peers.get(f"best {c.group}", float("inf")), medians[c.name])
    return peers


def floor_us(contender: Contender, limits: Iterable[tuple[Contender, float]]) -> float | None:
    """Microseconds of its work at the best rate that a limit of its dtype reached; None where none was measured."""
    floors = []
    for unit, amount in contender.work.items():
        rates = [c.work[unit] / us for c, us in limits if c.dtype == contender.dtype and unit in c.work]
        if rates:
            floors.append(amount / max(rates))
    return max(floors, default=None)


def case_rows(case: Case, rounds: int, clock: StepTimer = wall_us) -> list[Row]:
    """Time the valid contenders of a case, print the lines; the others' rows have no times, but what they got wrong.

    `speedup_over` has every peer of the case, whatever its dtype.
    """
    timed = [c for c in case.contenders if case.valid(c)]
    spreads = {name: spread(us) for name, us in in_turn({c.name: c.call for c in timed}, rounds, clock).items()}
    medians = {name: p50 for name, (_, p50, _) in spreads.items()}
    peers, limits = peers_of(timed, medians), [(c, medians[c.name]) for c in timed if c.limit]
    rows = []
    for c in case.contenders:
        row: Row = {"case": case.name, "backend": c.backend or c.name, "pass": case.passes, "dtype": name_of(c.dtype)}
        row["ours"] = c.ours
        told = {} if c.limit else {"difference": case.found[c.name]}
        if c.name not in medians:
            row |= dict.fromkeys(("median_us", "p20_us", "p80_us", "percent_of_limit"))
            rows.append(row | {"speedup_over": {}, "valid": False} | told)
            print(f"{case.name} | {case.passes} | {c.name:30} | REFUSED: {told['difference']}, {LIMITS[c.dtype]}")
            continue
        p20, p50, p80 = spreads[c.name]
        unit, amount = next(iter(c.work.items()))
        floor = None if c.limit else floor_us(c, limits)
        percent = None if floor is None else round(100 * floor / p50, 1)
        over = {} if c.limit else {name: round(us / p50, 3) for name, us in peers.items() if name != c.name}
        row |= {"median_us": round(p50, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2)}
        row |= {"percent_of_limit": percent, "speedup_over": over, unit: round(amount / p50 / 1e3, 2), "valid": True}
        rows.append(row | told)
        said = "" if percent is None else f"{percent:.0f}%"
        eager = f"{peers['eager'] / p50:6.2f}" if "eager" in peers and not c.limit else ""
        figures = f"{p50:10.1f} {p20:10.1f} {p80:10.1f} | {row[unit]:8.1f} | {said:>4} | {eager}"
        print(f"{case.name} | {case.passes} | {c.name:30} | {figures}", flush=True)
    return rows
