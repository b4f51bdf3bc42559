"""The metrics of the synthetic set, whose background and objects are known.

o is the output, y the truth, F the true foreground (`Scene.foreground`), B its complement; colours are in [0,1].
"""

from __future__ import annotations

import numpy as np

from rlv2v.metrics.base import Frame, Need, metric

PALETTE = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=np.float32)
FOREGROUND_DISTANCE = 0.35
NEEDS: tuple[Need, ...] = ("truth", "synthetic")


def views(frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return o and y as float32 in [0,1], and F."""
    assert frame.scene.truth is not None
    return frame.image.astype(np.float32) / 255, frame.scene.truth.astype(np.float32) / 255, frame.scene.foreground


def every(values: np.ndarray, _reference: np.ndarray) -> float | None:
    """Return 1 if all frames have 1, else 0."""
    return float(values.all()) if len(values) else None


def is_right(frame: Frame) -> float | None:
    """Return whether the means of o and y over B are nearest to one palette colour; None where objects fill all."""
    o, y, f = views(frame)
    if f.all():
        return None
    own, true = (np.linalg.norm(PALETTE - image[~f].mean(axis=0), axis=-1).argmin() for image in (o, y))
    return float(own == true)


@metric(
    "higher",
    "share of frames whose background has the right colour; a constant clip is right in the frames of its colour",
    formula="mean over t of [nearest palette colour of mean_B o = that of mean_B y]",
    needs=NEEDS,
)
def background_accuracy(frame: Frame) -> float | None:
    """Return whether the background has the right palette colour."""
    return is_right(frame)


@metric(
    "higher",
    "share of clips whose background is right in every frame; a constant clip fails where the truth changes",
    formula="min over t of background_accuracy",
    needs=NEEDS,
    reduce=every,
)
def clip_accuracy(frame: Frame) -> float | None:
    """Return whether the background has the right palette colour."""
    return is_right(frame)


@metric(
    "higher",
    "overlap of the object with the true one; copying the source scores 1, so never read it alone",
    formula="|P & F| / |P | F|; P: o is farther than 0.35 (Euclidean RGB) from its median in B",
    needs=NEEDS,
)
def iou(frame: Frame) -> float | None:
    """Return |P & F| / |P | F|."""
    o, _, f = views(frame)
    if f.all():
        return None
    predicted = np.linalg.norm(o - np.median(o[~f], axis=0), axis=-1) > FOREGROUND_DISTANCE
    union = np.count_nonzero(predicted | f)
    return np.count_nonzero(predicted & f) / union if union else None


@metric(
    "lower",
    "mean colour error on the object's pixels, 0 to 1; copying the source scores 0, as objects keep their colour",
    formula="mean over F of |o - y|",
    needs=NEEDS,
)
def foreground_error(frame: Frame) -> float | None:
    """Return mean |o - y| over F."""
    o, y, f = views(frame)
    return float(np.abs(o - y)[f].mean()) if f.any() else None
