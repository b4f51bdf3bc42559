"""The metrics of a translated clip beside its source; no truth is needed.

o is the output, x the source, |grad| the gradient's magnitude of the luma; colours are in [0,1].
"""

from __future__ import annotations

import cv2
import numpy as np

from rlv2v.metrics.base import Frame, distance, metric, relative_detail

WINDOW = 8  # frames that drift compares with the first ones
WINDOW_ENDS = tuple(32 * 4**k for k in range(8))  # 25..32, 121..128, 505..512 ...
REGIONS = 3  # rows and columns


def jump(values: np.ndarray, _reference: np.ndarray) -> float | None:
    """Return the first change over the median of the later ones."""
    later = float(np.median(values[1:])) if len(values) > 1 else 0.0
    return float(values[0]) / later if later > 0 else None


@metric(
    "lower",
    "error of a frame against the frame before, moved along the source's motion, where nothing came into view; a "
    "constant clip scores 0, a blurred one does well, and a darker domain scores less: read it beside the identity's",
    formula="mean over visible pixels of (o[t] - warp(o[t-1], flow of x))^2",
    source="Lai et al. 2018, section 4.2, with DIS flow (Kroeger et al. 2016)",
    digits=6,
)
def warping_error(frame: Frame) -> float | None:
    """Return the warping error; None for the first frame."""
    return frame.warping_error


def ratio(values: np.ndarray, _reference: np.ndarray) -> float | None:
    """Return the sum of the first column over that of the second."""
    own, source = values.sum(axis=0)
    return float(own / source) if source > 0 else None


@metric(
    "lower",
    "warping error over the source's own; the source, copied, scores 1, a constant clip 0",
    formula="sum over t of warping_error(o) / sum of warping_error(x)",
    source="Lai et al. 2018",
    digits=3,
    reduce=ratio,
)
def warping_ratio(frame: Frame) -> np.ndarray | None:
    """Return the warping errors of the output and the source."""
    errors = frame.warping_error, frame.scene.warping_error
    return None if None in errors else np.array(errors)


@metric(
    "one",
    "change from the first frame to the second over the usual change: above 1, the first frame flashes; the source, "
    "copied, scores near 1, and a constant clip has none",
    formula="mean |o[2] - o[1]| / median over t > 2 of mean |o[t] - o[t-1]|",
    digits=3,
    reduce=jump,
)
def first_frame_jump(frame: Frame) -> float | None:
    """Return mean |o[t] - o[t-1]|."""
    return frame.change


def shift(values: np.ndarray, _reference: np.ndarray) -> float | None:
    """Return the mean shift of later windows from the first one; None for clips that are too short for a window."""
    windows = [values[end - WINDOW : end].mean(axis=0) for end in WINDOW_ENDS if end <= len(values)]
    first = values[:WINDOW].mean(axis=0)
    return float(np.mean([np.abs(window - first).mean() for window in windows])) if windows else None


@metric(
    "lower",
    "how far the change of colour by region has moved, late against early in a long clip; the source, copied, scores "
    "0; where the grade depends on time, so does the truth",
    formula="mean over windows W = 25..32, 121..128, ... of |mean_W (o - x) - mean_1..8 (o - x)|, by 3x3 regions",
    reduce=shift,
)
def drift(frame: Frame) -> np.ndarray:
    """Return the means of o - x by region, (27,)."""
    own, source = (
        cv2.resize(image, (REGIONS,) * 2, interpolation=cv2.INTER_AREA) for image in (frame.small, frame.scene.small)
    )
    return (own.astype(np.float64) - source).ravel() / 255


@metric(
    "one",
    "fine detail against the source's, both relative to their coarse detail, so that contrast does not count: below 1 "
    "blurred, above 1 noisy; the source, copied, scores 1",
    formula="(mean |grad o| / mean |grad o4|) / (mean |grad x| / mean |grad x4|); o4, x4: at a quarter of the size",
    digits=3,
)
def sharpness(frame: Frame) -> float | None:
    """Return the ratio of relative gradient energies; None where a picture is flat."""
    own, source = frame.detail, relative_detail(frame.scene.edges, frame.scene.small)
    return own / source if own and source else None


@metric(
    "higher",
    "whether edges are where the source has them, up to 1; the source, copied, scores 1",
    formula="Pearson correlation of |grad o| and |grad x| over the pixels",
    digits=3,
)
def edge_agreement(frame: Frame) -> float | None:
    """Return the correlation of the gradients' magnitudes; None where a picture is flat."""
    own, source = frame.edges.ravel(), frame.scene.edges.ravel()
    moments = [float(np.dot(a, b)) / own.size for a, b in ((own, source), (own, own), (source, source))]
    means = [float(cv2.mean(edges)[0]) for edges in (frame.edges, frame.scene.edges)]
    spread = (moments[1] - means[0] ** 2) * (moments[2] - means[1] ** 2)
    return (moments[0] - means[0] * means[1]) / spread**0.5 if spread > 1e-12 else None


@metric(
    "lower",
    "error of the clip after translating it there and back, 0 to 1; a model that copies its source scores 0",
    formula="mean |G_X(G_Y(x)) - x|",
    source="Zhu et al. 2017, arXiv:1703.10593",
    needs=["cycle"],
)
def cycle_error(frame: Frame) -> float:
    """Return mean |G_X(G_Y(x)) - x|."""
    assert frame.cycled is not None
    return distance(frame.cycled, frame.scene.source)
