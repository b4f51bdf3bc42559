"""The metrics of a translated clip against its hidden truth; no model, no files.

Every value is in units of [0,1] except `psnr` (dB). F is the true foreground (`ClipTriple.foreground`), B its
complement, o the output, y the truth.

    background_accuracy  share of frames whose mean of o over B is nearest (Euclidean RGB) to the palette colour that is
                         nearest to the mean of y over B
    clip_accuracy        1 when every frame of the clip is right, else 0
    iou                  |P & F| / |P | F|, mean over frames; P = pixels of o farther than 0.35 (Euclidean RGB) from the
                         median of o over B
    foreground_error     mean |o - y| over F
    l1, psnr, ssim       mean |o - y|; 10 log10(1 / mean (o - y)^2) per frame; SSIM (Wang et al. 2004) per frame
    flicker              mean |(o[t+1] - o[t]) - (y[t+1] - y[t])|
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rlv2v.metrics.base import ClipTriple, Metric, Needs

PALETTE = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=np.float32)
FOREGROUND_DISTANCE = 0.35
PSNR_CAP = 100.0  # dB, what identical frames score: JSON has no infinity
SSIM_WINDOW = 11  # pixels, the Gaussian window of torchmetrics' default


def frames_with_background(clip: ClipTriple) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (output, truth, foreground) of each frame that the objects do not fill."""
    for frame in zip(clip.output, clip.truth, clip.foreground, strict=True):
        if not frame[2].all():
            yield frame


def right_backgrounds(clip: ClipTriple) -> list[bool]:
    """Return, for each frame that shows its background, whether the background has the true palette colour."""

    def nearest(colour: np.ndarray) -> int:
        return int(np.linalg.norm(PALETTE - colour, axis=-1).argmin())

    return [nearest(o[~f].mean(axis=0)) == nearest(y[~f].mean(axis=0)) for o, y, f in frames_with_background(clip)]


def background_accuracy(clip: ClipTriple) -> float | None:
    """Return the share of frames whose background has the true palette colour."""
    right = right_backgrounds(clip)
    return float(np.mean(right)) if right else None


def clip_accuracy(clip: ClipTriple) -> float | None:
    """Return 1 if every background of the clip is right, else 0."""
    right = right_backgrounds(clip)
    return float(all(right)) if right else None


def iou(clip: ClipTriple) -> float | None:
    """Return the mean intersection over union of the objects' pixels, over frames."""
    ious = []
    for o, _, f in frames_with_background(clip):
        predicted = np.linalg.norm(o - np.median(o[~f], axis=0), axis=-1) > FOREGROUND_DISTANCE
        if union := np.count_nonzero(predicted | f):
            ious.append(np.count_nonzero(predicted & f) / union)
    return float(np.mean(ious)) if ious else None


def foreground_error(clip: ClipTriple) -> float | None:
    """Return the mean absolute error on the objects' pixels."""
    errors = np.abs(clip.output - clip.truth)[clip.foreground]
    return float(errors.mean()) if errors.size else None


def l1(clip: ClipTriple) -> float:
    """Return the mean absolute error of all pixels."""
    return float(np.abs(clip.output - clip.truth).mean())


def psnr(clip: ClipTriple) -> float:
    """Return the mean peak signal-to-noise ratio of the frames, dB, each at most PSNR_CAP."""
    values = peak_signal_noise_ratio(*images(clip), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(values.clamp(max=PSNR_CAP).mean())


def ssim(clip: ClipTriple) -> float | None:
    """Return the mean structural similarity of the frames; None for frames smaller than its window."""
    if min(clip.output.shape[1:3]) < SSIM_WINDOW:
        return None
    return float(torch.as_tensor(structural_similarity_index_measure(*images(clip), data_range=1.0)))


def images(clip: ClipTriple) -> tuple[Tensor, Tensor]:
    """Return output and truth as torch's images (T,3,H,W)."""
    output, truth = (np.ascontiguousarray(frames.transpose(0, 3, 1, 2)) for frames in (clip.output, clip.truth))
    return torch.from_numpy(output), torch.from_numpy(truth)


def flicker(clip: ClipTriple) -> float | None:
    """Return the mean absolute error of the change from frame to frame; None for a single frame."""
    if len(clip.output) < 2:
        return None
    return float(np.abs(np.diff(clip.output, axis=0) - np.diff(clip.truth, axis=0)).mean())


SYNTHETIC: Needs = frozenset({"truth", "synthetic"})
WITH_TRUTH = (
    Metric(
        "background_accuracy",
        "higher",
        "share of frames whose background has the right colour; a constant clip is right in the frames of its colour",
        background_accuracy,
        SYNTHETIC,
    ),
    Metric(
        "clip_accuracy",
        "higher",
        "share of clips whose background is right in every frame; a constant clip fails where the truth changes",
        clip_accuracy,
        SYNTHETIC,
    ),
    Metric(
        "iou",
        "higher",
        "overlap of the object with the true one; copying the source scores 1, so never read it alone",
        iou,
        SYNTHETIC,
    ),
    Metric(
        "foreground_error",
        "lower",
        "mean colour error on the object's pixels, 0 to 1; copying the source scores 0, as objects keep their colour",
        foreground_error,
        SYNTHETIC,
    ),
    Metric(
        "l1",
        "lower",
        "mean absolute error of all pixels against the hidden truth, 0 to 1; "
        "copying the source does well where the two domains look alike",
        l1,
    ),
    Metric(
        "psnr",
        "higher",
        "peak signal-to-noise ratio against the hidden truth, dB; 100 for identical frames; prefers blur to detail "
        "that is a little misplaced",
        psnr,
        digits=2,
    ),
    Metric(
        "ssim",
        "higher",
        "structural similarity to the hidden truth, up to 1; copying the source does well where only colours differ",
        ssim,
    ),
    Metric(
        "flicker",
        "lower",
        "mean error of the change from frame to frame, 0 to 1; a constant clip does well where the truth hardly moves",
        flicker,
    ),
)
