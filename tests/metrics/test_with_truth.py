"""The metrics on clips whose values can be worked out by hand, and whether they order outputs as people would."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from rlv2v.metrics import METRICS, Row, clip_metrics, mean_metrics

GREEN, BLUE, RED = (0, 255, 0), (0, 0, 255), (255, 0, 0)
T, SIZE = 8, 16


def clip(colour=GREEN, backgrounds=((0, 0, 0),) * T, *, top=4, shift=0) -> np.ndarray:
    """A 6x6 square of `colour` over one background a frame; `shift` moves it right."""
    frames = np.empty((T, SIZE, SIZE, 3), np.uint8)
    frames[:] = np.array(backgrounds, np.uint8)[:, None, None]
    frames[:, top : top + 6, 4 + shift : 10 + shift] = colour
    return frames


SOURCE = clip()
TRUTH = clip(backgrounds=(BLUE,) * 4 + (RED,) * 4)


def metrics(output: np.ndarray, truth: np.ndarray | None = TRUTH, *, synthetic: bool = True) -> Row:
    return clip_metrics(output, SOURCE, truth, synthetic=synthetic)


def test_truth_scores_perfectly():
    m = metrics(TRUTH)
    assert m["background_accuracy"] == m["clip_accuracy"] == m["iou"] == 1
    assert m["foreground_error"] == m["l1"] == m["flicker"] == 0
    assert m["psnr"] == 100 and m["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_truth_beats_blurred_truth_beats_another_video(name):
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in TRUTH])
    wrong = np.random.default_rng(0).permutation(clip(RED, (GREEN, BLUE) * 4, top=9, shift=5).reshape(-1, 3))
    sign = 1 if METRICS[name].better == "higher" else -1
    best, middle, worst = (sign * metrics(o)[name] for o in (TRUTH, blurred, wrong.reshape(TRUTH.shape)))
    assert best >= middle > worst
    if name in ("foreground_error", "l1", "psnr", "ssim", "flicker"):
        assert best > middle


def test_every_metric_says_how_to_read_it():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.better in ("higher", "lower") and len(metric.meaning) > 30


def test_source_copied_has_iou_one_and_no_background():
    m = metrics(SOURCE)
    assert m["background_accuracy"] == m["clip_accuracy"] == 0
    assert m["iou"] == 1 and m["foreground_error"] == 0
    share_of_background = 1 - 36 / SIZE**2
    assert m["l1"] == pytest.approx(share_of_background / 3, rel=1e-6)
    assert m["psnr"] == pytest.approx(-10 * math.log10(share_of_background / 3), rel=1e-4)
    # One of the seven steps changes two of the three channels of the truth's background by 1.
    assert m["flicker"] == pytest.approx(share_of_background * 2 / 3 / (T - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (clip(backgrounds=(BLUE,) * 5 + (RED,) * 3), {"background_accuracy": 7 / 8, "clip_accuracy": 0}),
        # a colour counts as the palette's nearest
        (clip(backgrounds=((40, 30, 170),) * 4 + ((180, 60, 20),) * 4), {"background_accuracy": 1}),
        (clip(backgrounds=(BLUE,) * 4 + (RED,) * 4, shift=3), {"iou": 18 / 54}),
        # the object vanished: its pixels are blue instead of green
        (clip(colour=BLUE, backgrounds=(BLUE,) * T), {"iou": 0, "foreground_error": 2 / 3}),
    ],
)
def test_values_of_what_went_wrong(output, expected):
    m = metrics(output)
    assert {name: m[name] for name in expected} == pytest.approx(expected)


def test_what_a_clip_lacks_is_none():
    full = np.full_like(SOURCE, 255)  # the object fills every frame
    lacks = {
        ("background_accuracy", "clip_accuracy", "iou"): clip_metrics(full, full, TRUTH, synthetic=True),
        ("ssim", "flicker"): clip_metrics(*(c[:1, :8, :8] for c in (SOURCE, SOURCE, TRUTH)), synthetic=True),
        tuple(METRICS)[:4]: metrics(SOURCE, synthetic=False),
        tuple(METRICS): metrics(SOURCE, None),
    }
    for names, m in lacks.items():
        assert tuple(name for name in m if m[name] is None) == names


def test_flicker_ignores_a_constant_offset_and_sees_an_alternating_one():
    grey = np.full((T, SIZE, SIZE, 3), 0.5, np.float32)
    sign = np.where(np.arange(T) % 2, 1, -1)[:, None, None, None]
    constant = clip_metrics(grey + 0.1, grey, grey, synthetic=False)
    alternating = clip_metrics(grey + np.float32(0.1) * sign, grey, grey, synthetic=False)
    assert constant["flicker"] == pytest.approx(0, abs=1e-6)
    assert alternating["flicker"] == pytest.approx(0.2, rel=1e-5)
    assert constant["l1"] == pytest.approx(alternating["l1"], rel=1e-5)


def test_uint8_and_float_agree():
    as_float = clip_metrics(SOURCE / 255.0, SOURCE / 255.0, TRUTH / 255.0, synthetic=True)
    assert as_float == pytest.approx(metrics(SOURCE), rel=1e-6)
    with pytest.raises(ValueError, match="uint8 or float"):
        clip_metrics(SOURCE.astype(int), SOURCE, TRUTH, synthetic=True)


def test_mean_is_over_the_clips_that_have_the_metric():
    m = mean_metrics([metrics(TRUTH), metrics(SOURCE), metrics(SOURCE, None)])
    assert m["clip_accuracy"] == 0.5
    assert mean_metrics([metrics(SOURCE, None)]) == dict.fromkeys(METRICS)
    with pytest.raises(ValueError, match="at least one clip"):
        mean_metrics([])


@pytest.mark.parametrize("wrong", [SOURCE[:4], SOURCE[..., :1], SOURCE[0]])
def test_wrong_shapes_are_named(wrong):
    with pytest.raises(ValueError, match=r"output must be \(T,H,W,3\)=\(8, 16, 16, 3\)"):
        metrics(wrong)
