"""`python -m rlv2v.export RUN OUT`: write a run's generator as ONNX and `torch.export`, to play it without rlv2v."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import RunFolder, run_command
from rlv2v.model.graphs import write_graphs


@dataclass(frozen=True)
class Args:
    """Write a trained generator as graphs that translate frame by frame, for ONNX Runtime and torch; docs/export.md."""

    run: RunFolder
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for start.onnx, step.onnx, start.pt2 and step.pt2; it may exist, those files may not."""
    direction: Literal["x2y", "y2x"] = "x2y"
    """x2y: source domain to target domain; y2x: back."""
    newest: bool = False
    """Use the newest checkpoint's model instead of the best one by the criterion."""


def main(args: Args) -> None:
    """Load the generator, write its graphs, and say where they are."""
    g, config = load_translator(args.run, args.direction, newest=args.newest)
    about = {"direction": args.direction}
    for path in write_graphs(g, config.data.frames, config.data.size.short_side, args.out, about):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main, Args)
