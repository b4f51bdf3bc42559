"""Metrics of a translated clip against its hidden truth; no model, no files.

Clips are (T,H,W,3), uint8 or float in [0,1]; every figure below is in units of [0,1] except `psnr` (dB).
`F` is the true foreground (the source's maximum channel above 0.2: the synthetic set's X is black behind its
objects), `B` its complement, `o` the output, `y` the truth.

    background_accuracy  share of frames whose mean of o over B is nearest (Euclidean RGB) to the palette colour that is
                         nearest to the mean of y over B
    clip_accuracy        1 when every frame of the clip is right, else 0
    iou                  |P & F| / |P | F|, mean over frames; P = pixels of o farther than 0.35 (Euclidean RGB) from the
                         median of o over B.  A copy of the source scores 1: never judge a model by iou alone
    foreground_error     mean |o - y| over F
    l1, psnr, ssim       mean |o - y|; 10 log10(1 / mean (o - y)^2) per frame; SSIM (Wang et al. 2004) per frame
    flicker              mean |(o[t+1] - o[t]) - (y[t+1] - y[t])|

The first four need the synthetic set; the others any truth. What cannot be computed is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Metrics = dict[str, float | None]

METRIC_KEYS = ("background_accuracy", "clip_accuracy", "iou", "foreground_error", "l1", "psnr", "ssim", "flicker")

PALETTE = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=np.float32)
FOREGROUND_LEVEL = 0.2
FOREGROUND_DISTANCE = 0.35
PSNR_CAP = 100.0  # dB, what identical frames score: JSON has no infinity
SSIM_WINDOW = 11  # pixels, the Gaussian window of torchmetrics' default


def clip_metrics(output: np.ndarray, source: np.ndarray, truth: np.ndarray | None, *, synthetic: bool) -> Metrics:
    """All metrics of one clip, by the names of `METRIC_KEYS`.

    output, source, truth: (T,H,W,3) uint8, or float in [0,1], of one shape; else ValueError. truth None: all None.
    """
    metrics: Metrics = dict.fromkeys(METRIC_KEYS)
    if truth is None:
        return metrics
    for name, clip in (("output", output), ("source", source), ("truth", truth)):
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape != truth.shape:
            raise ValueError(f"metrics: {name} must be (T,H,W,3)={truth.shape} as the truth, got {clip.shape}")
    o, x, y = as_unit(output), as_unit(source), as_unit(truth)
    if synthetic:
        metrics.update(_synthetic_metrics(o, x, y))
    metrics["l1"] = float(np.abs(o - y).mean())
    metrics["psnr"], metrics["ssim"] = _psnr_ssim(o, y)
    if len(o) > 1:
        metrics["flicker"] = float(np.abs(np.diff(o, axis=0) - np.diff(y, axis=0)).mean())
    return metrics


def mean_metrics(clips: Sequence[Metrics]) -> Metrics:
    """Mean of each metric over the clips that have it, else None: `clip_accuracy` becomes a share of clips."""
    if not clips:
        raise ValueError("metrics: expected at least one clip to average, got none")
    means: Metrics = {}
    for key in METRIC_KEYS:
        values = [value for clip in clips if (value := clip[key]) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def as_unit(clip: np.ndarray) -> np.ndarray:
    """float32 in [0,1] from uint8; a float clip passes through."""
    if clip.dtype == np.uint8:
        return clip.astype(np.float32) / 255
    if not np.issubdtype(clip.dtype, np.floating):
        raise ValueError(f"metrics: a clip must be uint8 or float in [0,1], got {clip.dtype}")
    return clip.astype(np.float32)


def _synthetic_metrics(o: np.ndarray, x: np.ndarray, y: np.ndarray) -> Metrics:
    foreground = x.max(axis=-1) > FOREGROUND_LEVEL
    right, ious = [], []
    for o_t, y_t, f_t in zip(o, y, foreground, strict=True):
        if f_t.all():
            continue
        right.append(_nearest(o_t[~f_t].mean(axis=0)) == _nearest(y_t[~f_t].mean(axis=0)))
        predicted = np.linalg.norm(o_t - np.median(o_t[~f_t], axis=0), axis=-1) > FOREGROUND_DISTANCE
        if union := np.count_nonzero(predicted | f_t):
            ious.append(np.count_nonzero(predicted & f_t) / union)
    return {
        "background_accuracy": float(np.mean(right)) if right else None,
        "clip_accuracy": float(all(right)) if right else None,
        "iou": float(np.mean(ious)) if ious else None,
        "foreground_error": float(np.abs(o - y)[foreground].mean()) if foreground.any() else None,
    }


def _nearest(colour: np.ndarray) -> int:
    return int(np.linalg.norm(PALETTE - colour, axis=-1).argmin())


def _psnr_ssim(o: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    output, truth = (torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))) for clip in (o, y))
    psnr = peak_signal_noise_ratio(output, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    if min(o.shape[1:3]) < SSIM_WINDOW:
        return float(psnr.clamp(max=PSNR_CAP).mean()), None
    ssim = structural_similarity_index_measure(output, truth, data_range=1.0)
    return float(psnr.clamp(max=PSNR_CAP).mean()), float(torch.as_tensor(ssim))
