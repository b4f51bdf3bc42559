"""The metrics of a translated clip against its hidden truth; no model, no files.

Every value is in units of [0,1] except `psnr` (dB). o is the output, y the truth, F the true foreground
(`ClipTriple.foreground`), B its complement.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rlv2v.metrics.base import SYNTHETIC, ClipTriple, metric

PALETTE = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=np.float32)
FOREGROUND_DISTANCE = 0.35
PSNR_CAP = 100.0  # dB, what identical frames score: JSON has no infinity
SSIM_WINDOW = 11  # pixels, the Gaussian window of torchmetrics' default


def frames_with_background(clip: ClipTriple) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (o, y, F) of each frame that the objects do not fill."""
    for frame in zip(clip.output, clip.truth, clip.foreground, strict=True):
        if not frame[2].all():
            yield frame


def right_backgrounds(clip: ClipTriple) -> list[bool]:
    """Return for each frame whether the means of o and y over B are nearest (Euclidean RGB) to one palette colour."""

    def nearest(colour: np.ndarray) -> int:
        return int(np.linalg.norm(PALETTE - colour, axis=-1).argmin())

    return [nearest(o[~f].mean(axis=0)) == nearest(y[~f].mean(axis=0)) for o, y, f in frames_with_background(clip)]


@metric(
    "higher",
    "share of frames whose background has the right colour; a constant clip is right in the frames of its colour",
    needs=SYNTHETIC,
)
def background_accuracy(clip: ClipTriple) -> float | None:
    """Return the share of frames whose background has the right palette colour."""
    right = right_backgrounds(clip)
    return float(np.mean(right)) if right else None


@metric(
    "higher",
    "share of clips whose background is right in every frame; a constant clip fails where the truth changes",
    needs=SYNTHETIC,
)
def clip_accuracy(clip: ClipTriple) -> float | None:
    """Return 1 if every background of the clip is right, else 0."""
    right = right_backgrounds(clip)
    return float(all(right)) if right else None


@metric(
    "higher",
    "overlap of the object with the true one; copying the source scores 1, so never read it alone",
    needs=SYNTHETIC,
)
def iou(clip: ClipTriple) -> float | None:
    """Return the mean of |P & F| / |P | F| over frames; P: o farther than 0.35 (Euclidean RGB) from its median in B."""
    ious = []
    for o, _, f in frames_with_background(clip):
        predicted = np.linalg.norm(o - np.median(o[~f], axis=0), axis=-1) > FOREGROUND_DISTANCE
        if union := np.count_nonzero(predicted | f):
            ious.append(np.count_nonzero(predicted & f) / union)
    return float(np.mean(ious)) if ious else None


@metric(
    "lower",
    "mean colour error on the object's pixels, 0 to 1; copying the source scores 0, as objects keep their colour",
    needs=SYNTHETIC,
)
def foreground_error(clip: ClipTriple) -> float | None:
    """Return mean |o - y| over F."""
    errors = np.abs(clip.output - clip.truth)[clip.foreground]
    return float(errors.mean()) if errors.size else None


@metric(
    "lower",
    "mean absolute error of all pixels against the hidden truth, 0 to 1; copying the source does well where the two "
    "domains look alike",
)
def l1(clip: ClipTriple) -> float:
    """Return mean |o - y|."""
    return float(np.abs(clip.output - clip.truth).mean())


@metric(
    "higher",
    "peak signal-to-noise ratio against the hidden truth, dB; 100 for identical frames; prefers blur to detail that is "
    "a little misplaced",
    digits=2,
)
def psnr(clip: ClipTriple) -> float:
    """Return 10 log10(1 / mean (o - y)^2) of a frame, at most 100 dB, averaged over frames."""
    values = peak_signal_noise_ratio(*images(clip), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(values.clamp(max=PSNR_CAP).mean())


@metric(
    "higher",
    "structural similarity to the hidden truth, up to 1; copying the source does well where only colours differ",
)
def ssim(clip: ClipTriple) -> float | None:
    """Return the mean SSIM (Wang et al. 2004) of the frames; None for frames smaller than its window."""
    if min(clip.output.shape[1:3]) < SSIM_WINDOW:
        return None
    return float(torch.as_tensor(structural_similarity_index_measure(*images(clip), data_range=1.0)))


@metric(
    "lower",
    "mean error of the change from frame to frame, 0 to 1; a constant clip does well where the truth hardly moves",
)
def flicker(clip: ClipTriple) -> float | None:
    """Return mean |(o[t+1] - o[t]) - (y[t+1] - y[t])|; None for a single frame."""
    if len(clip.output) < 2:
        return None
    return float(np.abs(np.diff(clip.output, axis=0) - np.diff(clip.truth, axis=0)).mean())


def images(clip: ClipTriple) -> tuple[Tensor, Tensor]:
    """Return o and y as torch's images (T,3,H,W)."""
    output, truth = (np.ascontiguousarray(frames.transpose(0, 3, 1, 2)) for frames in (clip.output, clip.truth))
    return torch.from_numpy(output), torch.from_numpy(truth)
