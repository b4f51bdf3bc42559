"""`python -m rlv2v.synth OUT`: write the paper's synthetic dataset as video files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from rlv2v.cli import run_command
from rlv2v.data.synth import Counts, Reading, Switch, write_dataset


@dataclass(frozen=True)
class Args:
    """Write the paper's synthetic dataset: rectangles on black (X) that should move to Y's blue-then-red background."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to create; refused when it already holds something."""
    size: int = 32
    """Height and width of the videos, pixels."""
    frames: int = 8
    """Frames of a clip, one file each."""
    seed: int = 0
    """Another seed gives another dataset; the same one gives the same pixels."""
    reading: Reading = "ours"
    """What lies in Z and S. ours: rectangles on Y's background, as the paper's equations say. paper: circles, in Z on
    black, as its section 6.1 says."""
    switch: Switch = "half"
    """When Y's background turns red. half: in the middle of each clip. crossing: when the object's centre crosses the
    vertical middle of the frame, at another time in each clip; train with --augment flip or none."""
    counts: Counts = field(default_factory=Counts)
    """How much of each set."""


def main(args: Args) -> None:
    """Write the set and say where it is."""
    write_dataset(
        args.out,
        size=args.size,
        frames=args.frames,
        seed=args.seed,
        counts=args.counts,
        reading=args.reading,
        switch=args.switch,
    )
    print(f"{args.out}: {args.size}x{args.size}, {args.frames} frames a clip; train with --data {args.out}")


if __name__ == "__main__":
    run_command(main, Args)
