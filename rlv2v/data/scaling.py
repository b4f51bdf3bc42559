"""Scale, crop and flatten pictures: uint8 RGB (H,W,3), or clips (T,H,W,3)."""

from __future__ import annotations

import cv2
import numpy as np


def on_black(image: np.ndarray) -> np.ndarray:
    """Return uint8 or uint16 (H,W,4), the last channel alpha, over black: (H,W,3) of that dtype, rounded to nearest."""
    most = int(np.iinfo(image.dtype).max)
    colour, alpha = image[..., :3], image[..., 3:]
    if alpha.min() == most:
        return np.ascontiguousarray(colour)
    return ((colour.astype(np.uint64) * alpha + most // 2) // most).astype(image.dtype)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale (H,W,3) to `width` x `height`: area average when it shrinks, bilinear when it grows; as is if it fits."""
    if image.shape[:2] == (height, width):
        return image
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, (width, height), interpolation=method)
    return scaled


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return (width, height) scaled so that the short side is `size`; the aspect stays."""
    short = min(width, height)
    return max(size, round(width * size / short)), max(size, round(height * size / short))


def fit(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize (T,H,W,3) so that the short side is `size`."""
    target = fit_size(frames.shape[2], frames.shape[1], size)
    return np.stack([resize(frame, *target) for frame in frames])


def centre_crop(frames: np.ndarray, size: int) -> np.ndarray:
    """Return the middle `size` x `size` of (T,H,W,3)."""
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])
