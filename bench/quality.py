"""Train and evaluate methods at a fixed budget: the command behind the README's table.

    python bench/quality.py --case synth32 --methods default cyclegan --seeds 0 1 2

Trains every (method, seed) with `python -m rlv2v.train`, evaluates each on a split, and prints a markdown table and the
JSON line. `--twice` trains each run on to twice its budget for a second row. Exit code 1 if a run failed.

Cases: `synth<N>` the synthetic set at NxN; `real<N>` the day-to-night pair of bench/real_pair.py at short side N; or a
dataset folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import real_pair
from harness import Args as SharedArgs
from harness import Bench, Row

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
    """synth<N>, real<N> (N: size in pixels), or a dataset folder."""
    methods: tuple[Method, ...] = ("default", "cyclegan")
    """What to train: default, bf16, paper, cyclegan, no-rl, tiny."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each method and seed."""
    budget: float | None = None
    """Seconds of training a run; default: 300 at 32 pixels, 600 at 64."""
    split: Literal["val", "test"] = "test"
    """Settings are chosen on val, reported on test."""
    size: int | None = None
    """Size of the clips, pixels; default: the case's, 64 for a folder."""
    frames: int = 8
    """Frames a clip."""
    out: Path = Path("runs/quality")
    """Folder for the data and the runs; runs that are there already are an error."""
    twice: bool = False
    """Train each run on to twice its budget for a second row."""
    jobs: int = 1
    """Runs at once; more than the machine's cores / threads spoils budgets in seconds."""


@dataclass(frozen=True)
class Job:
    """Hold one training run to do."""

    method: Method
    seed: int
    run: Path


def make_case(args: Args) -> tuple[Path, int]:
    """Return the dataset folder of the case, made if it does not exist, and the size in pixels."""
    folder = Path(args.case)
    if folder.is_dir():
        return folder, args.size or 64
    named = re.fullmatch(r"(synth|real)(\d+)", args.case)
    if not named:
        raise UserError(f"--case: expected synth<N>, real<N> or a dataset folder, got {one_line(args.case)}")
    size = int(named[2])
    if args.size not in (None, size):
        raise UserError(f"--size: the case {args.case} is of size {size}, got {args.size}; leave --size out")
    data = args.out / f"data-{args.case}-{args.frames}"
    if not data.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        if named[1] == "synth":
            write_dataset(data, size=size, frames=args.frames)
        else:
            real_pair.main(real_pair.Args(out=data, frames=args.frames, size=size))
    return data, size


def train(job: Job, args: Args, data: Path, size: int, budget: float, *, resume: bool) -> float:
    """Run `python -m rlv2v.train` to its budget; return wall seconds with start-up. RuntimeError if it fails."""
    command = [sys.executable, "-m", "rlv2v.train", "--out", str(job.run), "--budget", f"{budget:g}"]
    command += ["--threads", str(args.threads)]
    if resume:
        command += ["--resume"]
    else:
        command += [*FLAGS[job.method], "--data", str(data), "--size", str(size), "--frames", str(args.frames)]
        command += ["--no-warmup-cache", "--seed", str(job.seed)]
        if args.case.startswith("synth") and job.method != "paper":
            command += ["--augment", "dihedral"]  # its shapes have no up and down
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def run_job(job: Job, args: Args, data: Path, size: int, budget: float) -> list[Row]:
    """Train and evaluate one run: a row, and with --twice a second one; a failed run is a row with `valid: false`."""
    rows, seconds = list[Row](), 0.0
    for total in (budget, 2 * budget) if args.twice else (budget,):
        row: Row = {"case": args.case, "method": job.method, "seed": job.seed, "budget_s": total, "ours": True}
        rows.append(row)
        try:
            seconds += train(job, args, data, size, total, resume=total > budget)
            result = evaluate_run(job.run, data, args.split, device="cpu", progress=False)
        except (RuntimeError, UserError) as error:
            print(f"{job.method} seed {job.seed}: {error}", file=sys.stderr)
            row |= {"valid": False, "steps": None, "seconds": None, **dict.fromkeys(METRICS)}
            break
        last = json.loads((job.run / "metrics.jsonl").read_text().splitlines()[-1])
        row |= {"steps": int(last["step"]), "seconds": round(seconds, 1), **result["rows"]["model"]}
        (job.run / "evaluation.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        print(table_line(row), file=sys.stderr, flush=True)
    return rows


def identity_rows(runs: list[Path], case: str) -> list[Row]:
    """Return what copying the source scores, from the first run that was evaluated."""
    for run in runs:
        if (run / "evaluation.json").is_file():
            metrics = json.loads((run / "evaluation.json").read_text())["rows"]["identity"]
            row: Row = {"case": case, "method": "identity", "seed": None, "budget_s": 0.0, "steps": 0, "seconds": 0.0}
            return [row | metrics]
    return []


def table_line(row: Row) -> str:
    """Return a row of the markdown table."""
    cells = [row["method"], row["seed"], f"{row['budget_s']:g}", row["steps"], row["seconds"]]
    text = ["-" if cell is None else str(cell) for cell in cells]
    return "| " + " | ".join(text + [metric.format(row[key]) for key, metric in METRICS.items()]) + " |"


def main(args: Args) -> None:
    """Make the data, run the jobs, print the table and the JSON line."""
    if args.quick:
        args = replace(args, seeds=args.seeds[:1], budget=10.0)
    if args.jobs < 1:
        raise UserError(f"--jobs: expected 1 or more, got {args.jobs}")
    if args.budget is not None and args.budget <= 0:
        raise UserError(f"--budget: expected seconds > 0, got {args.budget:g}")
    with Bench("quality", args, split=args.split) as bench:
        jobs = [Job(m, s, args.out / f"{Path(args.case).name}-{m}-{s}") for m in args.methods for s in args.seeds]
        if taken := [job.run.name for job in jobs if job.run.exists()]:
            raise UserError(f"--out {one_line(args.out)}: already holds {', '.join(taken)}; choose another folder")
        data, size = make_case(args)
        budget = BUDGETS.get(size, BUDGETS[64]) if args.budget is None else args.budget
        with ThreadPoolExecutor(args.jobs) as pool:
            for rows in pool.map(lambda job: run_job(job, args, data, size, budget), jobs):
                bench.add(rows)
        bench.add(identity_rows([job.run for job in jobs], args.case))
        header = ["method", "seed", "budget s", "steps", "seconds", *(key.replace("_", " ") for key in METRICS)]
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
        print("\n".join(table_line(row) for row in bench.rows))


if __name__ == "__main__":
    run_command(main, Args)
