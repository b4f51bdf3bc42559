"""How long a checkpoint holds the training up: rlv2v.checkpoint.store's snapshot against torch.save on the same thread.

    python bench/checkpoint.py [--json F] [--folder .]

Networks, targets, average, optimisers and full replay buffers of both domains, at the sizes of a config. Both forms get
their state from the same `state_dict()` calls, which are timed with them, write to the same disk, and flush to it; the
runs alternate. Beside the stall: what the background writing takes from work that goes on meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import commit, machine
from torch import Tensor

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.model.build import build_nets
from rlv2v.replay import PrioritizedReplay

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "128x128 T=16": {"size": 128, "frames": 16, "replay_capacity": 256},
}
INTERVAL = 60.0  # seconds between checkpoints: Config.snapshot_seconds


@dataclass(frozen=True)
class Args:
    """Time the stall of a checkpoint."""

    case: tuple[str, ...] = tuple(CASES)
    """Which sizes: default, 128x128 T=16."""
    folder: Path = Path(".")
    """A folder on the disk to write to; what is written is removed again."""
    repeats: int = 15
    """Timed checkpoints of each form."""
    threads: int = 1
    """CPU threads of torch."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""


class Run:
    """The parts of a run that a checkpoint holds, as training has them after its first step."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        nets, targets, average = build_nets(config), build_nets(config), build_nets(config, discriminators=False)
        self.parts: dict[str, Any] = {"nets": nets, "targets": targets, "average": average}
        for name, prefixes in (("generators", "gp"), ("discriminators", "d"), ("critics", "q")):
            weights = [p for n, p in nets.named_parameters() if n[0] in prefixes]
            adam = torch.optim.AdamW(weights, fused=True)
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            adam.step()
            self.parts[f"adam_{name}"] = adam
        self.replays = {domain: full_replay(config) for domain in "xy"}
        self.nets = nets
        self.clip = torch.rand(config.data.batch_x, config.data.frames, 3, config.data.size, config.data.size)

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def replica(self) -> dict[str, Any]:
        return {f"replay_{domain}": replay.state_dict() for domain, replay in self.replays.items()}

    @torch.no_grad()
    def work(self) -> None:
        """What stands for the training that goes on: one translation."""
        self.nets.g_y(self.clip)


def full_replay(config: Config) -> PrioritizedReplay:
    """Transitions of clips of noise up to the capacity, one a clip, as most mini-batches with a new one bring."""
    rng, shape = np.random.default_rng(0), (config.data.size, config.data.size, 3)
    replay = PrioritizedReplay(config.rl.replay_capacity, shape, config.data.frames - 1)
    while len(replay) < config.rl.replay_capacity:
        clip = replay.put_clip(rng.integers(0, 256, (config.data.frames, *shape), np.uint8))
        p = int(rng.integers(1, config.data.frames))
        action = rng.integers(0, 256, shape, np.uint8)
        replay.add(state=(clip, 0, p), action=action, reward=0.0, true_frame=(clip, p), position=p + 1)
        clip.release()
    return replay


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def same(store: Checkpoints, run: Run) -> bool:
    """What was saved is what the run holds."""
    step = store.newest()
    if step is None:
        return False
    saved = tensors(store.load(step)) + tensors(store.load(step, "replica-00000"))
    held = tensors(run.state()) + tensors(run.replica())
    return len(saved) == len(held) and all(map(torch.equal, saved, held))


def compare(case: str, args: Args) -> list[dict[str, Any]]:
    """The two rows of one case; prints their lines of the table."""
    run = Run(Config.of("default", **CASES[case]))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-checkpoint-") as name:
        store, single, step = Checkpoints(Path(name), keep=1, num_replicas=1), Path(name) / "single.pt", 0

        def ours() -> None:
            nonlocal step
            step += 1
            store.save(step, run.state(), {0: run.replica()})

        def peer() -> None:
            with single.open("wb") as file:
                torch.save({"state": run.state(), "replica": run.replica()}, file)
                os.fsync(file.fileno())

        def works(number: int) -> None:
            for _ in range(number):
                run.work()

        ours()
        background = seconds(store.wait)
        valid = same(store, run)
        peer()
        num_bytes = sum(file.stat().st_size for file in (store.folder / f"{step:08d}").iterdir())
        copied = sum(t.nbytes for t in tensors(run.state()) + tensors(run.replica()))
        source, target = np.ones(copied, np.uint8), np.ones(copied, np.uint8)
        number = 2 + int(2 * background / seconds(run.work))  # work for longer than the writing takes
        times: dict[str, list[float]] = {k: [] for k in ("rlv2v", "torch.save", "copy", "background", "quiet", "busy")}
        for _ in range(args.repeats):
            times["rlv2v"].append(seconds(ours))
            times["background"].append(seconds(store.wait))
            times["torch.save"].append(seconds(peer))
            times["copy"].append(seconds(lambda: np.copyto(target, source)))
            times["quiet"].append(seconds(lambda: works(number)))
            ours()
            times["busy"].append(seconds(lambda: works(number)))
            store.wait()
    taken = statistics.median(b - q for b, q in zip(times["busy"], times["quiet"], strict=True))
    rows = []
    for form, other in (("rlv2v", "torch.save"), ("torch.save", "rlv2v")):
        p20, p50, p80 = (1e6 * q for q in statistics.quantiles(times[form], n=10)[1::3])
        ratio = statistics.median(times[other]) / statistics.median(times[form])
        row: dict[str, Any] = {"case": case, "backend": form, "pass": "stall", "dtype": "float32"}
        row |= {"median_us": round(p50), "p20_us": round(p20), "p80_us": round(p80), "percent_of_limit": None}
        row |= {"speedup_over": {other: round(ratio, 2)}, "valid": valid, "bytes": num_bytes}
        row["percent_of_interval"] = round(p50 / 1e4 / INTERVAL, 4)
        if form == "rlv2v":
            row["percent_of_limit"] = round(1e8 * statistics.median(times["copy"]) / p50, 1)
            row |= {"background_s": round(statistics.median(times["background"]), 4), "taken_s": round(taken, 4)}
            row["percent_of_interval_with_taken"] = round((p50 / 1e4 + 100 * max(taken, 0.0)) / INTERVAL, 4)
        rows.append(row)
        print(
            f"{case:12} | {form:10} | {p50:9.0f} {p20:9.0f} {p80:9.0f} | {num_bytes / 2**20:7.1f} MiB | "
            f"{row['percent_of_limit'] or '':>5} | {row['percent_of_interval']:7.4f} | {ratio:6.2f}",
            flush=True,
        )
    print(
        f"{case}: written in the background in {rows[0]['background_s']:.3f} s, which takes {taken:.3f} s from work "
        f"that goes on; with the stall {rows[0]['percent_of_interval_with_taken']:.3f} % of {INTERVAL:g} s"
    )
    return rows


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 when what was saved is not what the run held."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if args.repeats < 2 or args.threads < 1:
        raise UserError("--repeats, --threads: expected at least 2, 1")
    if unknown := set(args.case) - CASES.keys():
        raise UserError(f"--case: expected some of {', '.join(CASES)}, got {sorted(unknown)[0]!r}")
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: no such folder; create it first")
    torch.set_num_threads(args.threads)
    print(f"case | form | stall us p50 p20 p80 | written | % of a memory copy | % of {INTERVAL:g} s | x other form")
    rows = [row for case in args.case for row in compare(case, args)]
    text = json.dumps({"bench": "checkpoint", "commit": commit(), "machine": machine(args.threads), "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
