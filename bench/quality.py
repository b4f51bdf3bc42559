"""Train and evaluate methods at a fixed budget: the command behind the README's table.

    python bench/quality.py --case synth32 --methods default cyclegan --seeds 0 1 2
    python bench/quality.py --case region64 --methods default cyclegan --lr-search 2e-4 6e-4 2e-3
    python bench/quality.py --case graded64 --methods default cyclegan --few 1 2 5 20
    python bench/quality.py --case region32 --methods ladder --steps 100
    python bench/quality.py --case mine --methods default --size 64

Trains every (method, number of target clips, seed) with `python -m rlv2v.train` and measures each on a split with
`python -m rlv2v.evaluate`, at the videos' own size. bench/quality_cases.py says what the cases are. After an
interruption the same command goes on: finished runs are not trained again (bench/quality_runs.py). Exit code 1 if a
run failed, 130 if the bench was asked to end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import quality_few
from harness import Args as SharedArgs
from harness import Bench, Row
from quality_cases import Case, digest, few_shot, has_truth, make_case, pick_split
from quality_ladder import LADDER
from quality_runs import Run, Unit, Workers, code_digest, rows_of_run

from rlv2v.cli import run_command
from rlv2v.config import Config, check_name
from rlv2v.data.synth import Reading
from rlv2v.errors import UserError, one_line
from rlv2v.method.baselines import METHODS
from rlv2v.metrics import METRICS
from rlv2v.metrics.evaluation import Split

OURS = {
    "default": ("--preset", "default"),
    "rl": ("--preset", "default", "--rl", "--l-tau", "10", "--l-rc", "10"),
    "paint": ("--preset", "paint"),
    "paper": ("--preset", "paper"),
    "paper-letter": ("--preset", "paper-letter"),
    "bf16": ("--preset", "default", "--precision", "bf16"),
    "laptop": ("--preset", "laptop"),
    "tiny": ("--preset", "tiny"),
    **LADDER,
}
FLAGS: dict[str, tuple[str, ...]] = OURS | {
    name: ("--preset", "default", "--method", name) for name in METHODS if name != "rlv2v"
}
"""The flags of each method: ours in several settings, and the baselines of the registry."""
TIMELESS = ("default", "rl", "bf16", "laptop", *LADDER)
"""Of ours, those that do not know by themselves that clips start together."""
BUDGET = 300.0  # seconds


@dataclass(frozen=True)
class Args(SharedArgs):
    """Train, evaluate and compare methods at a fixed budget; --quick: one seed, 10 seconds."""

    case: str = "synth32"
    """synth<N>, cue<N>: the synthetic set at NxN. graded<N>, region<N>, texture<N>, colourise<N>: real footage with a
    hidden truth, trained at NxN. Else a dataset folder: trainX, trainY, valX, perhaps trainZ, trainS, testX."""
    reading: Reading = "ours"
    """Of the synthetic set; paper: what the paper's words say."""
    methods: tuple[str, ...] = ("default", "cyclegan")
    """What to train: default, rl (with P and the policy gradient), laptop, paint, paper, bf16, tiny, a baseline's name,
    or ladder: the steps from paper to default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each method and seed; the synthetic sets are drawn by it too."""
    few: tuple[int, ...] = ()
    """Train on so many clips of Y and Z together, once for each number; without it on all."""
    lr_search: tuple[float, ...] = ()
    """Train each method at each of these learning rates with the first seed, choose on val, report the best on the
    split; without it a method has its own."""
    select: str = ""
    """Metric of that choice and of the few-shot curve; default: psnr where there is a truth, else patch_distance."""
    budget: float | None = None
    """Seconds of training a run; default: 300."""
    steps: int | None = None
    """Length of a run in steps instead."""
    split: Literal["val", "test"] = "test"
    """Settings are chosen on val, reported on test."""
    frames: int = 8
    """Frames a clip."""
    size: int | None = None
    """Side of the training crops of a dataset folder; default: 64."""
    stored: int | None = None
    """Short side of the real footage as it is stored and measured; default: as it is trained."""
    out: Path = Path("runs/quality")
    """Folder for the data and the runs; what is finished there is not done again."""
    twice: bool = False
    """Train each run on to twice its budget for a second row."""
    jobs: int = 1
    """Runs at a time."""

    def check(self) -> Args:
        """Raise UserError for a flag that is out of range; return the arguments, changed by --quick."""
        args = replace(self, seeds=self.seeds[:1], budget=10.0, steps=None) if self.quick else self
        named = ([*LADDER] if name == "ladder" else [name] for name in args.methods)
        args = replace(args, methods=tuple(name for names in named for name in names))
        if args.steps is not None and (args.steps < 1 or args.budget is not None):
            raise UserError(f"--steps: expected at least 1, without --budget, got {args.steps}")
        if args.budget is not None and args.budget <= 0:
            raise UserError(f"--budget: expected seconds > 0, got {args.budget:g}")
        if args.jobs < 1:
            raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
        for name in args.methods:
            check_name("methods", name, FLAGS)
        if args.select:
            check_name("select", args.select, METRICS)
        if wrong := [value for value in args.lr_search if value <= 0]:
            raise UserError(f"--lr-search: expected learning rates > 0, got {wrong[0]:g}")
        if args.twice and args.lr_search:
            raise UserError("--twice: expected no --lr-search with it")
        for flag in ("methods", "seeds", "few", "lr_search"):
            values = getattr(args, flag)
            if len(set(values)) < len(values) or (not values and flag in ("methods", "seeds")):
                got = " ".join(map(str, values)) or "none"
                raise UserError(f"--{flag.replace('_', '-')}: expected values that differ, got {got}")
        return args


class Plan:
    """Say which runs there are: make their data, and give each run its flags and fingerprint."""

    def __init__(self, args: Args, case: Case) -> None:
        self.args, self.case, self.code = args, case, code_digest()
        self.digest = cache(digest)
        budget = float(args.steps or 0) or (BUDGET if args.budget is None else args.budget)
        self.budgets = (budget, 2 * budget) if args.twice else (budget,)
        self.data = {seed: case.data(args.out, seed) for seed in args.seeds}
        data = self.data[args.seeds[0]]
        self.split: Split = pick_split(data, args.split)
        self.search_split: Split = pick_split(data, "val") if args.lr_search else self.split
        truth = has_truth(data, self.search_split)
        self.select = args.select or ("psnr" if truth else "patch_distance")
        if METRICS[self.select].needs & {"truth", "synthetic"} and not truth:
            raise UserError(f"--select {self.select}: expected a metric without truth, as {one_line(data)} has none")

    def run(self, method: str, few: int | None, seed: int, lr: float | None) -> Run:
        """Return one run, with its data made."""
        case, args = self.case, self.args
        data = self.data[seed] if few is None else few_shot(self.data[seed], few, args.out)
        flags = [
            *FLAGS[method],
            "--size",
            case.size,
            "--frames",
            case.frames,
            "--seed",
            seed,
            "--augment",
            case.augment,
            *(["--chrono"] if case.starts_together and method in TIMELESS else []),
        ]
        flags += [] if lr is None else ["--lr", f"{lr:g}", "--disc-lr", f"{lr:g}"]
        shown = f"{case.name}-{args.steps}steps" if args.steps else case.name
        name = "-".join([shown, method, *([f"few{few}"] if few else []), *([f"lr{lr:g}"] if lr else []), str(seed)])
        row = {"case": shown, "method": method, "seed": seed, "few": few, "lr": lr}
        digests = {"data": self.digest(data, case.frames), "code": self.code}
        stored = {"measured_on": self.digest(self.data[seed], case.frames)}
        flags_text = tuple(map(str, flags))
        unit: Unit = "steps" if args.steps else "budget"
        return Run(args.out / name, data, flags_text, row, self.budgets, args.threads, digests | stored, unit)

    def best_lr(self, rows: list[Row], method: str, few: int | None) -> float | None:
        """Return the learning rate of the best row of a search; the first one's where none has a value."""
        metric = METRICS[self.select]
        own = [r for r in rows if (r["method"], r.get("few")) == (method, few) and r.get(self.select) is not None]
        best: Any = min(own, key=lambda row: metric.badness(row[self.select]), default={"lr": self.args.lr_search[0]})
        return best["lr"]


def main(args: Args) -> None:
    """Make the data, run all methods and seeds, print the rows and the JSON line."""
    args = args.check()
    case = make_case(args.case, frames=args.frames, reading=args.reading, size=args.size, stored=args.stored)
    Config.of("default", size=case.size, frames=case.frames).check()
    plan = Plan(args, case)
    if plan.split != args.split:
        print(f"{case.name}: no {args.split}X; measured on valX", file=sys.stderr)
    few: list[int | None] = [*args.few] or [None]
    groups = [(method, num) for num in few for method in args.methods]
    references = dict[str, Row]()

    def collect(runs: list[Run], split: Split, *, search: bool = False) -> None:
        for run in runs:
            run.journal()  # what is refused is refused before anything is trained
        job = lambda run: rows_of_run(run, plan.data[run.row["seed"]], split, workers, search=search)  # noqa: E731
        for rows in workers.each(job, runs):
            bench.add(row for row in rows if row["method"] in FLAGS)
            if not search:
                for row in rows:
                    if row["method"] not in FLAGS:
                        references.setdefault(row["method"], row)

    with Bench("quality", args, split=plan.split, select=plan.select) as bench:
        try:
            with Workers(args.jobs, args.threads) as workers:
                chosen: dict[tuple[str, int | None], float | None] = dict.fromkeys(groups)
                if args.lr_search:
                    tried = [plan.run(m, n, args.seeds[0], lr) for m, n in groups for lr in args.lr_search]
                    collect(tried, plan.search_split, search=True)
                    chosen = {group: plan.best_lr(bench.rows, *group) for group in groups}
                collect([plan.run(m, n, s, chosen[m, n]) for m, n in groups for s in args.seeds], plan.split)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
        bench.add(references.values())
        if args.few:
            found = quality_few.curves(bench.rows, plan.select)
            print(quality_few.table(found, plan.select))
            quality_few.draw(found, plan.select, case.name, args.out / f"{case.name}-few.png")


if __name__ == "__main__":
    run_command(main, Args)
