"""Draw the README's picture: a held-out clip, what each run makes of it, and the hidden truth; a frame a column.

python bench/picture.py OUT.png DATA RUN [RUN ...] [--clip N]
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
from rlv2v.data.loader import evaluation_clips
from rlv2v.errors import UserError
from rlv2v.method.translation import translate_clip

CELL, MARGIN, LABEL = 96, 4, 150  # pixels


@dataclass(frozen=True)
class Args:
    """Draw a clip of a dataset's test split as its source, the translation of each run, and the truth."""

    out: tyro.conf.Positional[Path]
    """PNG to write."""
    data: tyro.conf.Positional[Path]
    """Dataset folder with testX and testTruth."""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Runs to show on it."""
    clip: int = 0
    """Which test clip, in name order."""


def clip_row(frames: np.ndarray, name: str) -> np.ndarray:
    """Return a clip as a row of cells after its name, uint8 RGB."""
    cells = [cv2.resize(frame, (CELL, CELL), interpolation=cv2.INTER_NEAREST) for frame in frames]
    label = np.full((CELL, LABEL, 3), 255, np.uint8)
    cv2.putText(label, name, (8, CELL // 2 + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
    margins = ((0, MARGIN), (0, MARGIN), (0, 0))
    return np.concatenate([np.pad(cell, margins, constant_values=255) for cell in (label, *cells)], 1)


def main(args: Args) -> None:
    """Write the picture."""
    models = [load_translator(run) for run in args.runs]
    if not models:
        raise UserError("runs: expected at least one run folder, got none")
    config = models[0][1]

    def clip(folder: str) -> np.ndarray:
        clips = evaluation_clips(args.data / folder, frames=config.data.frames, size=config.data.size)
        for _, frames in itertools.islice(clips, args.clip, None):
            return frames
        raise UserError(f"--clip: {args.data / folder} has fewer than {args.clip + 1} clips")

    source = clip("testX")
    rows = [clip_row(source, "source")]
    for g, c in models:
        name = f"rlv2v, {c.preset}" if c.method == "rlv2v" else c.method
        rows.append(clip_row(translate_clip(g, c, source), name))
    rows.append(clip_row(clip("testTruth"), "hidden truth"))
    if not cv2.imwrite(str(args.out), np.concatenate(rows, 0)[..., ::-1]):
        raise UserError(f"{args.out}: expected the name of a .png in a folder that exists")


if __name__ == "__main__":
    run_command(main, Args)
