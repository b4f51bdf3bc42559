"""Damage while translating: the last good frame is shown, the rest goes on, and what happened is said at the end."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from data_clips import VP9_FAST, number_of
from odd_files import NUM, cut, flip, write

from rlv2v.data.damage import MAX_KEPT, Faults
from rlv2v.data.index import index_folder
from rlv2v.data.video import timed_frames
from rlv2v.errors import UserError
from rlv2v.translate import Args, main

SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"bf": "0"}),
    "h264_b.mp4": ("libx264", {"bf": "2"}),
    "h264.ts": ("libx264", {"bf": "2"}),
    "h264.avi": ("libx264", {"bf": "2"}),
    "vp9.webm": ("libvpx-vp9", VP9_FAST),
    "mpeg4.mp4": ("mpeg4", {}),
}
MP4 = [name for name in SOURCES if name.endswith(("mp4", "webm"))]


BROKEN = 13


def make(folder: Path, name: str) -> Path:
    codec, options = SOURCES[name]
    return write(folder / name, codec, faststart=name.endswith("mp4"), **options)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records)


@pytest.mark.parametrize("name", MP4)
def test_damaged_frames_are_bridged_and_listed(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Packet 13 is broken, and a key frame follows at 16: the frames till then may differ, their number may not."""
    path = tmp_path / f"bad_{name}"
    flip(make(tmp_path, name), path, BROKEN)
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, path, tmp_path / "out.mp4"))
    shown = list(timed_frames(tmp_path / "out.mp4"))
    np.testing.assert_allclose([float(frame.time) for frame in shown], np.arange(NUM) / 10, atol=0.001)
    numbers = [number_of(frame.rgb) for frame in shown]
    assert numbers[:12] == list(range(12))
    if name != "mpeg4.mp4":  # whose decoder does not recover from this
        assert numbers[16:] == list(range(16, NUM))
    lines = [line for line in said(caplog).splitlines() if "cannot be decoded" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{path}: ") and lines[0].endswith("; the last good one is shown")
    listed = {int(k) for k in re.findall(r"\d+", lines[0].removeprefix(f"{path}: ").split(":")[-1])}
    assert listed & set(range(10, 16)) and not listed - set(range(NUM))


@pytest.mark.parametrize("name", MP4)
def test_strict_stops_with_the_first_and_writes_nothing(tiny_run: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"bad_{name}"
    flip(make(tmp_path, name), path, BROKEN)
    with pytest.raises(UserError, match=rf"^{path}: frame 1[0-5] cannot be decoded$"):
        main(Args(tiny_run, path, tmp_path / "out.mp4", strict=True))
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_that_is_cut_off_is_said(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (folder := tmp_path / "set").mkdir()
    path = folder / f"cut_{name}"
    cut(make(tmp_path, name), path, 13)
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, path, tmp_path / "out.mp4"))
    numbers = [number_of(frame.rgb) for frame in timed_frames(tmp_path / "out.mp4")]
    assert 10 <= len(numbers) <= 14 and numbers[:10] == list(range(10))
    ending = [line for line in said(caplog).splitlines() if "the file" in line]
    assert len(ending) == 1 and ending[0].startswith(f"{path}: "), said(caplog)
    (source,) = index_folder(folder, frames=1)
    assert source.status == "truncated" and "the file" in source.reason
    with pytest.raises(UserError, match=str(path)):
        main(Args(tiny_run, path, tmp_path / "strict.mp4", strict=True))
    assert not (tmp_path / "strict.mp4").exists()


def test_an_intact_video_is_translated_without_a_word(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SOURCES:
        with caplog.at_level(logging.WARNING):
            main(Args(tiny_run, make(tmp_path, name), tmp_path / "out.mp4", strict=True, overwrite=True))
        assert [number_of(f.rgb) for f in timed_frames(tmp_path / "out.mp4")] == list(range(NUM)), name
    assert said(caplog) == ""


def test_faults_are_listed_in_a_line_however_many_they_are() -> None:
    faults = Faults()
    for number in (3, 7, 8, 9, 12):
        faults.add(Path("a.mp4"), number)
    assert faults.lines() == ["5 frames: 3, 7-9, 12 cannot be decoded; the last good one is shown"]
    for number in range(20, 20_000, 2):
        faults.add(Path("a.mp4"), number)
    (line,) = faults.lines()
    assert line.startswith("9995 frames: 3, 7-9, 12, 20, 22, ") and ", ... cannot" in line and len(line) < 120
    assert len(faults.frames) == MAX_KEPT
    one = Faults()
    one.add(Path("a.mp4"), 4)
    one.end(Path("a.mp4"), "the file is cut off")
    assert one.lines() == ["frame 4 cannot be decoded; the last good one is shown", "the file is cut off"]
