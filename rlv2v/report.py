"""`python -m rlv2v.report RUN [RUN...]`: one self-contained HTML page of videos, metrics, curves and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlv2v.cli import Device, run_command
from rlv2v.errors import UserError
from rlv2v.files import write_atomically
from rlv2v.metrics.evaluation import Split
from rlv2v.report_page import open_runs, render_page
from rlv2v.runtime.device import set_threads

Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN...]", help="Run folders of `python -m rlv2v.train`; the first is the main one."),
]


@dataclass(frozen=True)
class Args:
    """Write one HTML file that shows runs side by side: videos, metrics, loss curves and settings."""

    runs: Runs
    data: Path | None = None
    """Dataset folder with held-out videos; default: the one that the first run was trained on, if it still exists."""
    split: Split = "test"
    """Which of its sets to show and measure."""
    clips: int = 12
    """How many clips to show; all are measured."""
    out: Path | None = None
    """File to write, in a folder that exists; default: report/index.html in the first run."""
    device: Device = "auto"
    threads: int = 1
    """CPU threads; 0: as many as torch finds."""


def main(args: Args) -> None:
    """Measure, translate, draw, and write the page."""
    if not args.runs:
        raise UserError("missing RUN; --help describes it")
    if args.clips < 0:
        raise UserError(f"--clips: expected 0 or more, got {args.clips}")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: expected a file name in a folder that exists")
    set_threads(args.threads)
    runs = open_runs(args.runs)
    own = runs[0].config.data.folder
    data = args.data or (own if any((own / f"{args.split}{letter}").is_dir() for letter in "XA") else None)
    page = render_page(runs, data, args.split, num_clips=args.clips, device=args.device)
    path = args.out or args.runs[0] / "report" / "index.html"
    if args.out is None:
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, page.encode())
    print(f"{path}: open it in a browser")


if __name__ == "__main__":
    run_command(main, Args)
