"""The samples of a run: a few clips that are translated at every checkpoint, to look at and to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from rlv2v.config import Config
from rlv2v.data.loader import evaluation_clips
from rlv2v.method.translation import translate_clip
from rlv2v.model import Generator

MIN_SAMPLES, MAX_SAMPLES = 3, 8  # clips; a grid shows the least
MAX_FRAMES = 64  # of more than the least clips together, so that a checkpoint takes little time


@dataclass(frozen=True)
class Sample:
    """Hold a clip of X, uint8 (T,H,W,3), and its hidden truth where that is known."""

    source: np.ndarray
    truth: np.ndarray | None = None


def pick_samples(config: Config) -> list[Sample]:
    """Return the first clips of valX, or of trainX where there is no valX."""
    data = config.data
    num = max(MIN_SAMPLES, min(MAX_SAMPLES, MAX_FRAMES // data.frames))

    def clips(name: str) -> list[tuple[str, np.ndarray]]:
        return list(islice(evaluation_clips(data.folder / name, frames=data.frames, size=data.size), num))

    names = [name for name in ("valX", "valA", "trainX", "trainA") if (data.folder / name).is_dir()]
    is_held_out = names[0].startswith("val") and (data.folder / "valTruth").is_dir()
    truths = dict(clips("valTruth")) if is_held_out else {}
    return [Sample(clip, truths.get(name)) for name, clip in clips(names[0])]


def translate_samples(g: Generator, config: Config, samples: list[Sample]) -> list[np.ndarray]:
    """Return the samples, translated."""
    g.eval()
    translated = [translate_clip(g, config, sample.source) for sample in samples]
    g.train()
    return translated


def grid_rows(samples: list[Sample], translated: list[np.ndarray]) -> list[np.ndarray]:
    """Return the rows of a grid of the first samples: source, translation, truth of each."""
    shown = list(zip(samples, translated, strict=True))[:MIN_SAMPLES]
    clips = [(sample.source, clip, sample.truth) for sample, clip in shown]
    return [clip for row in clips for clip in row if clip is not None]
