"""Kill runs at random moments and compare them with one that is not: what is lost, and can the folder be used.

    python bench/survive.py [--kills 30] [--rank-kills 5] [--json F]

Each of `--kills` runs of the tiny preset is killed once (SIGKILL) at a random moment of an undisturbed run's length and
resumed; all that its last checkpoint holds is compared bit by bit with the undisturbed run's. Each of `--rank-kills`
jobs of two ranks under torchrun loses a random rank once and has to end by itself. Checkpoints are written several
times a second, so that kills meet them. Exit code 1 if a folder could not be used, a bit differed, or a job hung.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import Args as SharedArgs
from harness import Bench, Row
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.cli import run_command
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError

TRAIN = [sys.executable, "-m", "rlv2v.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]


@dataclass(frozen=True)
class Args(SharedArgs):
    """Kill runs, resume them, compare."""

    kills: int = 30
    """Runs that are killed once each; with --quick 2."""
    rank_kills: int = 5
    """Jobs of two ranks that lose one of them; with --quick 1."""
    steps: int = 40
    """Steps of a run."""


def flags(data: Path, out: Path, steps: int) -> list[str]:
    """Return the flags of a run whose every step is the same whenever it is made."""
    shape = ["--preset", "tiny", "--rl-every", "1", "--replay-alpha", "0.6", "--snapshot-seconds", "0.2"]
    return [*shape, "--data", str(data), "--out", str(out), "--steps", str(steps)]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that all its processes can be killed."""
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, **pipes)


def finish(command: list[str]) -> str | None:
    """Run a command to its end; return what went wrong, or None."""
    process = start(command)
    _, errors = process.communicate()
    last = (errors.strip().splitlines() or [""])[-1]
    return f"exit code {process.returncode}: {last[:300]}" if process.returncode else None


def contents(run: Path, steps: int) -> list[Any]:
    """Return all that the last checkpoint holds, but the clock's reading."""
    store = Checkpoints(run, keep=1, num_replicas=1)
    state, replica = store.load(steps), store.load(steps, replica_name(0))
    state["schedule"].pop("seconds")
    return tree_leaves([state, replica])


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Return whether two checkpoints are equal bit by bit."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def kill_and_resume(data: Path, run: Path, steps: int, delay: float) -> Row:
    """Kill a run after `delay` seconds and resume it to its end; return where it was and what went wrong."""
    process = start(TRAIN + flags(data, run, steps))
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    saved = Checkpoints(run, keep=1, num_replicas=1).steps
    begun = (run / "config.json").is_file()
    command = [*TRAIN, "--resume", "--out", str(run)] if begun else TRAIN + flags(data, run, steps)
    return {"after_s": round(delay, 2), "at": saved[-1] if saved else None, "fault": finish(command)}


def kill_rank(data: Path, run: Path, steps: int, delay: float, victim: int) -> Row:
    """Kill one rank of a job `delay` seconds after its first checkpoint; the job has to end by itself."""
    process = start([*TORCHRUN, "--standalone", "-m", "rlv2v.train", *flags(data, run, steps)])
    store = Checkpoints(run, keep=1, num_replicas=2)
    while not store.steps and process.poll() is None:
        time.sleep(0.05)
    time.sleep(delay)
    pid, step = rank_pid(process.pid, victim), store.steps[-1]
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate()
    fault = f"exit code {process.returncode}: {errors[-300:]}" if process.returncode else None
    newest = store.newest()
    if fault is None and newest != steps:
        fault = f"ended at step {newest}"
    return {"after_s": round(delay, 2), "at": step, "victim": victim, "killed": pid is not None, "fault": fault}


def rank_pid(agent: int, rank: int) -> int | None:
    """Return the process of a rank among the children of a torchrun (Linux)."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    for child in children.read_text().split() if children.exists() else ():
        with suppress(OSError):
            if b"RANK=%d" % rank in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    return None


def main(args: Args) -> None:
    """Kill, compare, print the rows and the JSON line."""
    if args.steps < 2 or min(args.kills, args.rank_kills) < 0:
        raise UserError("--steps, --kills, --rank-kills: expected at least 2, 0, 0")
    if args.quick:
        args = replace(args, steps=min(args.steps, 12), kills=min(args.kills, 2), rank_kills=min(args.rank_kills, 1))
    rng = random.Random(0)
    with Bench("survive", args, steps=args.steps) as bench, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "data"
        write_dataset(data, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
        finish(TRAIN + flags(data, root / "first", args.steps))  # fills the caches: later runs take alike long
        begun = time.monotonic()
        if fault := finish(TRAIN + flags(data, root / "undisturbed", args.steps)):
            raise UserError(f"the undisturbed run failed: {fault}")
        length, expected = time.monotonic() - begun, contents(root / "undisturbed", args.steps)
        shared: Row = {"backend": "rlv2v", "ours": True}
        for number in range(args.kills):
            run = root / f"kill-{number}"
            row = kill_and_resume(data, run, args.steps, rng.uniform(0.0, length))
            row["identical"] = row["fault"] is None and same(contents(run, args.steps), expected)
            bench.add([{"case": "kill", **shared, "valid": row["identical"], **row}])
            shutil.rmtree(run)
        for number in range(args.rank_kills):
            row = kill_rank(data, root / f"rank-{number}", args.steps, rng.uniform(0.0, 3.0), rng.randrange(2))
            bench.add([{"case": "rank kill", **shared, "valid": row["fault"] is None and row["killed"], **row}])
        kills = [row for row in bench.rows if row["case"] == "kill"]
        summary = {
            "kills": args.kills,
            "unusable_folders": sum(row["fault"] is not None for row in kills),
            "identical": sum(row["valid"] for row in kills),
            "rank_kills": args.rank_kills,
            "ended_by_themselves": sum(row["valid"] for row in bench.rows if row["case"] == "rank kill"),
        }
        bench.add([], summary=summary)


if __name__ == "__main__":
    run_command(main, Args)
