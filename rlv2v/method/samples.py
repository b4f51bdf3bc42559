"""The plumbing of a run: its folder, its data, its samples, and how it is interrupted."""

from __future__ import annotations

import itertools
import logging

import numpy as np

from rlv2v.config import Config
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import evaluation_clips
from rlv2v.errors import UserError
from rlv2v.method.translation import translate_clip
from rlv2v.model import Translator

Samples = list[tuple[np.ndarray, list[np.ndarray]]]
NUM_SAMPLES = 3  # clips in a strip
log = logging.getLogger(__name__)


def open_data(config: Config) -> Dataset:
    """The dataset of a config, with what could not be used warned about by name."""
    assert config.data is not None
    if not config.data.is_dir():
        raise UserError(f"{config.data}: expected a folder with trainX and trainY, found no such folder; see --data")
    return open_dataset(config.data, frames=config.frames)


def pick_samples(config: Config) -> Samples:
    """A few clips to look at while training: (source, [truth] or []), of valX, or of trainX where there is none."""
    assert config.data is not None

    def clips(name: str) -> list[tuple[str, np.ndarray]]:
        found = evaluation_clips(config.data / name, frames=config.frames, size=config.size)  # type: ignore[operator]
        return list(itertools.islice(found, NUM_SAMPLES))

    names = [name for name in ("valX", "trainX", "trainA") if (config.data / name).is_dir()]
    truths = dict(clips("valTruth")) if names[0] == "valX" and (config.data / "valTruth").is_dir() else {}
    return [(clip, [truths[name]] if name in truths else []) for name, clip in clips(names[0])]


def render_samples(g: Translator, config: Config, samples: Samples) -> tuple[list[np.ndarray], float | None]:
    """The rows of a strip (each source, its translation, its truth), and the mean absolute error in 0..1.

    None: there is no truth to tell it by.
    """
    rows, errors = [], []
    g.eval()
    for source, truths in samples:
        translated = translate_clip(g, config, source)
        rows += [source, translated, *truths]
        errors += [np.abs(translated.astype(np.float32) - truth).mean() / 255 for truth in truths]
    g.train()
    return rows, float(np.mean(errors)) if errors else None
