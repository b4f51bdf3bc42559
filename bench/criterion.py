"""Say how well each criterion without a truth ranks checkpoints and methods, beside the hidden truth.

    python bench/criterion.py synth32=runs/a synth32=runs/b graded=runs/c --json bench/results/criterion.json

A run is given with the name of its task. Its `selection.jsonl` has a line for each checkpoint: the metrics that need no
truth, and what the truth says. The checkpoints of all runs of a task, and its source, copied, are ranked by each
candidate of `rlv2v.metrics.criterion` and by the truth: the mean of the ranks by L1, PSNR and SSIM. A row has

    spearman        the rank correlation of the two over all of a task (1: the same order); `pooled` takes the ranks
                    within each task, all tasks together
    l1, psnr, ssim  the same with the ranks by one of them, mean of the tasks
    methods         that over the last checkpoints of the runs and the source, copied
    within_run      that over the checkpoints of a run, mean of the runs
    lost_db         the PSNR of a run's best checkpoint less that of the one that is chosen, mean of the runs

`newest` is no criterion: it says what is lost by taking the last checkpoint, as one does without one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from harness import Args as SharedArgs
from harness import Bench, Row

from rlv2v.cli import run_command
from rlv2v.errors import UserError
from rlv2v.metrics import METRICS
from rlv2v.metrics.criterion import CRITERIA, DEFAULT
from rlv2v.runtime.log import read_metrics

TRUTHS = ("l1", "psnr", "ssim")
COPY = "identity"


@dataclass(frozen=True)
class Args(SharedArgs):
    """Compare the criteria with the truth on the checkpoints of runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """TASK=RUN, a run folder with the name of its task; several of a task are ranked together."""


@dataclass(frozen=True)
class Checkpoint:
    """Hold one line of a run: what needs no truth, of it and of the source, copied, and what the truth says."""

    run: str
    step: int
    own: dict[str, Any]
    identity: dict[str, Any]
    truth: dict[str, float]

    def score(self, name: str) -> float:
        """Return a candidate's number, the lower the better."""
        return -float(self.step) if name == "newest" else CRITERIA[name].score(self.own, self.identity)


def read_runs(arguments: Sequence[str]) -> dict[str, list[Checkpoint]]:
    """Return the checkpoints by task, with one of the source, copied.

    Raises:
        UserError: not TASK=RUN, or a run without lines or without a truth.
    """
    tasks: dict[str, list[Checkpoint]] = defaultdict(list)
    for argument in arguments:
        task, _, run = argument.partition("=")
        if not task or not run:
            raise UserError(f"expected TASK=RUN, got {argument}")
        path = Path(run) / "selection.jsonl"
        lines: list[dict[str, Any]] = [line for line in read_metrics(path) if "metrics" in line]
        if not lines:
            raise UserError(f"{path}: expected a line for each checkpoint, got none; train with this version of rlv2v")
        if any(line["truth"] is None for line in lines):
            raise UserError(f"{path}: expected what a truth says of each checkpoint; the task needs valX and valTruth")
        first = lines[0]
        if not tasks[task]:
            tasks[task].append(Checkpoint(COPY, 0, first["identity"], first["identity"], first["identity_truth"]))
        tasks[task] += [Checkpoint(run, li["step"], li["metrics"], li["identity"], li["truth"]) for li in lines]
    if not tasks:
        raise UserError("expected at least one TASK=RUN, got none")
    return tasks


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rank of each value from 0 to 1, the mean of equals."""
    array = np.round(np.asarray(values, dtype=np.float64), 9)
    below, equal = ((op(array[:, None], array[None])).sum(axis=1) for op in (np.greater, np.equal))
    return np.asarray((below + (equal - 1) / 2) / max(1, len(array) - 1))


def truth_ranks(checkpoints: Sequence[Checkpoint], metrics: Sequence[str] = TRUTHS) -> np.ndarray:
    """Return the rank of each checkpoint by the truth, 0 the best: of the mean of its ranks by the metrics."""
    return ranks(np.mean([ranks([METRICS[n].badness(c.truth[n]) for c in checkpoints]) for n in metrics], axis=0))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the correlation of two lists of ranks; None where one of them does not order anything."""
    if len(a) < 3 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(checkpoints: Sequence[Checkpoint], name: str, metrics: Sequence[str] = TRUTHS) -> float | None:
    """Return Spearman's rank correlation of a candidate with the truth."""
    return correlation(ranks([c.score(name) for c in checkpoints]), truth_ranks(checkpoints, metrics))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def by_run(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Return the checkpoints of each run."""
    return [
        [c for c in checkpoints if c.run == run] for run in dict.fromkeys(c.run for c in checkpoints) if run != COPY
    ]


def over_methods(checkpoints: Sequence[Checkpoint], name: str) -> float | None:
    """Return the correlation over the last checkpoint of each run, and the source, copied."""
    return spearman([c for c in checkpoints if c.run == COPY] + [max(r, key=newest) for r in by_run(checkpoints)], name)


def newest(checkpoint: Checkpoint) -> int:
    """Return the step."""
    return checkpoint.step


def lost_db(run: Sequence[Checkpoint], name: str) -> float:
    """Return the PSNR of the run's best checkpoint less that of the one that a candidate chooses."""
    chosen = min(run, key=lambda c: c.score(name))
    return max(c.truth["psnr"] for c in run) - chosen.truth["psnr"]


def rows_of(tasks: dict[str, list[Checkpoint]]) -> list[Row]:
    """Return a row for each task and candidate, and for all tasks together."""
    rows: list[Row] = []
    for name in (*CRITERIA, "newest"):
        formula = "the last checkpoint" if name == "newest" else CRITERIA[name].formula
        head = {"backend": name, "formula": formula, "is_default": name == DEFAULT}
        own: list[Row] = []
        for task, checkpoints in tasks.items():
            runs = by_run(checkpoints)
            row: Row = {"case": task, **head, "num": len(checkpoints), "num_runs": len(runs)}
            row["spearman"] = spearman(checkpoints, name)
            row |= {metric: spearman(checkpoints, name, [metric]) for metric in TRUTHS}
            row["methods"] = over_methods(checkpoints, name)
            row["within_run"] = mean([spearman(run, name) for run in runs])
            own.append(row | {"lost_db": mean([lost_db(run, name) for run in runs])})
        rows += own
        scores, truths = (
            np.concatenate([function(checkpoints) for checkpoints in tasks.values()])
            for function in (scorer(name), truth_ranks)
        )
        pooled: Row = {"case": "pooled", **head, "num": len(scores), "num_runs": sum(r["num_runs"] for r in own)}
        pooled["spearman"] = correlation(scores, truths)
        rows.append(
            pooled | {key: mean([row[key] for row in own]) for key in (*TRUTHS, "methods", "within_run", "lost_db")}
        )
    return rows


def scorer(name: str) -> Callable[[Sequence[Checkpoint]], np.ndarray]:
    """Return the function that gives a task's ranks by a candidate."""
    return lambda checkpoints: ranks([checkpoint.score(name) for checkpoint in checkpoints])


def main(args: Args) -> None:
    """Read the runs, print the rows and the JSON line."""
    tasks = read_runs(args.runs)
    with Bench("criterion", args, default=DEFAULT, truth=list(TRUTHS)) as bench:
        bench.add(rows_of(tasks))


if __name__ == "__main__":
    run_command(main, Args)
