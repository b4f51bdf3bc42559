"""The index: what is usable is used, what is not is named with its reason, and unchanged files are not read twice."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import av
import numpy as np
import pytest

from rlv2v.data import index, video
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.readers import PyAVReader
from rlv2v.data.video import write_clip, write_image
from rlv2v.errors import UserError


def noise(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def by_name(sources: list[Source]) -> dict[str, Source]:
    return {s.path.name: s for s in sources}


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        output.mux(stream.encode(samples))
        output.mux(stream.encode(None))


def write_early_header(path: Path, clip: np.ndarray) -> None:
    """An MP4 with its table in front, so that a cut file still opens."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as output:
        stream = output.add_stream("libx264", rate=10, options={"g": "4", "bf": "0", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One source of every kind and every fault."""
    clip = noise(20)
    write_clip(tmp_path / "good.mp4", clip, 8)
    write_clip(tmp_path / "vp9.mp4", clip, 8, "vp9-lossless")
    np.save(tmp_path / "raw.npy", clip)
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(clip):
        write_image(tmp_path / "frames" / f"{t}.png", frame)
    write_clip(tmp_path / "short.mp4", clip[:5], 8)
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    write_sound(tmp_path / "sound.m4a")
    (tmp_path / "tail.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-1000])  # its table is at the end
    write_early_header(tmp_path / "whole.mp4", clip)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    flipped = bytearray(data)
    for place in range(len(data) * 3 // 4, len(data) * 3 // 4 + 3000):  # more than one frame: a decoder sees that
        flipped[place] ^= 0xA5
    (tmp_path / "flipped.mp4").write_bytes(flipped)
    (tmp_path / "hole").mkdir()
    for t, frame in enumerate(clip[:12]):
        write_image(tmp_path / "hole" / f"{t}.png", frame)
    (tmp_path / "hole" / "9.png").write_bytes(b"broken")
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "line\nbreak.mp4").write_bytes(b"")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    return tmp_path


EXCLUDED = {
    "short.mp4": "5 frames, shorter than the clip length 8",
    "zero.mp4": "cannot be opened as a video",
    "text.mp4": "cannot be opened as a video",
    "sound.m4a": "no video stream",
    "tail.mp4": "cannot be opened as a video",
    "dir.mp4": "a folder without images",
    "loop.mp4": "symbolic links",
    "pipe.mp4": "neither a file nor a folder",
    "line\nbreak.mp4": "cannot be opened as a video",
}


def test_every_source_has_its_status_and_reason(folder: Path) -> None:
    found = by_name(index_folder(folder, frames=8))
    assert list(found) == [p.name for p in index.entries(folder)] and ".hidden.mp4" not in found
    for name in ("good.mp4", "vp9.mp4", "raw.npy", "frames", "whole.mp4"):
        source = found.pop(name)
        assert (source.status, source.num_frames, source.width, source.height) == ("ok", 20, 48, 32), source
        assert source.dali == (name == "vp9.mp4") and source.reason == ""
    for name, reason in EXCLUDED.items():
        source = found.pop(name)
        assert source.status == "excluded" and reason in source.reason, source
        assert "\n" not in source.reason
    for name in ("cut.mp4", "flipped.mp4"):
        assert found[name].status == "truncated" and 8 <= found[name].num_frames < 20, found[name]
    hole = found["hole"]
    assert (hole.status, hole.num_frames) == ("truncated", 9) and "9.png" in hole.reason
    assert set(found) == {"cut.mp4", "flipped.mp4", "hole"}


def test_the_good_part_of_a_damaged_file_reads_like_the_whole_file(folder: Path) -> None:
    found, whole = by_name(index_folder(folder, frames=8)), list(video.read_frames(folder / "whole.mp4"))
    for name in ("cut.mp4", "flipped.mp4"):
        num = found[name].num_frames
        part = PyAVReader().read(found[name], 0, num)
        np.testing.assert_array_equal(part, np.stack(whole[:num]))
        np.testing.assert_array_equal(PyAVReader().read(found[name], num - 3, 3), part[-3:])


def test_unchanged_files_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder, frames=8)
    seen: list[str] = []
    inspect = index.inspect
    monkeypatch.setattr(index, "inspect", lambda path: (seen.append(path.name), inspect(path))[1])
    assert index_folder(folder, frames=8) == first
    assert set(seen) == set(EXCLUDED) - {"short.mp4"}, "only what could not be used is tried again"
    seen.clear()
    assert by_name(index_folder(folder, frames=3))["short.mp4"].status == "ok", "the length is judged anew"
    write_clip(folder / "good.mp4", noise(11), 8)
    write_image(folder / "frames" / "20.png", noise(1)[0])
    seen.clear()
    again = by_name(index_folder(folder, frames=8))
    assert {"good.mp4", "frames"} <= set(seen) and "vp9.mp4" not in seen
    assert again["good.mp4"].num_frames == 11 and again["frames"].num_frames == 21


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "entries": {"good.mp4": {"key": 1}}}']
)
def test_a_broken_manifest_is_replaced(tmp_path: Path, text: str) -> None:
    write_clip(tmp_path / "good.mp4", noise(9), 8)
    (tmp_path / index.MANIFEST).write_text(text)
    assert index_folder(tmp_path, frames=8)[0].num_frames == 9
    assert "good.mp4" in index.load_manifest(tmp_path)


def dataset(root: Path, names: tuple[str, ...] = ("trainX", "trainY")) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        write_clip(root / name / "a.mp4", noise(9, seed=seed), 8)
    return root


def test_cyclegan_layout_and_missing_sets(tmp_path: Path) -> None:
    found = open_dataset(dataset(tmp_path, ("trainA", "trainB")), frames=8)
    assert [len(found.sets[k]) for k in "xyzs"] == [1, 1, 0, 0]
    assert found.sets["x"][0].path.parent.name == "trainA"


def test_loose_numbered_images_are_one_video_and_stills_are_single(tmp_path: Path) -> None:
    dataset(tmp_path, ("trainY",))
    for name in ("trainX", "trainS"):
        (tmp_path / name).mkdir()
        for t in range(8):
            write_image(tmp_path / name / f"{t}.png", noise(1, seed=t)[0])
    found = open_dataset(tmp_path, frames=8)
    assert [(s.kind, s.num_frames) for s in found.sets["x"]] == [("frames", 8)]
    assert [(s.kind, s.num_frames) for s in found.sets["s"]] == [("image", 1)] * 8


def test_broken_files_are_warned_about_by_name_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset(tmp_path)
    (tmp_path / "trainX" / "bad.mp4").write_bytes(b"bad")
    with caplog.at_level(logging.WARNING):
        found = open_dataset(tmp_path, frames=8)
    assert [s.path.name for s in found.sets["x"]] == ["a.mp4"] and [s.path.name for s in found.excluded] == ["bad.mp4"]
    assert "bad.mp4" in caplog.text and "left out" in caplog.text


def test_nothing_usable_lists_every_file(tmp_path: Path) -> None:
    dataset(tmp_path)
    (tmp_path / "trainX" / "bad.mp4").write_bytes(b"bad")
    with pytest.raises(
        UserError, match=r"trainX: no usable clip of 50 frames: a.mp4: 9 frames, shorter.*; bad.mp4: "
    ) as e:
        open_dataset(tmp_path, frames=50)
    assert "\n" not in str(e.value)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere", frames=8)
    dataset(tmp_path, ("trainX", "videos"))
    with pytest.raises(UserError, match="expected a folder trainY or trainB, found trainX, videos"):
        open_dataset(tmp_path, frames=8)
    (tmp_path / "trainY").mkdir()
    with pytest.raises(UserError, match="trainY: no usable clip of 8 frames: it is empty"):
        open_dataset(tmp_path, frames=8)


def test_fingerprint_follows_content_not_place_or_time(tmp_path: Path) -> None:
    first = open_dataset(dataset(tmp_path / "a"), frames=8).fingerprint
    moved = (tmp_path / "a").rename(tmp_path / "b")
    os.utime(moved / "trainX" / "a.mp4", (1, 1))
    assert open_dataset(moved, frames=8).fingerprint == first
    write_clip(moved / "trainX" / "a.mp4", noise(10), 8)
    assert open_dataset(moved, frames=8).fingerprint != first


def test_unreadable_file_and_read_only_folder(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4", noise(9), 8)
    write_clip(tmp_path / "locked.mp4", noise(9), 8)
    (tmp_path / "locked.mp4").chmod(0)
    if os.access(tmp_path / "locked.mp4", os.R_OK):
        pytest.skip("this user may read everything, as root does")
    tmp_path.chmod(0o500)
    try:
        found = by_name(index_folder(tmp_path, frames=8))
    finally:
        tmp_path.chmod(0o700)
    assert found["good.mp4"].status == "ok" and "Permission denied" in found["locked.mp4"].reason
    assert not (tmp_path / index.MANIFEST).exists()
