"""Turn RGB frames into YUV frames for an encoder."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter


def made_even(frame: np.ndarray) -> np.ndarray:
    """Return a frame (H,W,3) whose last row or column is repeated where their number is odd."""
    height, width = frame.shape[:2]
    if height % 2 == width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


class YuvConverter:
    """Convert uint8 RGB (H,W,3) of one size to YUV frames of the pixel format `form`, in limited range, tagged so.

    The RGB picture that FFmpeg reads and its tables are kept from frame to frame: new memory for each costs as much as
    the conversion. One thread, since the encoder has the others.
    """

    def __init__(self, form: str, matrix: Colorspace) -> None:
        self._form, self._matrix, self._reformatter = form, matrix, VideoReformatter()
        self._rgb: av.VideoFrame | None = None

    def __call__(self, frame: np.ndarray) -> av.VideoFrame:
        height, width = frame.shape[:2]
        if self._rgb is None:
            self._rgb = av.VideoFrame(width, height, "rgb24")
        plane: Any = self._rgb.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        rows[:height, : 3 * width] = frame.reshape(height, 3 * width)
        yuv = self._reformatter.reformat(
            self._rgb, format=self._form, dst_colorspace=self._matrix, dst_color_range=ColorRange.MPEG, threads=1
        )
        yuv.colorspace, yuv.color_range = self._matrix, ColorRange.MPEG
        return yuv
