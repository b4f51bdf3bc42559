"""Draw the README's picture: a held-out clip, what each run makes of it, and the hidden truth; a frame a column.

    python bench/picture.py OUT.png DATA [RUN ...] [--clip N]

Without a run it shows the task itself. The last row is a clip of the target domain.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import run_command
from rlv2v.crop_size import CropSize
from rlv2v.data.loader import evaluation_clips
from rlv2v.errors import UserError
from rlv2v.method.translation import translate_clip

CELL, MARGIN, LABEL = 96, 4, 150  # pixels


@dataclass(frozen=True)
class Args:
    """Draw a clip of a dataset's test split: its source, the translation of each run, the truth, and a target clip."""

    out: tyro.conf.Positional[Path]
    """PNG to write."""
    data: tyro.conf.Positional[Path]
    """Dataset folder; where there is no testX, valX is shown."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Runs to show on it."""
    clip: int = 0
    """Which test clip, in name order."""
    frames: int = 8
    """Frames of it, and columns; with runs, the clip length that they were trained on."""


def clip_row(frames: np.ndarray, name: str) -> np.ndarray:
    """Return a clip as a row of cells after its name, uint8 RGB."""
    width = round(CELL * frames.shape[2] / frames.shape[1])
    cells = [cv2.resize(frame, (width, CELL), interpolation=cv2.INTER_NEAREST) for frame in frames]
    label = np.full((CELL, LABEL, 3), 255, np.uint8)
    cv2.putText(label, name, (8, CELL // 2 + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
    margins = ((0, MARGIN), (0, MARGIN), (0, 0))
    return np.concatenate([np.pad(cell, margins, constant_values=255) for cell in (label, *cells)], 1)


def main(args: Args) -> None:
    """Write the picture."""
    models = [load_translator(run) for run in args.runs]
    frames = models[0][1].data.frames if models else args.frames
    size = models[0][1].data.size if models else CropSize(CELL, CELL)

    def clip(folder: str, index: int = args.clip) -> np.ndarray:
        clips = evaluation_clips(args.data / folder, frames=frames, size=size)
        for _, images in itertools.islice(clips, index, None):
            return images
        raise UserError(f"--clip: {args.data / folder} has fewer than {index + 1} clips")

    part = "test" if (args.data / "testX").is_dir() else "val"
    source = clip(f"{part}X")
    rows = [clip_row(source, "source")]
    for generator, config in models:
        name = f"rlv2v, {config.preset}" if config.method == "rlv2v" else config.method
        rows.append(clip_row(translate_clip(generator, config, source), name))
    if (args.data / f"{part}Truth").is_dir():
        rows.append(clip_row(clip(f"{part}Truth"), "hidden truth"))
    rows.append(clip_row(clip("trainY", 0), "a target clip"))
    if not cv2.imwrite(str(args.out), np.concatenate(rows, 0)[..., ::-1]):
        raise UserError(f"{args.out}: expected the name of a .png in a folder that exists")


if __name__ == "__main__":
    run_command(main, Args)
