"""`python -m rlv2v.evaluate RUN --data DIR`: measure a run against hidden truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlv2v.cli import Device, RunFolder, run_command
from rlv2v.errors import UserError
from rlv2v.files import write_atomically
from rlv2v.metrics import table
from rlv2v.metrics.evaluation import Split, evaluate_run
from rlv2v.metrics.learned import Name, load_networks
from rlv2v.runtime.device import set_threads


@dataclass(frozen=True)
class Args:
    """Measure a trained run on a dataset's held-out videos, at their own size, with or without a hidden truth.

    Columns for comparison: identity (the source, copied), constant (the target's mean frame), truth, and target (one
    half of the target set against the other). --fid, --fvd and --lpips name networks as TorchScript files, see
    docs/metrics.md; such a file is a program, so use only one that you trust.
    """

    run: RunFolder
    data: Path
    """Dataset folder; its <split>X (or <split>A) is translated, <split>Truth holds the truth by the same names."""
    split: Split = "test"
    """Choose settings on val, report on test."""
    json: Path | None = None
    """File for the result as JSON, in a folder that exists."""
    newest: bool = False
    """Measure the newest checkpoint's model instead of the best one by the criterion."""
    device: Device = "auto"
    threads: int = 1
    """CPU threads; 0: as many as torch finds."""
    fid: Path | None = None
    """Network of the Frechet inception distance."""
    fvd: Path | None = None
    """Network of the Frechet video distance."""
    lpips: Path | None = None
    """Network of the perceptual distance to the truth."""


def main(args: Args) -> None:
    """Evaluate, print the table, write the JSON."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file name in a folder that exists")
    set_threads(args.threads)
    paths: dict[Name, Path | None] = {"fid": args.fid, "fvd": args.fvd, "lpips": args.lpips}
    networks = load_networks({name: path for name, path in paths.items() if path})
    result = evaluate_run(args.run, args.data, args.split, newest=args.newest, device=args.device, networks=networks)
    print(table(result.rows, title=args.split))
    if args.json is not None:
        write_atomically(args.json, (json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    run_command(main, Args)
