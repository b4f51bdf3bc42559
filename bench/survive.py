"""Runs that are killed at random moments, against one that is not: what is lost, and whether the folder can be used.

    python bench/survive.py [--kills 30] [--rank-kills 5] [--json F]

Each of `--kills` runs of the tiny preset is killed once (SIGKILL) at a moment drawn uniformly over the length of an
undisturbed run, start-up and warm-up included, and resumed; its final weights, targets, averages, optimisers and
replay buffers are compared bit by bit with the undisturbed run's. Each of `--rank-kills` jobs of two ranks under
torchrun loses a random rank once and has to end by itself. Checkpoints are written several times a second, so that
kills meet them.
Exit code 1 when a folder could not be used, a bit differed, or a job did not end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.cli import run_command
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError

TRAIN = [sys.executable, "-m", "rlv2v.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]


@dataclass(frozen=True)
class Args:
    """Kill runs, bring them back, compare."""

    kills: int = 30
    """Runs that are killed once each."""
    rank_kills: int = 5
    """Jobs of two ranks that lose one of them."""
    steps: int = 40
    """Steps of a run."""
    seed: int = 0
    """Of the moments and the victims."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""


def flags(data: Path, out: Path, steps: int) -> list[str]:
    """Of a run whose every step is the same whenever it is made."""
    shape = ["--preset", "tiny", "--rl-every", "1", "--replay-alpha", "0.6", "--snapshot-seconds", "0.2"]
    return [*shape, "--data", str(data), "--out", str(out), "--steps", str(steps)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )


def finish(line: list[str]) -> str | None:
    """Run to the end; what went wrong, or None."""
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    return (
        None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1][:300]}"
    )


def contents(run: Path, steps: int) -> list[Any]:
    """All that the last checkpoint holds, but the clock's reading."""
    store = Checkpoints(run, keep=1, num_replicas=1)
    state, replica = store.load(steps), store.load(steps, replica_name(0))
    state["schedule"].pop("seconds")
    return tree_flatten([state, replica])[0]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def kill_and_resume(data: Path, run: Path, steps: int, after: float) -> dict[str, Any]:
    """Kill a run `after` seconds, go on with it to its end; says where it was and what came of it."""
    process = start(TRAIN + flags(data, run, steps))
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = Checkpoints(run, keep=1, num_replicas=1).steps
    begun = (run / "config.json").is_file()
    line = [*TRAIN, "--resume", "--out", str(run)] if begun else TRAIN + flags(data, run, steps)
    return {"after_s": round(after, 2), "at": done[-1] if done else None, "fault": finish(line)}


def kill_rank(data: Path, run: Path, steps: int, after: float, victim: int) -> dict[str, Any]:
    """Kill one rank of a job `after` seconds after its first checkpoint; the job has to end by itself."""
    process = start([*TORCHRUN, f"--master-port={free_port()}", "-m", "rlv2v.train", *flags(data, run, steps)])
    store = Checkpoints(run, keep=1, num_replicas=2)
    while not store.steps and process.poll() is None:
        time.sleep(0.05)
    time.sleep(after)
    pid, at = rank_pid(process.pid, victim), store.steps[-1]
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate()
    fault = None if process.returncode == 0 else f"exit code {process.returncode}: {said[-300:]}"
    newest = store.newest()
    if fault is None and newest != steps:
        fault = f"ended at step {newest}"
    return {"after_s": round(after, 2), "at": at, "victim": victim, "killed": pid is not None, "fault": fault}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_pid(agent: int, rank: int) -> int | None:
    """The process of a rank among the children of a torchrun (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == agent and b"RANK=%d" % rank in variables:
            return int(folder.name)
    return None


def main(args: Args) -> None:
    """Kill, compare, print a table and the JSON line."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if args.steps < 2 or min(args.kills, args.rank_kills) < 0:
        raise UserError("--steps, --kills, --rank-kills: expected at least 2, 0, 0")
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "data"
        write_dataset(data, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
        finish(TRAIN + flags(data, root / "first", args.steps))  # fills the caches: later runs take alike long
        began = time.monotonic()
        if fault := finish(TRAIN + flags(data, root / "whole", args.steps)):
            raise UserError(f"the undisturbed run failed: {fault}")
        length, wanted = time.monotonic() - began, contents(root / "whole", args.steps)
        print(f"undisturbed: {length:.1f} s\ncase | after s | at step | result")
        for number in range(args.kills):
            run = root / f"kill-{number}"
            row = kill_and_resume(data, run, args.steps, rng.uniform(0.0, length))
            row |= {"case": "kill", "identical": row["fault"] is None and same(contents(run, args.steps), wanted)}
            rows.append(row)
            shutil.rmtree(run)
            result = row["fault"] or ("same" if row["identical"] else "DIFFERS")
            print(f"kill | {row['after_s']} | {row['at']} | {result}", flush=True)
        for number in range(args.rank_kills):
            row = kill_rank(data, root / f"rank-{number}", args.steps, rng.uniform(0.0, 3.0), rng.randrange(2))
            rows.append(row | {"case": "rank kill"})
            print(
                f"rank {row['victim']} of 2 | {row['after_s']} | {row['at']} | {row['fault'] or 'ended by itself'}",
                flush=True,
            )
    kills = [row for row in rows if row["case"] == "kill"]
    ranks = [row for row in rows if row["case"] == "rank kill"]
    summary = {
        "kills": len(kills),
        "unusable_folders": sum(row["fault"] is not None for row in kills),
        "identical": sum(row["identical"] for row in kills),
        "rank_kills": len(ranks),
        "ended_by_themselves": sum(row["fault"] is None and row["killed"] for row in ranks),
    }
    print(summary)
    about: dict[str, Any] = {"bench": "survive", "commit": commit(), "machine": machine(1)}
    text = json.dumps(about | {"steps": args.steps, "summary": summary, "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if summary["identical"] < len(kills) or summary["ended_by_themselves"] < len(ranks):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
