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


@dataclass(frozen=True)
class Args:
    """Measure a trained run on a dataset's held-out clips, with the source copied and the truth itself for comparison.

    The table has a row for each: model, identity (what doing nothing scores), truth (the best there is).
    """

    run: RunFolder
    data: Path
    """Dataset folder; its <split>X (or <split>A) is translated, <split>Truth holds the truth by the same names."""
    split: Split = "test"
    """Choose settings on val, report on test."""
    json: Path | None = None
    """File for the result as JSON, in a folder that exists."""
    best: bool = False
    """Measure the best checkpoint's model instead of the newest."""
    device: Device = "auto"


def main(args: Args) -> None:
    """Evaluate, print the table, write the JSON."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file name in a folder that exists")
    result = evaluate_run(args.run, args.data, args.split, best=args.best, device=args.device)
    print(table(result["rows"], title=args.split))
    if args.json is not None:
        write_atomically(args.json, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    run_command(main, Args)
