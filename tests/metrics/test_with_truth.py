"""The metrics on clips whose values can be worked out by hand, and whether they order outputs as people would."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from rlv2v.metrics import METRICS, Row, clip_metrics, mean_metrics, spread_metrics

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


NAMES = [name for name, metric in METRICS.items() if metric.needs <= {"truth", "synthetic"} and "truth" in metric.needs]


def metrics(output: np.ndarray, truth: np.ndarray | None = TRUTH, *, synthetic: bool = True) -> Row:
    return clip_metrics(output, SOURCE, truth, synthetic=synthetic)


def test_truth_scores_perfectly():
    m = metrics(TRUTH)
    assert m["background_accuracy"] == m["clip_accuracy"] == m["iou"] == 1
    assert m["foreground_error"] == m["l1"] == m["flicker"] == 0
    assert m["psnr"] == 100 and m["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
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
        assert metric.name == name and min(len(metric.meaning), len(metric.formula)) > 10 and metric.source


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
    synthetic = ["background_accuracy", "clip_accuracy", "iou", "foreground_error"]
    for names, m in [
        (["background_accuracy", "clip_accuracy", "iou"], clip_metrics(full, full, TRUTH, synthetic=True)),
        (["ssim", "flicker"], clip_metrics(*(c[:1, :8, :8] for c in (SOURCE, SOURCE, TRUTH)), synthetic=True)),
        (synthetic, metrics(SOURCE, synthetic=False)),
        (NAMES, metrics(SOURCE, None)),
    ]:
        assert [name for name in NAMES if m[name] is None] == names


def test_ssim_is_that_of_the_library_and_large_frames_are_shrunk_first():
    rng = np.random.default_rng(0)
    truth = cv2.GaussianBlur(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), (0, 0), 2.0)
    output = np.rint(0.8 * truth + rng.normal(0, 6, truth.shape)).clip(0, 255).astype(np.uint8)

    def torch_images(*images: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(image.transpose(2, 0, 1).copy())[None].double() / 255 for image in images]

    expected = float(structural_similarity_index_measure(*torch_images(output, truth), data_range=1.0))
    assert clip_metrics(output[None], truth[None], truth[None])["ssim"] == pytest.approx(expected, abs=2e-3)
    large = [image.repeat(16, axis=0).repeat(16, axis=1) for image in (output, truth)]  # 768 lines: shrunk by 3
    small = [cv2.resize(image, None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA) for image in large]
    shrunk = clip_metrics(small[0][None], small[1][None], small[1][None])["ssim"]
    assert clip_metrics(large[0][None], large[1][None], large[1][None])["ssim"] == pytest.approx(shrunk, abs=1e-6)


def test_flicker_ignores_a_constant_offset_and_sees_an_alternating_one():
    grey = np.full((T, SIZE, SIZE, 3), 102, np.uint8)
    offset = np.where(np.arange(T) % 2, 51, -51)[:, None, None, None]
    constant = clip_metrics(grey + np.uint8(51), grey, grey)
    alternating = clip_metrics((grey + offset).astype(np.uint8), grey, grey)
    assert constant["flicker"] == 0
    assert alternating["flicker"] == pytest.approx(0.4, rel=1e-5)
    assert constant["l1"] == pytest.approx(alternating["l1"], rel=1e-5)


def test_mean_is_over_the_clips_that_have_the_metric():
    m = mean_metrics([metrics(TRUTH), metrics(SOURCE), metrics(SOURCE, None)])
    assert m["clip_accuracy"] == 0.5
    assert mean_metrics([metrics(SOURCE, None)])["clip_accuracy"] is None
    assert spread_metrics([metrics(TRUTH), metrics(SOURCE)])["clip_accuracy"] == 0.5
    with pytest.raises(ValueError, match="at least one clip"):
        mean_metrics([])


@pytest.mark.parametrize("wrong", [SOURCE[:4], SOURCE[..., :1], SOURCE[0], SOURCE.astype(int)])
def test_wrong_clips_are_named(wrong):
    with pytest.raises(ValueError, match=r"output must be uint8 \(T,H,W,3\)=\(8, 16, 16, 3\)"):
        metrics(wrong)
