"""Train and evaluate methods at a fixed budget: the command behind the README's table.

    python bench/quality.py --case synth32 --methods default cyclegan --seeds 0 1 2

Trains every (method, seed) with `python -m rlv2v.train` and evaluates each on a split. Exit code 1 if a run failed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import real_pair
from harness import Args as SharedArgs
from harness import Bench, Row, run_python

from rlv2v.cli import run_command
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError, one_line
from rlv2v.metrics import METRICS
from rlv2v.metrics.evaluation import evaluate_run

Method = Literal["default", "bf16", "paper", "cyclegan", "no-rl", "tiny"]
FLAGS: dict[Method, list[str]] = {
    "default": ["--preset", "default"],
    "bf16": ["--preset", "default", "--precision", "bf16"],
    "paper": ["--preset", "paper"],
    "cyclegan": ["--preset", "default", "--method", "cyclegan"],
    "no-rl": ["--preset", "default", "--no-rl"],
    "tiny": ["--preset", "tiny"],
}
BUDGETS = {32: 300.0, 64: 600.0}
"""Seconds, by size."""


@dataclass(frozen=True)
class Args(SharedArgs):
    """Train, evaluate and compare methods at a fixed budget; --quick: one seed, 10 seconds."""

    case: str = "synth32"
    """synth<N>, the synthetic set at NxN, or real<N>, the pair of bench/real_pair.py at short side N."""
    methods: tuple[Method, ...] = ("default", "cyclegan")
    """What to train: default, bf16, paper, cyclegan, no-rl, tiny."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each method and seed."""
    budget: float | None = None
    """Seconds of training a run; default: 300 at 32 pixels, 600 at 64."""
    split: Literal["val", "test"] = "test"
    """Settings are chosen on val, reported on test."""
    frames: int = 8
    """Frames a clip."""
    out: Path = Path("runs/quality")
    """Folder for the data and the runs; runs that are there already are an error."""
    twice: bool = False
    """Train each run on to twice its budget for a second row."""


def make_case(args: Args) -> tuple[Path, int]:
    """Return the dataset folder of the case, made if it does not exist, and the size in pixels."""
    named = re.fullmatch(r"(synth|real)(\d+)", args.case)
    if not named:
        raise UserError(f"--case: expected synth<N> or real<N>, got {one_line(args.case)}")
    size, data = int(named[2]), args.out / f"data-{args.case}-{args.frames}"
    if not data.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        if named[1] == "synth":
            write_dataset(data, size=size, frames=args.frames)
        else:
            real_pair.main(real_pair.Args(out=data, frames=args.frames, size=size))
    return data, size


def run_rows(method: Method, seed: int, run: Path, args: Args, data: Path, size: int, budget: float) -> list[Row]:
    """Train and evaluate one run: a row for each budget, and what copying the source scores.

    A failed run is a row with `valid: false`.
    """
    flags = [*FLAGS[method], "--data", str(data), "--size", str(size), "--frames", str(args.frames)]
    flags += ["--seed", str(seed)]
    if args.case.startswith("synth") and method != "paper":
        flags += ["--augment", "dihedral"]  # its shapes have no up and down
    rows, seconds = list[Row](), 0.0
    for total in (budget, 2 * budget) if args.twice else (budget,):
        row: Row = {"case": args.case, "method": method, "seed": seed, "budget_s": total, "ours": True}
        try:
            start, common = time.perf_counter(), ("--out", run, "--budget", f"{total:g}", "--threads", args.threads)
            run_python("-m", "rlv2v.train", *common, *flags, threads=args.threads)
            seconds += time.perf_counter() - start  # with start-up
            result = evaluate_run(run, data, args.split, device="cpu", progress=False)
        except (RuntimeError, UserError) as error:
            print(f"{method} seed {seed}: {error}", file=sys.stderr)
            row |= {"valid": False, "steps": None, "seconds": None, **dict.fromkeys(METRICS)}
            return [*rows, row]
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        rows.append(row | {"steps": int(last["step"]), "seconds": round(seconds, 1), **result["rows"]["model"]})
        flags = ["--resume"]
    copied: Row = {"case": args.case, "method": "identity", "seed": None, "budget_s": 0.0, "steps": 0, "seconds": 0.0}
    return [*rows, copied | result["rows"]["identity"]]


def main(args: Args) -> None:
    """Make the data, run all methods and seeds, print the rows and the JSON line."""
    if args.quick:
        args = replace(args, seeds=args.seeds[:1], budget=10.0)
    if args.budget is not None and args.budget <= 0:
        raise UserError(f"--budget: expected seconds > 0, got {args.budget:g}")
    runs = {(m, s): args.out / f"{args.case}-{m}-{s}" for m in args.methods for s in args.seeds}
    if taken := [run.name for run in runs.values() if run.exists()]:
        raise UserError(f"--out {one_line(args.out)}: already holds {', '.join(taken)}; choose another folder")
    with Bench("quality", args, split=args.split) as bench:
        data, size = make_case(args)
        budget = BUDGETS.get(size, BUDGETS[64]) if args.budget is None else args.budget
        copied = list[Row]()
        for (method, seed), run in runs.items():
            rows = run_rows(method, seed, run, args, data, size, budget)
            bench.add(row for row in rows if row["method"] != "identity")
            copied = [row for row in rows if row["method"] == "identity"] or copied
        bench.add(copied)


if __name__ == "__main__":
    run_command(main, Args)
