"""`python -m rlv2v.prepare SRC OUT --size 64`: turn any videos into a dataset folder that loads fast.

SRC is a dataset folder (`trainX trainY trainZ trainS valX ...`; CycleGAN's `trainA trainB testA testB` become X and Y)
or one flat folder of videos, frame folders or numbered images, which goes into `--into`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlv2v.cli import SizeFlag, run_command
from rlv2v.crop_size import CropSize
from rlv2v.data.prepare import prepare_dataset


@dataclass(frozen=True)
class Args:
    """Prepare videos for training: resized, upright, at a constant rate, in a form that loads fast."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Dataset folder (trainX, trainY ...; CycleGAN's trainA, trainB), or a folder of videos, frame folders, images."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the prepared dataset; the same command again goes on where it was stopped."""
    size: SizeFlag = field(default=CropSize(64, 64))
    """That of training, in pixels: each video just covers it, and its aspect stays; 64 is a short side of 64. `video`
    uses at least 128 a side, so that GPUs can decode it."""
    store: Literal["auto", "raw", "video"] = "auto"
    """raw: a .npy for each video, the fastest. video: VP9, far smaller. auto: raw if it fits in half the free disk."""
    fps: float | None = None
    """Frames a second of the output (nearest frame in time); default: each video's own, the average where it varies."""
    frames: int = 1
    """Leave out what is shorter than this many frames after preparation."""
    into: str = "trainX"
    """The set that a flat folder goes into: trainX, trainY, trainZ, trainS, valX, testX ..."""
    jobs: int = 0
    """Files at a time; 0: one for each core."""
    yes: bool = False
    """Do not ask when the disk seems too small."""


def main(args: Args) -> None:
    """Prepare the dataset."""
    prepare_dataset(**vars(args))


if __name__ == "__main__":
    run_command(main, Args)
