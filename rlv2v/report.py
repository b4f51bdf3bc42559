"""`python -m rlv2v.report RUN`: one self-contained HTML page of curves, side-by-side videos, metrics and config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlv2v.cli import Device, RunFolder, run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.files import write_atomically
from rlv2v.metrics.evaluation import Split
from rlv2v.report_page import render_page


@dataclass(frozen=True)
class Args:
    """Write RUN/report/index.html: curves, side-by-side videos, the metric table and the config, in one file."""

    run: RunFolder
    data: Path | None = None
    """Dataset folder with held-out videos; default: the one that the run was trained on, if it still exists."""
    split: Split = "test"
    """Which of its sets to show and measure."""
    clips: int = 6
    """How many videos to show."""
    device: Device = "auto"


def main(args: Args) -> None:
    """Measure, translate, draw, and write the page."""
    if args.clips < 0:
        raise UserError(f"--clips: expected 0 or more, got {args.clips}")
    path = args.run / "config.json"
    if not path.is_file():
        raise UserError(f"{args.run}: expected a run folder with config.json, found none")
    config = Config.read(path)
    own = config.data.folder
    data = args.data or (own if any((own / f"{args.split}{letter}").is_dir() for letter in "XA") else None)
    page = render_page(args.run, config, data, args.split, num_videos=args.clips, device=args.device)
    folder = args.run / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "index.html", page.encode())
    print(f"{folder / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    run_command(main, Args)
