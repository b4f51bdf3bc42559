"""The metrics of a translated clip against its hidden truth; no model, no files.

Values are in units of [0,1] except `psnr` (dB). o is the output, y the truth.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from rlv2v.metrics.base import Frame, distance, metric

PSNR_CAP = 100.0  # dB, what identical frames score: JSON has no infinity
SSIM_WINDOW = 11  # pixels, the Gaussian window of deviation 1.5
SSIM_SIDE = 256  # pixels, the short side that larger frames are shrunk to by a whole factor


@metric(
    "lower",
    "mean absolute error of all pixels against the hidden truth, 0 to 1; copying the source does well where the two "
    "domains look alike",
    formula="mean |o - y|",
    needs=["truth"],
)
def l1(frame: Frame) -> float:
    """Return mean |o - y|."""
    assert frame.scene.truth is not None
    return distance(frame.image, frame.scene.truth)


@metric(
    "higher",
    "peak signal-to-noise ratio against the hidden truth, dB; 100 for identical frames; prefers blur to detail that is "
    "a little misplaced",
    formula="10 log10(1 / mean (o - y)^2), mean over frames",
    needs=["truth"],
    digits=2,
)
def psnr(frame: Frame) -> float:
    """Return 10 log10(1 / mean (o - y)^2), at most 100 dB."""
    assert frame.scene.truth is not None
    error = cv2.norm(frame.image, frame.scene.truth, cv2.NORM_L2SQR) / (frame.image.size * 255**2)
    return float(min(PSNR_CAP, -10 * np.log10(max(error, 1e-12))))


@metric(
    "higher",
    "structural similarity to the hidden truth, up to 1; copying the source does well where only colours differ",
    formula="mean over an 11x11 Gaussian window of (2 m_o m_y + c1)(2 s_oy + c2) / ((m_o^2 + m_y^2 + c1)(s_o^2 + s_y^2 "
    "+ c2)); frames are first shrunk by round(short side / 256), as in the authors' code",
    source="Wang et al. 2004",
    needs=["truth"],
)
def ssim(frame: Frame) -> float | None:
    """Return the SSIM; None for frames smaller than its window."""
    truth = frame.scene.truth
    assert truth is not None
    if min(truth.shape[:2]) < SSIM_WINDOW:
        return None
    y: Moments = frame.scene.remember("ssim", lambda: small_moments(truth))
    o = y if frame.image is truth else small_moments(frame.image)
    covariance = local_mean(o.image * y.image) - o.mean * y.mean
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * o.mean * y.mean + c1) / (o.mean * o.mean + y.mean * y.mean + c1)
    return float((luminance * (2 * covariance + c2) / (o.variance + y.variance + c2)).mean())


class Moments(NamedTuple):
    """A shrunk image, float32 (h,w,3) in [0,1], and its local means and variances."""

    image: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def small_moments(image: np.ndarray) -> Moments:
    """Return the moments of an image shrunk to about SSIM_SIDE."""
    factor = max(1, round(min(image.shape[:2]) / SSIM_SIDE))
    small = cv2.resize(image, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    mean = local_mean(small)
    return Moments(small, mean, local_mean(small * small) - mean * mean)


def local_mean(image: np.ndarray) -> np.ndarray:
    """Return the mean under a Gaussian window."""
    blurred: np.ndarray = cv2.GaussianBlur(image, (SSIM_WINDOW, SSIM_WINDOW), 1.5, borderType=cv2.BORDER_REFLECT_101)
    return blurred


@metric(
    "lower",
    "mean error of the change from frame to frame, 0 to 1; a constant clip does well where the truth hardly moves",
    formula="mean |(o[t] - o[t-1]) - (y[t] - y[t-1])|",
    needs=["truth"],
)
def flicker(frame: Frame) -> float | None:
    """Return the error of the change; None for the first frame."""
    if frame.previous is None or frame.scene.true_change is None:
        return None
    return distance(cv2.subtract(frame.image, frame.previous.image, dtype=cv2.CV_16S), frame.scene.true_change)
