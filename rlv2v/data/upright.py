"""Turn decoded frames into RGB as a player shows it: upright, with the right colours, on black where transparent."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, Interpolation, VideoReformatter

from rlv2v.data.hdr import CURVES, tone_map
from rlv2v.data.scaling import on_black, resize
from rlv2v.errors import UserError, first_line

SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""Without the last two flags FFmpeg's colours come out 1 to 1.5 levels of 255 too dark."""
HD_LINES = 720
"""Untagged pictures of that many lines are BT.709, as players take them; smaller ones BT.601."""
UNTAGGED = 2
"""The number of H.273 for a matrix that is not known."""
MATRICES = {*range(18)} - {3}
"""The numbers of H.273 for a matrix. Cameras and damage write others, which count as no tag, as for players."""
Turn = tuple[bool, bool, bool]
"""How a coded picture is shown: transposed, then upside down, then mirrored left to right."""


def turn_of(frame: av.VideoFrame) -> Turn:
    """Return how the display matrix turns and flips a frame; angles between quarter turns count as the nearest."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, f"{'<' if sys.byteorder == 'little' else '>'}i4")[:5].tolist()
    # the pixel (p, q) is shown at (a p + c q, b p + d q)
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def square_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return (width, height) in square pixels of a picture whose pixels are `aspect` times as wide as high."""
    return max(1, round(width * aspect)), height


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Return how many times as wide as high a stream's coded pixels are; 1 where it does not say, or says nonsense."""
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect and Fraction(1, 8) <= aspect <= 8 else Fraction(1)


def matrix_of(frame: av.VideoFrame) -> int:
    """Return the matrix that a frame is tagged with, by its number of H.273."""
    return int(frame.colorspace) if frame.colorspace in MATRICES else UNTAGGED


def is_limited_601(frame: av.VideoFrame) -> bool:
    """Return whether a frame is BT.601 limited range, or untagged and small: what DALI assumes of every file."""
    untagged = matrix_of(frame) == UNTAGGED and frame.height < HD_LINES
    return (untagged or frame.colorspace in {5, 6}) and frame.color_range != 2  # AVColorSpace: BT.601; full range


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether a frame's format can hold transparency."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


class Upright:
    """Convert decoded frames to uint8 RGB (H,W,3), turned by their display matrix, all of one size.

    size: (width, height) of the upright frames, scaled to in the same pass (area average where that shrinks, bilinear
    where it grows); None: the size of the first frame, with square pixels by `aspect` (see `pixel_aspect`).
    path: what errors name; None: nothing.
    It caches tables from frame to frame: use one for each stream.
    """

    def __init__(
        self, size: tuple[int, int] | None = None, aspect: Fraction = Fraction(1), path: Path | None = None
    ) -> None:
        self._size, self._aspect, self._reformatter = size, aspect, VideoReformatter()
        self._name = f"{path}: " if path else ""

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turn = transposed, upside_down, mirrored = turn_of(frame)
        if self._size is None:
            width, height = square_size(frame.width, frame.height, self._aspect)
            self._size = (height, width) if transposed else (width, height)
        rgb = self._convert(frame, self._size[::-1] if transposed else self._size)
        if not any(turn):
            return rgb
        rgb = rgb.swapaxes(0, 1) if transposed else rgb
        return np.ascontiguousarray(rgb[:: -1 if upside_down else 1, :: -1 if mirrored else 1])

    def _convert(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """Return uint8 RGB (height,width,3) of a frame as it is coded, scaled to `size` (width, height)."""
        if has_alpha(frame):
            rgba = self._reformat(frame, (frame.width, frame.height), "rgba")
            return resize(on_black(rgba), *size)
        curve = CURVES.get(frame.color_trc)
        if curve is None:
            return self._reformat(frame, size, "rgb24")
        return tone_map(self._reformat(frame, size, "gbrp16le"), curve)  # rgb48le comes out wrong with these flags

    def _reformat(self, frame: av.VideoFrame, size: tuple[int, int], form: str) -> np.ndarray:
        matrix = None
        if matrix_of(frame) == UNTAGGED and not frame.format.is_rgb:
            hdr = frame.color_trc in CURVES or frame.color_primaries == ColorPrimaries.BT2020
            small = frame.height < HD_LINES
            matrix = Colorspace.BT2020 if hdr else Colorspace.ITU601 if small else Colorspace.ITU709
        try:
            picture = self._reformatter.reformat(
                frame, *size, form, src_colorspace=matrix, interpolation=SCALING, threads=1
            )
        except (av.FFmpegError, ValueError) as error:
            shape = f"{frame.width}x{frame.height} {frame.format.name}, matrix {frame.colorspace} of H.273,"
            raise UserError(f"{self._name}a frame of {shape} cannot be converted to RGB: {first_line(error)}") from None
        return picture.to_ndarray()
