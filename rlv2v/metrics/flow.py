"""Optical flow of the source, by which outputs are compared along the motion.

DIS flow (Kroeger et al. 2016, arXiv:1603.03590) in both directions; where the two disagree, a pixel came into view or
went out of it and is left out (Sundaram et al. 2010; Lai et al. 2018, arXiv:1808.00449, section 4.2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

NOWHERE = np.empty(0, np.float32)
MIN_SIDE = 32  # pixels; smaller frames are enlarged for the search
MAX_LINES = 480  # taller frames are halved for the search until they have no more


class Flow(NamedTuple):
    """The flow f from a frame to the one before it, and where it can be trusted."""

    maps: tuple[np.ndarray, np.ndarray]
    """The places p + f(p), in OpenCV's fixed point, a 32nd of a pixel."""
    visible: np.ndarray
    """uint8 (H,W), 255 where |f(p) + b(p + f(p))|^2 <= 0.01 (|f|^2 + |b|^2) + 0.5, both in pixels of the search, and
    p + f(p) is in the frame; b is the flow back."""
    num_visible: int

    def warp(self, previous: np.ndarray) -> np.ndarray:
        """Return previous[p + f(p)], bilinear, uint8 (H,W,3)."""
        warped: np.ndarray = cv2.remap(previous, *self.maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return warped


def backward_flow(image: np.ndarray, previous: np.ndarray) -> Flow:
    """Return the flow from a frame to the one before it, uint8 RGB (H,W,3) both."""
    height, width = image.shape[:2]
    scale = 1.0
    while min(height, width) * scale < MIN_SIDE:
        scale *= 2
    while min(height, width) * scale > MAX_LINES:
        scale /= 2
    current, before = (luma(frame, scale) for frame in (image, previous))
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow, back = (search.calc(*pair, None) for pair in ((current, before), (before, current)))  # type: ignore[call-overload]
    there = cv2.remap(  # what left the frame disagrees
        back,
        flow + grid(*flow.shape[:2]),
        NOWHERE,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(1e3,) * 4,
    )
    error, size = square(flow + there), square(flow) + square(there)
    visible = (error <= 0.01 * size + 0.5).astype(np.uint8) * 255
    if scale != 1.0:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) / scale
        visible = cv2.resize(visible, (width, height), interpolation=cv2.INTER_NEAREST)
    maps = cv2.convertMaps(flow + grid(height, width), NOWHERE, cv2.CV_16SC2)
    return Flow(maps, visible, int(np.count_nonzero(visible)))


@lru_cache(maxsize=4)
def grid(height: int, width: int) -> np.ndarray:
    """Return the coordinates (x, y) of every pixel, float32 (H,W,2)."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def luma(image: np.ndarray, scale: float) -> np.ndarray:
    """Return the luma of an image, scaled."""
    grey: np.ndarray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if scale == 1.0:
        return grey
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=method)
    return scaled


def square(flow: np.ndarray) -> np.ndarray:
    """Return |f|^2 of a flow (H,W,2)."""
    return np.einsum("hwc,hwc->hw", flow, flow)
