"""A moving scene, its translation to night, and translations that are known to be worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from rlv2v.metrics import Row, mean_metrics, pooled_metrics, scenes
from rlv2v.metrics.base import ClipMeter, Kind, reduce_values
from rlv2v.metrics.images import References

T, HEIGHT, WIDTH = 40, 72, 96
Clip = np.ndarray


@cache
def scene(seed: int = 0) -> Clip:
    """A camera that pans over a landscape, bright above and textured below, with a box that moves; (T,H,W,3)."""
    rng = np.random.default_rng(seed)
    wide = WIDTH + 2 * T
    texture = sum(cv2.GaussianBlur(rng.standard_normal((HEIGHT, wide, 3)), (0, 0), s) * s for s in (1.0, 3.0, 8.0))
    slope = np.linspace(170, 90, HEIGHT)[:, None, None]
    rows = np.linspace(0.3, 1.5, HEIGHT)[:, None, None]
    world = np.clip(slope + 40 * rows * texture, 0, 255).astype(np.uint8)
    frames = np.stack([world[:, 2 * t : 2 * t + WIDTH] for t in range(T)])
    for t in range(T):
        frames[t, 30:50, 10 + t : 30 + t] = (230, 60 + 10 * seed % 100, 40)
    return frames


def night(clip: Clip) -> Clip:
    """The grade that is to be learned: dark, blue, and the sky darker than the road."""
    rows = np.linspace(0.35, 0.7, clip.shape[1])[:, None, None]
    graded = 255 * rows * np.array([0.6, 0.75, 1.0]) * (clip / 255) ** 1.2 + 8
    return np.rint(graded.clip(0, 255)).astype(np.uint8)


def day(clip: Clip) -> Clip:
    """The grade back."""
    rows = np.linspace(0.35, 0.7, clip.shape[1])[:, None, None]
    graded = 255 * ((clip - 8.0).clip(0) / (255 * rows * np.array([0.6, 0.75, 1.0]))) ** (1 / 1.2)
    return np.rint(graded.clip(0, 255)).astype(np.uint8)


def blurred(clip: Clip) -> Clip:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in clip])


def noisy(clip: Clip) -> Clip:
    noise = 15 * np.random.default_rng(1).standard_normal(clip.shape)
    return np.rint((clip + noise).clip(0, 255)).astype(np.uint8)


def shuffled(clip: Clip) -> Clip:
    return clip[np.random.default_rng(2).permutation(len(clip))]


def with_flash(clip: Clip) -> Clip:
    return np.concatenate([(clip[:1] + np.uint8(60)).clip(0, 255), clip[1:]])


def fading(clip: Clip) -> Clip:
    gain = np.linspace(1, 0.5, len(clip))[:, None, None, None]
    return np.rint(clip * gain).astype(np.uint8)


def dusk(clip: Clip) -> Clip:
    """The wrong domain: red instead of blue, and inverted above and below."""
    return np.ascontiguousarray(night(clip)[:, ::-1, :, ::-1])


def still(clip: Clip) -> Clip:
    return np.broadcast_to(clip.mean(axis=0, keepdims=True), clip.shape).astype(np.uint8)


CANDIDATES: dict[str, Callable[[Clip, Clip], Clip]] = {
    "truth": lambda x, y: y,
    "blurred": lambda x, y: blurred(y),
    "noisy": lambda x, y: noisy(y),
    "shuffled": lambda x, y: shuffled(y),
    "flash": lambda x, y: with_flash(y),
    "fading": lambda x, y: fading(y),
    "wrong domain": lambda x, y: dusk(x),
    "identity": lambda x, y: x,
    "constant": lambda x, y: still(y),
    "memorised": lambda x, y: night(scene(1)),
}
"""Translations of a source x with truth y, the best one first."""


def references(folder: Path, seeds: Sequence[int] = (1, 2, 3, 4)) -> References:
    """The target set: night clips of other landscapes, in a folder that does not exist yet."""
    folder.mkdir()
    for seed in seeds:
        np.save(folder / f"{seed}.npy", night(scene(seed)))
    kinds: frozenset[Kind] = frozenset({"target", "training"})
    return References.open({folder: kinds})


def rows(references: References, seeds: Sequence[int] = (5, 6, 7)) -> dict[str, Row]:
    """What every candidate scores on a few landscapes, without the metrics of the synthetic set."""
    result = {}
    sets = references.values(HEIGHT)
    for name, candidate in CANDIDATES.items():
        clips, values = [], []
        for seed in seeds:
            x, y = scene(seed), night(scene(seed))
            meter = ClipMeter({"truth", "target", "training", "cycle"})
            output = candidate(x, y)
            cycled = x if name == "identity" else day(output)
            for image, around, back in zip(output, scenes(x, y), cycled, strict=True):
                meter.add(image, around, back)
            values.append(meter.values)
            clips.append(reduce_values(meter.values, sets))
        result[name] = mean_metrics(clips) | pooled_metrics(values, sets)
    return result
