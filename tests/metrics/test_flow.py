"""The flow of a source: motions that are known, what comes into view, and the warp beside plain bilinear sampling."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from metric_cases import scene

from rlv2v.metrics.flow import Flow, backward_flow


def sampled(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bilinear samples at the places (x, y), the border repeated."""
    height, width = image.shape[:2]
    corner = np.floor(places).astype(int)
    share = (places - corner)[..., None, :]

    def at(dx: int, dy: int) -> np.ndarray:
        row, column = np.clip(corner[..., 1] + dy, 0, height - 1), np.clip(corner[..., 0] + dx, 0, width - 1)
        return image[row, column].astype(float)

    upper = at(0, 0) * (1 - share[..., 0]) + at(1, 0) * share[..., 0]
    lower = at(0, 1) * (1 - share[..., 0]) + at(1, 1) * share[..., 0]
    return upper * (1 - share[..., 1]) + lower * share[..., 1]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 50), (540, 960)])
def test_the_warp_is_bilinear_sampling_to_a_32nd_of_a_pixel(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 2.0)
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
    places = (grid + rng.normal(0, 3, (height, width, 2))).astype(np.float32)
    maps = cv2.convertMaps(places, np.empty(0, np.float32), cv2.CV_16SC2)
    flow = Flow(maps, np.full((height, width), 255, np.uint8), height * width)
    assert np.abs(flow.warp(image) - sampled(image, places)).max() <= 2, "of 255"


@pytest.mark.parametrize("scale", [1, 8])
def test_a_pan_is_found_and_undone(scale: int) -> None:
    """The scene pans by 2 pixels a frame; at 576 lines the search is at half the size."""
    previous, image = (cv2.resize(frame, None, fx=scale, fy=scale) for frame in scene()[:2])
    flow = backward_flow(image, previous)
    inner = np.s_[: 24 * scale, 8 * scale : 88 * scale]  # above the box, away from the border
    fraction = np.stack([flow.maps[1] & 31, flow.maps[1] >> 5], axis=-1) / 32
    shift = flow.maps[0] + fraction - np.stack(np.meshgrid(*map(np.arange, image.shape[1::-1])), axis=-1)
    assert np.median(shift[inner], axis=(0, 1)) == pytest.approx([2 * scale, 0], abs=0.2 * scale)
    assert np.abs(flow.warp(previous)[inner].astype(int) - image[inner]).mean() < 2
    assert flow.num_visible > 0.8 * flow.visible.size


def test_what_comes_into_view_is_left_out() -> None:
    """A box jumps 8 pixels to the right: the ground that it stood on is new, and is not trusted."""
    frames = []
    for left in (40, 48):
        frame = scene(1)[0].copy()
        frame[20:52, left : left + 32] = scene(2)[0][20:52, :32, ::-1]
        frames.append(frame)
    visible = backward_flow(frames[1], frames[0]).visible > 0
    assert visible[24:48, 41:47].mean() < 0.5 < 0.9 < visible[24:48, 54:76].mean()
    assert visible[:, :30].mean() > 0.95
