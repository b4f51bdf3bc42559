"""Evaluation of a run on a split: the three rows, pairing with the truth, long videos, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlv2v.checkpoint.export import load_translator
from rlv2v.data.images import write_image
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.evaluate import Args, main
from rlv2v.method.translation import Stream
from rlv2v.metrics import METRICS, clip_metrics, table
from rlv2v.metrics.evaluation import evaluate_run, open_references, open_split

ROWS = ["model", "identity", "constant", "truth", "target"]
OURS = ["background_accuracy", "clip_accuracy", "iou", "foreground_error"]
WITH_TRUTH = ["l1", "psnr", "ssim", "flicker"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set at the tiny run's size and clip length."""
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=4, y=4, z=0, s=0, val=1, test=3))
    return out


def noise(t: int, h: int = 16, w: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def write_pair(root: Path, name: str, frames: np.ndarray, truth: np.ndarray | None) -> None:
    for folder, clip in (("testX", frames), ("testTruth", truth)):
        if clip is not None:
            (root / folder).mkdir(parents=True, exist_ok=True)
            write_clip(root / folder / name, clip, 8, "vp9-lossless")


def test_json_has_a_row_for_each_reference(
    tiny_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(Args(tiny_run, data, json=tmp_path / "e.json"))
    result = json.loads((tmp_path / "e.json").read_text())
    assert (result["run"], result["data"], result["split"]) == (str(tiny_run), str(data), "test")
    rows = result["rows"]
    assert list(rows) == list(result["spread"]) == ROWS and all(list(row) == list(METRICS) for row in rows.values())
    assert (rows["truth"]["clip_accuracy"], rows["truth"]["l1"], rows["truth"]["psnr"]) == (1, 0, 100)
    assert rows["identity"]["edge_agreement"] == pytest.approx(1) and rows["target"]["patch_distance"] > 0
    assert table(rows, title="test") in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    assert len(result["random_features"]["sha256"]) == 64 and len(result["clips"]) == 3
    values = [clip["rows"]["model"]["l1"] for clip in result["clips"]]
    assert rows["model"]["l1"] == pytest.approx(np.mean(values)) and result["spread"]["model"]["l1"] > 0
    assert result["spread"]["model"]["l1"] == pytest.approx(np.std(values))


@pytest.mark.parametrize("folder", ["trainY", "trainS"])
def test_stills_alone_are_a_target_set(tmp_path: Path, folder: str) -> None:
    for name in {"trainY", folder}:
        (tmp_path / name).mkdir()
    for number, image in enumerate(noise(3)):
        write_image(tmp_path / folder / f"{'abc'[number]}.png", image)
    references = open_references(tmp_path, "test")
    assert references.kinds == {"target", "training"}
    assert len(references.values(16)["target"]["detail_distance"]) == 3


def test_a_clip_is_the_whole_video_at_its_own_size(tiny_run: Path, tmp_path: Path) -> None:
    frames = noise(11, 20, 30)
    write_pair(tmp_path, "long.mp4", frames, 255 - frames)
    seen = []
    result = evaluate_run(tiny_run, tmp_path, record=lambda name, scene, output: seen.append((scene.source, output)))
    stored, truth = (np.stack(list(read_frames(tmp_path / f / "long.mp4"))) for f in ("testX", "testTruth"))
    sources, outputs = (np.stack(column) for column in zip(*seen, strict=True))
    assert (sources == stored).all() and outputs.shape == stored.shape
    stream = Stream(*load_translator(tiny_run))
    assert (outputs == np.stack([stream(frame) for frame in stored])).all()
    (clip,) = result.clips
    assert (clip.name, clip.num_frames, clip.height, clip.width) == ("long.mp4", 11, 20, 30)
    expected = clip_metrics(outputs, stored, truth)
    assert {key: clip.rows["model"][key] for key in WITH_TRUTH} == {key: expected[key] for key in WITH_TRUTH}
    curve = clip.curves["model"]["warping_error"]
    assert len(curve) == 11 and curve[0] is None and all(value is not None for value in curve[1:])


def test_without_truth_or_palette_the_metrics_are_null(tiny_run: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "bare", "a.mp4", noise(4), None)
    bare = evaluate_run(tiny_run, tmp_path / "bare").rows["model"]
    needless = {name for name, metric in METRICS.items() if metric.needs <= {"cycle"}} - {"drift"}  # too short for that
    assert {key for key, value in bare.items() if value is not None} == needless
    write_pair(tmp_path / "real", "a.mp4", noise(4), noise(4, seed=1))
    (tmp_path / "real" / "testX").rename(tmp_path / "real" / "testA")  # CycleGAN's name
    real = evaluate_run(tiny_run, tmp_path / "real").rows["model"]
    assert {key for key, value in real.items() if value is not None} == needless | set(WITH_TRUTH)


def test_broken_videos_are_skipped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path, "good.mp4", noise(4), noise(4))
    (tmp_path / "testX" / "bad.mp4").write_bytes(b"no video")
    assert [pair.source.path.name for pair in open_split(tmp_path, "test")] == ["good.mp4"]
    assert "bad.mp4" in caplog.text


def test_mistakes_are_refused_by_name(tiny_run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "testX").mkdir(parents=True)
    write_pair(tmp_path / "unpaired", "a.mp4", noise(4), noise(4))
    write_pair(tmp_path / "unpaired", "b.mp4", noise(4), None)
    write_pair(tmp_path / "short", "a.mp4", noise(6), noise(5))
    write_pair(tmp_path / "sizes", "a.mp4", noise(4), noise(4, 16, 18))
    write_pair(tmp_path / "note", "a.mp4", noise(4), noise(4))
    (tmp_path / "note" / "dataset.json").write_text("{")
    for args, words in [
        (Args(tmp_path / "no-run", data), "no-run"),
        (Args(tiny_run, tmp_path / "absent"), "expected a folder testX"),
        (Args(tiny_run, tmp_path / "empty"), "no usable video"),
        (Args(tiny_run, tmp_path / "unpaired"), "no truth for b.mp4"),
        (Args(tiny_run, tmp_path / "short"), "shorter than its source .*6 frames expected, 5 found"),
        (Args(tiny_run, tmp_path / "sizes"), "a.mp4: expected its source's size 16x16, got 18x16"),
        (Args(tiny_run, tmp_path / "note"), "dataset.json"),
        (Args(tiny_run, data, threads=-1), "--threads: expected 0 or more, got -1"),
        (Args(tiny_run, data, json=tmp_path / "absent" / "e.json"), "folder that exists"),
    ]:
        with pytest.raises(UserError, match=words):
            main(args)


def test_the_table_shows_what_is_known() -> None:
    row = dict.fromkeys(METRICS) | {"iou": 0.123456, "psnr": 9.999}
    lines = table({"model": row, "identity": dict.fromkeys(METRICS)}, title="val").splitlines()
    assert lines[0] == "| val | better | model | identity |"
    assert lines[2:] == ["| iou | higher | 0.1235 | - |", "| psnr | higher | 10.00 | - |"]
