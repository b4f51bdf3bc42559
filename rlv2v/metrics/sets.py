"""The metrics that compare a clip with a set of images: the target domain's, or those of training.

Each measures a frame by samples of it, and compares all samples of a clip with those of the set. Draws are addressed by
the frame's number. The wanted values are those of the row `target`: one half of the target set against the other.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn.functional import conv2d

from rlv2v.data.scaling import resize
from rlv2v.metrics.base import Frame, metric

SEED = 20181
REGIONS = 3  # rows and columns
COLOURS = 256  # pixels drawn of a region
PATCH, PATCHES, BLUR = 7, 64, 3  # side in pixels, patches drawn of a frame at each scale, radius in pixels
PROJECTIONS, QUANTILES, MAX_POINTS = 64, 128, 8192
KID_PATCH, KID_PATCHES = 32, 12  # side in pixels, patches drawn of a frame
KID_LAYERS = ((32, 5), (64, 3), (128, 3))  # channels and kernel, stride 2
THUMBNAIL = 16  # pixels


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean over random unit directions of the 1-Wasserstein distance of two sets of points, (N,d), (M,d).

    Rabin et al. 2011. The distance along a direction is the mean difference of the quantiles.
    """
    directions = np.random.default_rng([SEED, a.shape[1]]).standard_normal((a.shape[1], PROJECTIONS))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)

    def quantiles(points: np.ndarray) -> np.ndarray:
        few = points[:: -(-len(points) // MAX_POINTS)].astype(np.float32)
        levels = (np.arange(QUANTILES) + 0.5) / QUANTILES * len(few) - 0.5
        low = np.clip(np.floor(levels).astype(int), 0, max(0, len(few) - 2))
        share = np.clip(levels - low, 0, 1)[:, None]
        ordered = np.sort(few @ directions, axis=0)
        return ordered[low] * (1 - share) + ordered[np.minimum(low + 1, len(few) - 1)] * share

    return float(np.abs(quantiles(a) - quantiles(b)).mean())


def colours_of(frame: Frame) -> np.ndarray:
    """Return colours drawn of each region of a frame, float32 (9,256,3) in [0,1]."""
    height, width = frame.image.shape[:2]
    rng = np.random.default_rng([SEED, frame.index])
    u, v = rng.random((2, REGIONS, REGIONS, COLOURS))
    row, column = np.mgrid[:REGIONS, :REGIONS][..., None] + np.stack([u, v])
    picked = frame.image[(row * height / REGIONS).astype(int), (column * width / REGIONS).astype(int)]
    return picked.reshape(REGIONS**2, COLOURS, 3).astype(np.float32) / 255


def pooled(own: np.ndarray, other: np.ndarray) -> float:
    """Return the distance of all colours."""
    return sliced_wasserstein(own.reshape(-1, 3), other.reshape(-1, 3))


def by_region(own: np.ndarray, other: np.ndarray) -> float:
    """Return the mean over regions of the distance of their colours."""
    regions = range(REGIONS**2)
    return float(np.mean([sliced_wasserstein(own[:, r].reshape(-1, 3), other[:, r].reshape(-1, 3)) for r in regions]))


@metric(
    "lower",
    "distance of the clip's colours to the target set's; a constant clip of its mean colour does well, and so does a "
    "colour map, whatever it does to the content",
    formula="sliced 1-Wasserstein distance of RGB pixels",
    source="Rabin et al. 2011",
    needs=["target"],
    reduce=pooled,
)
def colour_distance(frame: Frame) -> np.ndarray:
    """Return colours of the frame."""
    return colours_of(frame)


@metric(
    "lower",
    "the same, each of 3x3 regions with its own, as skies are above and roads below; a mean target frame does well",
    formula="mean over regions of the sliced 1-Wasserstein distance of RGB pixels",
    source="Rabin et al. 2011",
    needs=["target"],
    reduce=by_region,
)
def region_colour_distance(frame: Frame) -> np.ndarray:
    """Return colours of the frame."""
    return colours_of(frame)


def patches_of(image: np.ndarray, rng: np.random.Generator, margin: int = 0) -> np.ndarray:
    """Return patches drawn of an image, mirrored at its border, with a margin around each: float32 (64,h,w,3)."""
    height, width = image.shape[:2]
    corners = (rng.integers(0, side - PATCH + 1, PATCHES) for side in (height, width))
    places = (corner[:, None] + np.arange(-margin, PATCH + margin) for corner in corners)
    rows, columns = (
        side - 1 - np.abs(side - 1 - np.abs(place)) for side, place in zip((height, width), places, strict=True)
    )
    return image[rows[:, :, None], columns[:, None, :]].astype(np.float32)


def patch_sets(own: np.ndarray, other: np.ndarray) -> float:
    """Return the mean over scales of the distance of patches, in units of the target's standard deviation."""
    distances = []
    for scale in range(own.shape[1]):
        a, b = (patches[:, scale].reshape(-1, patches.shape[-1]) for patches in (own, other))
        deviation = float(b.std()) or 1.0
        distances.append(sliced_wasserstein(a / deviation, b / deviation))
    return float(np.mean(distances))


@metric(
    "lower",
    "distance of small patches to the target set's, in texture at full size and in looks at a quarter of it; copies of "
    "training frames do best, a constant clip badly",
    formula="sliced 1-Wasserstein distance of 7x7 patches over their standard deviation, mean of two scales: o less "
    "its blur, and o at a quarter of the size",
    source="after Karras et al. 2018, arXiv:1710.10196, section 5",
    needs=["target"],
    reduce=patch_sets,
)
def patch_distance(frame: Frame) -> np.ndarray | None:
    """Return patches of the frame at two scales, (2,64,147); None for frames smaller than two patches."""
    if min(frame.image.shape[:2]) < 2 * PATCH:
        return None
    rng = np.random.default_rng([SEED, frame.index, 1])
    wide = patches_of(frame.image, rng, BLUR)
    centre = slice(BLUR, BLUR + PATCH)
    tower = cv2.GaussianBlur(wide.reshape(-1, *wide.shape[2:]), (2 * BLUR + 1,) * 2, 1.0)  # all patches in one image
    detail = (wide - tower.reshape(wide.shape))[:, centre, centre]
    coarse = patches_of(frame.small, rng)
    return np.stack([detail.reshape(PATCHES, -1), coarse.reshape(PATCHES, -1)]) / 255


def log_ratio(own: np.ndarray, other: np.ndarray) -> float:
    """Return |log| of the quotient of the means."""
    return float(abs(np.log(own.mean() / other.mean())))


@metric(
    "lower",
    "how much sharper or softer the frames are than the target set's; it knows nothing of what they show, so that "
    "copies of training frames, and copied sources where both domains are alike sharp, do as well as the truth",
    formula="|log(mean d(o) / mean d(target))|, d = mean |grad o| / mean |grad o4|, o4 at a quarter of the size",
    needs=["target"],
    digits=3,
    reduce=log_ratio,
)
def detail_distance(frame: Frame) -> float | None:
    """Return fine over coarse detail; None where a picture is flat."""
    return frame.detail


@lru_cache(maxsize=1)
def random_network() -> tuple[list[torch.Tensor], str]:
    """Return the weights of the random features, drawn from SEED by NumPy, and the SHA-256 of their bytes."""
    rng, weights, digest, channels = np.random.default_rng(SEED), [], hashlib.sha256(), 3
    for width, kernel in KID_LAYERS:
        fan_in = channels * kernel**2
        weight = rng.standard_normal((width, channels, kernel, kernel)).astype(np.float32) * np.float32(
            (2 / fan_in) ** 0.5
        )
        digest.update(weight.tobytes())
        weights.append(torch.from_numpy(weight))
        channels = width
    return weights, digest.hexdigest()


def kernel_distance(own: np.ndarray, other: np.ndarray) -> float | None:
    """Return the unbiased MMD^2 of features over their mean square in `other`, with a cubic kernel.

    own (...,d), other (...,d) of any numbers N, M; None for fewer than two. (torchmetrics' takes N = M alone.)
    """
    a, b = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (own, other))
    if min(len(a), len(b)) < 2:
        return None
    size = np.sqrt((b * b).mean(axis=0))
    size = size.clip(min=max(1e-6, 0.1 * float(size.mean())))  # some features are always off
    a, b = a / size, b / size

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        values: np.ndarray = (p @ q.T / p.shape[1] + 1) ** 3
        return values

    def within(p: np.ndarray) -> float:
        values = kernel(p, p)
        return float(values.sum() - np.trace(values)) / (len(p) * (len(p) - 1))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


@metric(
    "lower",
    "kernel distance of random convolutional features of patches to the target set's; unbiased, so that equal sets "
    "score about 0; a constant clip scores badly",
    formula="KID: unbiased MMD^2 with kernel (a.b / d + 1)^3, on mean and deviation of a fixed random network over "
    "32x32 patches at full size",
    source="Binkowski et al. 2018, arXiv:1801.01401; random features instead of Inception",
    needs=["target"],
    digits=3,
    reduce=kernel_distance,
    pooled=True,
)
@torch.inference_mode()
def kid(frame: Frame) -> np.ndarray:
    """Return random features of patches of the frame, (12,256)."""
    side = min(KID_PATCH, *frame.image.shape[:2])
    rng = np.random.default_rng([SEED, frame.index, 2])
    rows, columns = (rng.integers(0, length - side + 1, KID_PATCHES) for length in frame.image.shape[:2])
    patches = np.stack([frame.image[r : r + side, c : c + side] for r, c in zip(rows, columns, strict=True)])
    features = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 127.5 - 1
    for weight in random_network()[0]:
        features = conv2d(features, weight, stride=2, padding=weight.shape[-1] // 2).relu()
    return torch.cat((features.mean(dim=(2, 3)), features.std(dim=(2, 3), correction=0)), dim=1).numpy()


def nearest(own: np.ndarray, other: np.ndarray) -> float:
    """Return the mean over frames of the distance to the nearest image of the set."""
    return float(np.mean([np.abs(other - thumbnail).mean(axis=-1).min() for thumbnail in own]))


@metric(
    "higher",
    "memorisation: distance of a frame to the nearest training image of Y, Z or S, 0 to 1; far below the held-out "
    "target's value the model repeats training images; copying the source, or anything unlike the target, scores high",
    formula="mean over t of min over images i of mean |o[t] - i| at 16x16",
    needs=["training"],
    reduce=nearest,
)
def nearest_training(frame: Frame) -> np.ndarray:
    """Return the frame at 16x16, (768,)."""
    return resize(frame.small, THUMBNAIL, THUMBNAIL).astype(np.float32).ravel() / 255
