"""The samples of a run: a few clips that are translated at every checkpoint, for people to look at."""

from __future__ import annotations

from itertools import islice

import numpy as np

from rlv2v.config import Config
from rlv2v.data.loader import evaluation_clips
from rlv2v.method.translation import translate_clip
from rlv2v.model import Generator

Samples = list[tuple[np.ndarray, list[np.ndarray]]]
NUM_SAMPLES = 3  # clips in a grid


def pick_samples(config: Config) -> Samples:
    """Return (source, [truth] or []) of a few clips of valX, or of trainX where there is no valX."""
    data = config.data

    def clips(name: str) -> list[tuple[str, np.ndarray]]:
        return list(islice(evaluation_clips(data.folder / name, frames=data.frames, size=data.size), NUM_SAMPLES))

    names = [name for name in ("valX", "trainX", "trainA") if (data.folder / name).is_dir()]
    truths = dict(clips("valTruth")) if names[0] == "valX" and (data.folder / "valTruth").is_dir() else {}
    return [(clip, [truths[name]] if name in truths else []) for name, clip in clips(names[0])]


def render_samples(g: Generator, config: Config, samples: Samples) -> tuple[list[np.ndarray], float | None]:
    """Return the rows of a sample grid (source, translation, truth of each), and the mean absolute error in 0..1.

    The error is None where there is no truth.
    """
    rows, errors = [], []
    g.eval()
    for source, truths in samples:
        translated = translate_clip(g, config, source)
        rows += [source, translated, *truths]
        errors += [np.abs(translated.astype(np.float32) - truth).mean() / 255 for truth in truths]
    g.train()
    return rows, float(np.mean(errors)) if errors else None
