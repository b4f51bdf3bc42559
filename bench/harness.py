"""The harness that all benches share: fair timing in turns, rows with their ratios, and the JSON of a bench.

The last line of stdout and the file of --json are one object:

    {"bench", "commit", "machine": {"cpu", "gpu", "threads", "torch", "triton"}, ..., "rows": [...]}

A timed row has `case, backend, pass, dtype, median_us, p20_us, p80_us, percent_of_limit, speedup_over, ours, valid`.
`speedup_over` maps each peer of the same dtype to a ratio, above 1 where the row is faster. `percent_of_limit` is the
time that the row's work would take at the best rate that a bare limit (a copy, a GEMM) reached in the same turns, over
the row's own time. A contender that failed its check has `"valid": false` and no times; if it is one of ours, the bench
ends with exit code 1.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlv2v.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `oracle`: the literal twins that benches time

Row = dict[str, Any]
Call = Callable[[], object]
Clock = Callable[[Call], float]

SHORT_US = 2000
"""A call shorter than this is repeated in its turn, after one that does not count: it starts with another's caches."""
MAX_REPEATS = 20


@dataclass(frozen=True)
class Args:
    """Hold the flags that benches share; a bench inherits them and adds its own."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists; written after each case."""
    quick: bool = False
    """About a minute: fewer cases and rounds."""
    threads: int = 1
    """CPU threads of torch."""


@dataclass(frozen=True)
class TimedArgs(Args):
    """Add the rounds of a timing to the shared flags."""

    rounds: int = 15
    """Timed turns of each contender."""

    @property
    def num_rounds(self) -> int:
        """Return the rounds to run: at most 5 with --quick."""
        return min(self.rounds, 5) if self.quick else self.rounds


@dataclass(frozen=True)
class DeviceArgs(TimedArgs):
    """Add the device of a timing."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the contenders run."""


class Bench:
    """Collect the rows of one bench, as a context manager; further fields go into the JSON before `rows`.

    The file of --json is replaced after each `add`, so an interrupted bench keeps the cases that it finished. Leaving
    the block prints the JSON line and raises SystemExit(1) if a row with `"ours": true` is not valid. A flag that is
    out of range, or a folder of --json that does not exist, raises UserError.
    """

    def __init__(self, name: str, args: Args, **fields: Any) -> None:
        self.name, self.path, self.rows, self.fields = name, args.json, list[Row](), fields
        self.missing: dict[str, str] = {}
        if self.path is not None and not self.path.parent.is_dir():
            raise UserError(f"--json {self.path}: its folder does not exist; create it first")
        if isinstance(args, TimedArgs) and args.rounds < 2:
            raise UserError(f"--rounds: expected at least 2, got {args.rounds}")
        if args.threads < 1:
            raise UserError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
        if isinstance(args, DeviceArgs) and args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU")

    def add(self, rows: Iterable[Row], **fields: Any) -> None:
        """Append and print rows, set further fields, and write the file."""
        for row in rows:
            self.rows.append(row)
            told = {
                key: value for key, value in row.items() if key not in ("ours", "spread") and value not in (None, {})
            }
            print(" | ".join(f"{key} {value}" for key, value in told.items()), flush=True)
        self.fields |= fields
        if self.path is not None:
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(self.text() + "\n")
            os.replace(partial, self.path)

    def skip(self, name: str, reason: str | Exception) -> None:
        """Record under `missing` and print why a contender is not measured."""
        self.missing[name] = fault_of(reason) if isinstance(reason, Exception) else reason
        print(f"{name}: not measured, {self.missing[name]}", flush=True)

    def text(self) -> str:
        """Return the JSON line."""
        head: Row = {"bench": self.name, "commit": commit(), "machine": machine(), **self.fields}
        if self.missing:
            head["missing"] = self.missing
        return json.dumps(finite(head | {"rows": self.rows}), allow_nan=False)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.add([])
            print(self.text())
            if any(row.get("ours") and row.get("valid") is False for row in self.rows):
                raise SystemExit(1)


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case: one of ours, a peer, or a limit (a bare copy, GEMM or convolution)."""

    name: str  # unique among the contenders of the same dtype
    call: Call = lambda: None  # the work to time; unused where the times come from elsewhere
    dtype: str = "float32"  # of the arithmetic
    work: Mapping[str, float] = field(default_factory=dict)
    """What a call stands for: FLOPs as `gflop_s`, bytes as `gb_s`. The row shows the first one's rate."""
    ours: bool = False
    limit: bool = False
    group: str = ""  # the fastest peer of a group counts as one more peer, `best <group>`
    valid: bool = True
    setup: Call = lambda: None  # runs before each call, outside the time
    fields: Mapping[str, Any] = field(default_factory=dict)  # further fields of the row

    @property
    def key(self) -> tuple[str, str]:
        """Return what the contender's times are stored under."""
        return self.name, self.dtype


Times = dict[tuple[str, str], list[float]]


def wall_us(call: Call) -> float:
    """Return the microseconds of a call by the wall clock."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def cuda_us(call: Call) -> float:
    """Return the microseconds between CUDA events around a call on an idle GPU; gaps between launches count."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


CLOCKS: dict[str, Clock] = {"cpu": wall_us, "cuda": cuda_us}


def time_in_turns(contenders: Sequence[Contender], rounds: int, clock: Clock = wall_us) -> Times:
    """Return the microseconds of each contender, warmed up, in rounds of shuffled order, without garbage collection."""
    times: Times = {contender.key: [] for contender in contenders}
    repeats = {}

    def run(contender: Contender) -> float:
        contender.setup()
        return clock(contender.call)

    for contender in contenders:
        run(contender)
        repeats[contender.key] = max(1, min(MAX_REPEATS, int(SHORT_US / max(run(contender), 1.0))))
    order, rng = list(contenders), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for contender in order:
                if repeats[contender.key] > 1:
                    run(contender)
                times[contender.key] += [run(contender) for _ in range(repeats[contender.key])]
    finally:
        gc.enable()
    return times


def peers_of(contender: Contender, contenders: Iterable[Contender], medians: Mapping[Any, float]) -> dict[str, float]:
    """Return the median of each timed peer of the contender's dtype, and of the fastest of each group."""
    peers: dict[str, float] = {}
    for peer in contenders:
        if not (peer.ours or peer.limit) and peer.dtype == contender.dtype and peer is not contender:
            us = medians.get(peer.key, math.inf)
            for name in [peer.name] + [f"best {peer.group}"] * bool(peer.group):
                peers[name] = min(peers.get(name, math.inf), us)
    return {name: us for name, us in peers.items() if us < math.inf}


def limit_us(contender: Contender, contenders: Iterable[Contender], medians: Mapping[Any, float]) -> float | None:
    """Return the microseconds of the contender's work at the best rate that a limit of its dtype reached, or None.

    With several kinds of work it is the longest of their times.
    """
    limits = [c for c in contenders if c.limit and c.dtype == contender.dtype and c.key in medians]
    rates = {unit: [c.work[unit] / medians[c.key] for c in limits if unit in c.work] for unit in contender.work}
    return max((contender.work[unit] / max(each) for unit, each in rates.items() if each), default=None)


def rows_of(case: str, passes: str, contenders: Sequence[Contender], times: Mapping[Any, Sequence[float]]) -> list[Row]:
    """Return one row a contender from its microseconds. Those that are not valid have no times."""
    quantiles = {key: np.quantile(values, (0.2, 0.5, 0.8)).tolist() for key, values in times.items() if values}
    medians, rows = {key: median for key, (_, median, _) in quantiles.items()}, list[Row]()
    for contender in contenders:
        row: Row = {"case": case, "backend": contender.name, "pass": passes, "dtype": contender.dtype}
        row |= {"median_us": None, "p20_us": None, "p80_us": None, "percent_of_limit": None, "speedup_over": {}}
        rows.append(row | {"ours": contender.ours, "valid": contender.valid, **contender.fields})
        if contender.valid and contender.key in medians:
            p20, median, p80 = (round(us, 2) for us in quantiles[contender.key])
            rows[-1] |= {"median_us": median, "p20_us": p20, "p80_us": p80}
            median = medians[contender.key]
            rows[-1] |= {unit: round(amount / median / 1e3, 3) for unit, amount in list(contender.work.items())[:1]}
            if not contender.limit:
                limit, peers = limit_us(contender, contenders, medians), peers_of(contender, contenders, medians)
                rows[-1]["percent_of_limit"] = None if limit is None else round(100 * limit / median, 1)
                rows[-1]["speedup_over"] = {name: round(us / median, 3) for name, us in peers.items()}
    return rows


def compare(case: str, passes: str, contenders: Sequence[Contender], rounds: int, clock: Clock = wall_us) -> list[Row]:
    """Time the valid contenders of a case in turns; return the rows of all."""
    valid = [contender for contender in contenders if contender.valid]
    return rows_of(case, passes, contenders, time_in_turns(valid, rounds, clock))


def copy_limit(num_bytes: float, dtype: str = "float32", device: str = "cpu") -> Contender:
    """Return the limit of memory traffic: a copy that reads and writes half of `num_bytes` each."""
    source = torch.ones(int(num_bytes) // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    work = {"gb_s": 2.0 * source.numel()}
    return Contender("copy", lambda: target.copy_(source), dtype, work, limit=True)


def process_of_its_own(start: Callable[..., object] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Return an executor of one new process, with memory and caches of its own, that first calls `start(*args)`."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=start, initargs=args)


def run_python(*arguments: object, threads: int = 1) -> None:
    """Run this Python with arguments; RuntimeError with the end of its stderr if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def fault_of(error: Exception) -> str:
    """Return an error's name and the first line of its text, without this machine's folders."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {re.sub('/[^ ]*/', '', text)}"


def finite(value: Any) -> Any:
    """Return nested dicts and lists with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, str | int | None]:
    """Return `cpu, gpu, threads, torch, triton`; gpu and triton are None where there is none."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


@cache
def commit() -> str | None:
    """Return the short hash of this checkout, `-dirty` with uncommitted changes, or None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    described = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return described.stdout.strip() or None
