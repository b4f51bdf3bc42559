"""bench/real_pair.py: clips of a street video, its night grade as hidden truth, and no test frame in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import real_pair

from rlv2v.data.dali import decodes
from rlv2v.data.index import open_dataset
from rlv2v.data.loader import evaluation_clips
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair") / "set"
    real_pair.main(real_pair.Args(out=out, size=32))
    return out


def clips(folder: Path) -> list[np.ndarray]:
    return [clip for _, clip in evaluation_clips(folder, frames=8, size=32)]


def test_layout(written: Path) -> None:
    dataset = open_dataset(written, frames=8)
    assert [len(dataset.sets[k]) for k in "xyzs"] == [15, 30, 0, 0]
    sources = dataset.sets["x"] + dataset.sets["y"]
    assert all(s.num_frames == 8 and s.height == 32 and decodes(s, "cpu") for s in sources)
    assert [len(clips(written / name)) for name in ("testX", "testTruth", "valX", "valTruth")] == [3] * 4
    assert json.loads((written / "dataset.json").read_text())["kind"] == "real-pair"


def test_truth_is_the_graded_source_and_far_from_it(written: Path) -> None:
    for part in ("test", "val"):
        for source, truth in zip(clips(written / f"{part}X"), clips(written / f"{part}Truth"), strict=True):
            np.testing.assert_array_equal(truth, real_pair.night(source))
            assert np.mean((source.astype(float) - truth) ** 2) > 1600, "the task must not be trivial: PSNR below 16"
            assert (np.diff(truth.mean((1, 2, 3)) / source.mean((1, 2, 3))) < 0).all(), "it darkens over the clip"


def test_no_frame_of_test_or_val_is_trained_on(written: Path) -> None:
    trained, tested, validated = (
        {frame.tobytes() for path in (written / name).glob("*.mp4") for frame in read_frames(path)}
        for name in ("trainX", "testX", "valX")
    )
    assert len(trained) == 72
    assert not trained & (tested | validated) and not tested & validated


def test_grade_by_hand() -> None:
    grey = np.full((3, 1, 1, 3), 128, np.uint8)
    x = (128 / 255) ** 1.1
    expected = [
        [round(255 * g * c * x + 255 * b) for c, b in ((0.55, 0), (0.65, 0), (1.0, 0.04))] for g in (0.9, 0.625, 0.35)
    ]
    assert real_pair.night(grey)[:, 0, 0].tolist() == expected


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for changes, message in (
        ({"frames": 1}, "--frames: expected 2 to 25"),
        ({"size": 999}, "--size: expected 16 to 272"),
        ({"out": tmp_path}, "not an empty folder"),
    ):
        with pytest.raises(UserError, match=message):
            real_pair.main(real_pair.Args(**({"out": tmp_path / "out"} | changes)))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
