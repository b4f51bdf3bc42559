"""Evaluation of a run on a split: the three rows, pairing with the truth, long videos, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlv2v.checkpoint.export import load_translator
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.evaluate import Args, main
from rlv2v.method.translation import translate_clip
from rlv2v.metrics import METRICS, clip_metrics, mean_metrics, table
from rlv2v.metrics.evaluation import evaluate_run, open_split, translated_clips

KEYS = ["background_accuracy", "clip_accuracy", "iou", "foreground_error", "l1", "psnr", "ssim", "flicker"]


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


def test_json_has_the_rows_of_model_identity_and_truth(
    tiny_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(Args(tiny_run, data, json=tmp_path / "e.json"))
    result = json.loads((tmp_path / "e.json").read_text())
    assert list(result) == ["run", "data", "split", "rows"]
    assert (result["run"], result["data"], result["split"]) == (str(tiny_run), str(data), "test")
    rows = result["rows"]
    assert list(rows) == ["model", "identity", "truth"] and all(list(row) == KEYS for row in rows.values())
    assert (rows["truth"]["clip_accuracy"], rows["truth"]["l1"], rows["truth"]["psnr"]) == (1, 0, 100)
    assert table(rows, title="test") in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    g, config = load_translator(tiny_run)
    model, identity = [], []
    for path in sorted((data / "testX").glob("*.mp4")):
        source, truth = (np.stack(list(read_frames(data / name / path.name))) for name in ("testX", "testTruth"))
        model.append(clip_metrics(translate_clip(g, config, source), source, truth, synthetic=True))
        identity.append(clip_metrics(source, source, truth, synthetic=True))
    assert rows["model"] == pytest.approx(mean_metrics(model)) and 0 < rows["model"]["l1"] < 1
    assert rows["identity"] == pytest.approx(mean_metrics(identity)) != pytest.approx(rows["model"])


def test_a_long_video_is_cut_into_clips_with_the_state_carried(tiny_run: Path, tmp_path: Path) -> None:
    frames = noise(11, 20, 30)
    write_pair(tmp_path, "long.mp4", frames, 255 - frames)
    g, config = load_translator(tiny_run)
    clips = list(translated_clips(g, config, open_split(tmp_path, "test")[0]))
    assert [len(source) for source, _, _ in clips] == [4, 4, 3] and clips[0][0].shape[1:] == (16, 16, 3)
    source, output, truth = (np.concatenate(column).astype(int) for column in zip(*clips, strict=True))
    assert np.abs(255 - source - truth).max() <= 1  # the same crop of both; scaling rounds
    assert np.abs(output - translate_clip(g, config, source.astype(np.uint8))).max() <= 1


def test_without_truth_or_palette_the_metrics_are_null(tiny_run: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "bare", "a.mp4", noise(4), None)
    bare = evaluate_run(tiny_run, tmp_path / "bare")["rows"]
    assert all(row == dict.fromkeys(KEYS) for row in bare.values())
    write_pair(tmp_path / "real", "a.mp4", noise(4), noise(4, seed=1))
    (tmp_path / "real" / "testX").rename(tmp_path / "real" / "testA")  # CycleGAN's name
    real = evaluate_run(tiny_run, tmp_path / "real")["rows"]["model"]
    assert [key for key, value in real.items() if value is None] == KEYS[:4]


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
    write_pair(tmp_path / "note", "a.mp4", noise(4), noise(4))
    (tmp_path / "note" / "dataset.json").write_text("{")
    for args, words in [
        (Args(tmp_path / "no-run", data), "no-run"),
        (Args(tiny_run, tmp_path / "absent"), "expected a folder testX"),
        (Args(tiny_run, tmp_path / "empty"), "no usable video"),
        (Args(tiny_run, tmp_path / "unpaired"), "no truth for b.mp4"),
        (Args(tiny_run, tmp_path / "short"), "shorter than its source .*2 frames expected, 1 left"),
        (Args(tiny_run, tmp_path / "note"), "dataset.json"),
        (Args(tiny_run, data, json=tmp_path / "absent" / "e.json"), "folder that exists"),
    ]:
        with pytest.raises(UserError, match=words):
            main(args)


def test_the_table_follows_the_registry() -> None:
    row = dict.fromkeys(METRICS, 0.123456) | {"iou": None}
    lines = table({"model": row}, title="val").splitlines()
    assert lines[0] == "| val | " + " | ".join(KEYS) + " |" and lines[1].count("---") == len(KEYS) + 1
    assert lines[2] == "| model | 0.1235 | 0.1235 | - | 0.1235 | 0.1235 | 0.12 | 0.1235 | 0.1235 |"
