"""Scale, crop and flatten pictures: uint8 RGB (H,W,3), or clips (T,H,W,3)."""

from __future__ import annotations

import cv2
import numpy as np

from rlv2v.crop_size import CropSize


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


def shrink(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale (H,W,3) down to a small picture as `resize` does, to a level or so, in less than half the time for video.

    While it is ten times as large, every 2x2 pixels become one first, which OpenCV is fast at.
    """
    rows, columns = image.shape[:2]
    while rows % 2 == columns % 2 == 0 and rows >= 10 * height and columns >= 10 * width:
        rows, columns = rows // 2, columns // 2
        image = resize(image, columns, rows)
    return resize(image, width, height)


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return (width, height) scaled so that the short side is `size`; the aspect stays."""
    return cover_size(width, height, CropSize(size, size))


def cover_size(width: int, height: int, crop: CropSize) -> tuple[int, int]:
    """Return (width, height) scaled so that it just covers a crop: one side is the crop's; the aspect stays."""
    if crop.width * height >= crop.height * width:
        return crop.width, round(height * crop.width / width)
    return round(width * crop.height / height), crop.height


def cover(frames: np.ndarray, crop: CropSize) -> np.ndarray:
    """Resize (T,H,W,3) so that it just covers a crop."""
    target = cover_size(frames.shape[2], frames.shape[1], crop)
    return np.stack([resize(frame, *target) for frame in frames])


def centre_crop(frames: np.ndarray, crop: CropSize) -> np.ndarray:
    """Return the middle of (T,H,W,3), of a crop's size."""
    top, left = (frames.shape[1] - crop.height) // 2, (frames.shape[2] - crop.width) // 2
    return np.ascontiguousarray(frames[:, top : top + crop.height, left : left + crop.width])
