"""Tests of the choice of the best checkpoint without a truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlv2v.config import Config
from rlv2v.crop_size import CropSize
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.method.samples import translate_samples
from rlv2v.metrics import METRICS, Row
from rlv2v.metrics.criterion import CRITERIA, DEFAULT, criterion
from rlv2v.metrics.images import References
from rlv2v.metrics.selection import Selection
from rlv2v.model.build import build_nets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """The samples of a run on a synthetic set of usual size."""
    folder = tmp_path_factory.mktemp("selection")
    write_dataset(folder / "data", size=32, frames=8, counts=Counts(x=16, y=48, z=48, s=6, val=4, test=1))
    (folder / "run").mkdir()
    return Selection(Config.of("default", data=folder / "data", out=folder / "run"))


def nearly(source: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A translation that is nearly trained: a tenth of the source shines through, and there is some noise."""
    noise = 4 * np.random.default_rng(0).standard_normal(truth.shape)
    return np.rint((0.9 * truth + 0.1 * source + noise).clip(0, 255)).astype(np.uint8)


BAD: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "copy": lambda x, y: x,
    "still": lambda x, y: np.broadcast_to(y.mean(axis=0, keepdims=True), y.shape).astype(np.uint8),
    "grey": lambda x, y: np.full_like(x, 128),
    "half-way": lambda x, y: np.rint(0.4 * y + 0.6 * x).astype(np.uint8),
    "noise": lambda x, y: np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8),
}


def score(selection: Selection, outputs: list[np.ndarray]) -> float:
    return criterion(selection.rows(outputs)[0], selection.identity)


def outputs_of(selection: Selection, make: Callable[[Any, Any], np.ndarray]) -> list[np.ndarray]:
    return [make(sample.source, sample.truth) for sample in selection.samples]


@pytest.mark.parametrize("name", BAD)
def test_the_criterion_ranks_a_nearly_trained_model_first(selection: Selection, name: str) -> None:
    good = score(selection, outputs_of(selection, nearly))
    assert (
        score(selection, outputs_of(selection, lambda x, y: y))
        < good
        < score(selection, outputs_of(selection, BAD[name]))
    )


def test_detail_is_lost_where_it_is_neither_the_source_s_nor_the_target_s() -> None:
    """The target is twice as sharp as the source: all in between is right, and what is beyond either is not."""

    def lost(sharpness: float) -> float:
        own: Row = {"sharpness": sharpness, "detail_distance": abs(np.log(sharpness / 2))}
        return CRITERIA["detail"].score(own, {"detail_distance": np.log(2)})

    assert [lost(value) for value in (1.0, 1.5, 2.0)] == pytest.approx([0, 0, 0], abs=1e-12)
    assert (lost(0.5), lost(4.0)) == pytest.approx((np.log(2), np.log(2)))
    unknown: Row = {"sharpness": 1.5, "detail_distance": None}
    assert CRITERIA["detail"].score(unknown, {"detail_distance": np.log(2)}) == pytest.approx(np.log(1.5))


def test_references_are_measured_in_the_middle_of_their_frames(tmp_path: Path) -> None:
    """At the size of crops, which are cut as the samples are; the second video has no more than the crop."""
    clip = np.random.default_rng(0).integers(0, 256, (9, 16, 40, 3), dtype=np.uint8)
    values = []
    for name, frames, size in (("wide", clip, CropSize(16, 24)), ("middle", clip[:, :, 8:32], 16)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", frames)
        values.append(References.open({tmp_path / name: frozenset({"target"})}).values(size)["target"])
    assert values[0].keys() == values[1].keys() and len(values[0]) > 2
    assert all(np.allclose(value, values[1][name], rtol=1e-6) for name, value in values[0].items())


def test_the_criterion_ranks_an_untrained_model_last(selection: Selection) -> None:
    torch.manual_seed(0)
    untrained = translate_samples(
        build_nets(selection.config, discriminators=False).g_y, selection.config, selection.samples
    )
    assert score(selection, outputs_of(selection, nearly)) < score(selection, untrained)


def test_the_truth_is_reported_and_never_used(selection: Selection) -> None:
    row, truth = selection.rows(outputs_of(selection, nearly))
    assert truth and truth.keys() == {"l1", "psnr", "ssim", "flicker"} and not truth.keys() & row.keys()
    known = {name for name, value in row.items() if value is not None}
    assert {"patch_distance", "kid", "region_colour_distance", "edge_agreement", "sharpness"} <= known
    needs = {need for name in known for need in METRICS[name].needs}
    assert needs <= {"target", "training"}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_candidate_is_finite_whatever_is_missing(name: str) -> None:
    nothing: Row = dict.fromkeys(METRICS)
    zeros: Row = dict.fromkeys(METRICS, 0.0)
    huge: Row = dict.fromkeys(METRICS, 1e30)
    for own in (nothing, zeros, huge):
        for identity in (nothing, zeros, huge):
            assert np.isfinite(CRITERIA[name].score(own, identity))
    assert DEFAULT in CRITERIA


def test_a_line_a_checkpoint_and_the_best_of_them(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.3, 0.4, 0.3, 0.2])
    monkeypatch.setattr("rlv2v.metrics.selection.criterion", lambda own, identity: next(scores))
    g = build_nets(selection.config, discriminators=False).g_y
    is_best = []
    for step in range(4):
        rows = selection.measure(step, 1.5 * step, g)
        is_best.append(selection.is_best)
    assert is_best == [True, True, False, False] and (selection.best["step"], selection.num_since_best) == (1, 2)
    assert len(rows) == 9 and selection.values()["best_criterion"] == 0.3
    lines = [json.loads(line) for line in selection.path.read_text().splitlines()]
    assert [line["criterion"] for line in lines] == [0.5, 0.3, 0.4, 0.3] and lines[2]["seconds"] == 3.0
    again = Selection(selection.config, step=2, best=(0, 0.1))  # killed after its checkpoint of step 2
    assert [line["step"] for line in again.lines] == [0, 1, 2] and again.num_since_best == 1
    selection.path.unlink()
    assert Selection(selection.config, step=2, best=(1, 0.3)).best["step"] == 1, "the checkpoints know it, too"


def test_a_folder_without_val_is_measured_on_trainx(data: Path, tmp_path: Path) -> None:
    for name in ("trainX", "trainY"):
        (tmp_path / name).symlink_to(data / name)
    selection = Selection(Config.of("tiny", data=tmp_path, out=tmp_path))
    selection.measure(0, 0.0, build_nets(selection.config, discriminators=False).g_y)
    assert selection.best["truth"] is None and 0 < selection.best["criterion"] < 20
