"""A clip of many frames: some metrics look at a share of them, and a curve says which."""

from __future__ import annotations

import numpy as np
import pytest

from rlv2v.metrics import METRICS, scenes
from rlv2v.metrics.base import MAX_SAMPLED, ClipMeter


@pytest.mark.parametrize("num", [2 * MAX_SAMPLED - 1, 2 * MAX_SAMPLED, 4 * MAX_SAMPLED + 3])
def test_a_curve_has_its_values_at_the_frames_that_were_measured(num: int) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    meter = ClipMeter({"target", "training"})
    for image, scene in zip(clip, scenes(clip), strict=True):
        meter.add(image, scene)
    curves = meter.curves()
    sampled = [metric for metric in METRICS.values() if metric.sampled and metric.name in curves]
    assert "detail_distance" in {metric.name for metric in sampled}
    for metric in sampled:
        known = [k for k, value in enumerate(curves[metric.name]) if value is not None]
        step = known[1]
        assert known == list(range(0, num, step)) and num / step <= 2 * MAX_SAMPLED
        for k in known[::17]:
            alone = ClipMeter({"target", "training"})
            (scene,) = scenes(clip[k : k + 1])
            alone.add(clip[k], scene)
            assert curves[metric.name][k] == pytest.approx(alone.curves()[metric.name][0])
    assert all(len(curve) == num for curve in curves.values())
