"""Time how long a checkpoint holds the training up: `Checkpoints` against torch.save on the same thread.

    python bench/checkpoint.py [--json F] [--folder .]

Networks, targets, average, optimisers and full replay buffers of both domains. Both forms get their state from the same
`state_dict()` calls, which are timed with them, and flush to the same disk. The limit is a copy of the state in memory.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench, Contender, Row, TimedArgs, compare, copy_limit
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.step import Algorithm

CASES: dict[str, dict[str, Any]] = {
    "default": {"rl": True},
    "128x128 T=16": {"rl": True, "size": 128, "frames": 16, "replay_capacity": 256},
}


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time the stall of a checkpoint."""

    case: tuple[str, ...] = tuple(CASES)
    """Which sizes: default, 128x128 T=16."""
    folder: Path = Path(".")
    """A folder on the disk to write to; what is written is removed again."""


def full_run(config: Config) -> Algorithm:
    """Return a run whose optimisers have their moments and whose replay buffers are full of noise.

    One transition a clip, as most mini-batches with a new one bring.
    """
    run = Algorithm(config.replace(replicas=1), torch.device("cpu"))
    for step in run.optimizer_steps.values():
        step(torch.stack([weight.sum() for weight in step.weights]).sum())
    size = config.data.size
    rng, shape = np.random.default_rng(0), (size.height, size.width, 3)
    for replay in run.replays()[0].values():
        while len(replay) < replay.capacity:
            clip = replay.put_clip(rng.integers(0, 256, (config.data.frames, *shape), np.uint8))
            p = int(rng.integers(1, config.data.frames))
            action = rng.integers(0, 256, shape, np.uint8)
            replay.add(state=(clip, 0, p), action=action, reward=0.0, true_frame=(clip, p), position=p + 1)
            clip.release()
    return run


def states(run: Algorithm) -> list[dict[str, Any]]:
    """Return the state that all ranks share, and that of the replica."""
    return [{name: part.state_dict() for name, part in parts.items()} for parts in (run.state_parts, run.replays()[0])]


def tensors(states: Any) -> list[Tensor]:
    """Return every tensor of the states, in order."""
    return [leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor)]


def same(store: Checkpoints, run: Algorithm) -> bool:
    """Return whether the newest checkpoint is what the run holds."""
    step = store.newest()
    if step is None:
        return False
    saved, held = tensors([store.load(step), store.load(step, replica_name(0))]), tensors(states(run))
    return len(saved) == len(held) and all(map(torch.equal, saved, held))


def case_rows(case: str, args: Args) -> list[Row]:
    """Check and time the two forms at one size."""
    run = full_run(Config.of("paint", **CASES[case]))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-checkpoint-") as name:
        store, single, steps = Checkpoints(Path(name), keep=1, num_replicas=1), Path(name) / "single.pt", count(1)

        def ours() -> None:
            shared, replica = states(run)
            store.save(next(steps), shared, {0: replica})

        def peer() -> None:
            with single.open("wb") as file:
                torch.save(states(run), file)
                os.fsync(file.fileno())

        ours()
        store.wait()
        valid = same(store, run)
        work = {"gb_s": 2.0 * sum(tensor.nbytes for tensor in tensors(states(run)))}
        contenders = [
            Contender("rlv2v", ours, work=work, ours=True, valid=valid, setup=store.wait),
            Contender("torch.save", peer, setup=store.wait),
            replace(copy_limit(work["gb_s"]), setup=store.wait),  # nobody runs beside the thread that writes
        ]
        rows = compare(case, "stall", contenders, args.num_rounds)
        store.wait()
    return rows


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 if what was saved is not what the run held."""
    if unknown := set(args.case) - CASES.keys():
        raise UserError(f"--case: expected some of {', '.join(CASES)}, got {sorted(unknown)[0]!r}")
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: no such folder; create it first")
    with Bench("checkpoint", args) as bench:
        for case in args.case[:1] if args.quick else args.case:
            bench.add(case_rows(case, args))


if __name__ == "__main__":
    run_command(main, Args)
