"""Frames for an encoder: one converter for all gives what a new one for each would, and even sizes."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from rlv2v.data.yuv import YuvConverter, made_even


@pytest.mark.parametrize("matrix", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize(("form", "size"), [("yuv420p", (50, 66)), ("yuv444p", (37, 51)), ("yuv444p", (1, 1))])
def test_each_frame_is_converted_by_itself(matrix: Colorspace, form: str, size: tuple[int, int]) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    converter = YuvConverter(form, matrix)
    pictures = [converter(frame) for frame in (clip[0], clip[1][:, ::-1], clip[2])]
    for picture, frame in zip(pictures, (clip[0], clip[1][:, ::-1], clip[2]), strict=True):
        fresh = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        expected = fresh.reformat(format=form, dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)
        np.testing.assert_array_equal(picture.to_ndarray(), expected.to_ndarray())
        assert (picture.colorspace, picture.color_range) == (matrix, ColorRange.MPEG)


def test_odd_sides_gain_a_copy_and_even_ones_no_work() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    even = made_even(frame)
    assert even.shape == (6, 8, 3)
    np.testing.assert_array_equal(even[:5, :7], frame)
    np.testing.assert_array_equal(even[5], even[4])
    np.testing.assert_array_equal(even[:, 7], even[:, 6])
    assert made_even(even) is even
