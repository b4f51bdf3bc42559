"""The index: what is usable is used, what is not is named with its reason, and unchanged files are not read twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from rlv2v.data import index, video
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.inspect import Stopped, varies
from rlv2v.data.readers import FrameReader
from rlv2v.data.writer import write_clip, write_image
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
    "zero.mp4": "the file is empty",
    "text.mp4": "cannot be opened as a video",
    "sound.m4a": "no video stream",
    "tail.mp4": "cannot be opened as a video",
    "dir.mp4": "a folder without images",
    "loop.mp4": "Too many levels of symbolic links",
    "pipe.mp4": "neither a file nor a folder",
    "line\nbreak.mp4": "the file is empty",
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


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that are decoded from now on."""
    seen: list[str] = []
    inspect = index.inspect
    monkeypatch.setattr(index, "inspect", lambda path, stop: (seen.append(path.name), inspect(path, stop))[1])
    return seen


def test_the_good_part_of_a_damaged_file_reads_like_the_whole_file(folder: Path) -> None:
    found, whole = by_name(index_folder(folder, frames=8)), list(video.read_frames(folder / "whole.mp4"))
    for name in ("cut.mp4", "flipped.mp4"):
        num = found[name].num_frames
        part = FrameReader().read(found[name], 0, num)
        np.testing.assert_array_equal(part, np.stack(whole[:num]))
        np.testing.assert_array_equal(FrameReader().read(found[name], num - 3, 3), part[-3:])


def test_unchanged_files_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder, frames=8)
    seen = opened(monkeypatch)
    written = (folder / index.MANIFEST).stat().st_mtime_ns
    assert index_folder(folder, frames=8) == first and seen == [], "what is wrong with a file is remembered too"
    assert (folder / index.MANIFEST).stat().st_mtime_ns == written
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


def test_a_touched_or_copied_file_is_known_by_its_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder, frames=8)
    for name in ("good.mp4", "raw.npy", "text.mp4", "frames/3.png"):
        os.utime(folder / name, (1, 1))
    seen = opened(monkeypatch)
    assert index_folder(folder, frames=8) == first and seen == []
    monkeypatch.setattr(index, "content_hash", lambda path: pytest.fail("the new times are kept"))
    files = [p for p in index.entries(folder) if p.name not in ("zero.mp4", "line\nbreak.mp4", "loop.mp4", "pipe.mp4")]
    monkeypatch.setattr(index, "entries", lambda folder, stills: files)
    assert len(index_folder(folder, frames=8)) == len(files)


def test_the_same_size_and_time_of_another_content_is_not_the_same_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder, frames=8)
    good = folder / "good.mp4"
    good.write_bytes(good.read_bytes()[:-1] + b"?")
    (folder / "frames" / "4.png").rename(folder / "frames" / "40.png")  # another order: another clip
    seen = opened(monkeypatch)
    index_folder(folder, frames=8)
    assert sorted(seen) == ["frames", "good.mp4"]


def test_a_repaired_file_is_found_again(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", noise(9), 8)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(b"x" * len(whole))
    os.utime(tmp_path / "a.mp4", (1, 1))
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "later" / "a.mp4")
    assert [s.status for s in index_folder(tmp_path, frames=8)] == ["excluded", "excluded"]
    (tmp_path / "a.mp4").write_bytes(whole)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "a.mp4").write_bytes(whole)
    found = by_name(index_folder(tmp_path, frames=8))
    assert found["a.mp4"].status == "ok" and found["dead.mp4"].status == "ok"


def test_damage_is_judged_anew_by_another_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_folder(folder, frames=8)
    monkeypatch.setattr(index.av, "__version__", "0.0.1")
    seen = opened(monkeypatch)
    index_folder(folder, frames=8)
    assert {"cut.mp4", "text.mp4", "hole"} <= set(seen) and not {"good.mp4", "frames"} & set(seen)


def test_the_manifest_says_what_each_file_is_and_moves_with_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder, frames=8)
    manifest = json.loads((folder / index.MANIFEST).read_text())
    good = manifest["entries"]["good.mp4"]
    size = (folder / "good.mp4").stat().st_size
    assert good["key"] == [1, size, (folder / "good.mp4").stat().st_mtime_ns]
    assert good["source"].pop("hash") == hashlib.sha256((folder / "good.mp4").read_bytes()).hexdigest()
    assert good["source"] == {
        "kind": "video",
        "codec": "h264",
        "num_frames": 20,
        "fps": 8.0,
        "width": 48,
        "height": 32,
        "num_bytes": size,
        "dali": False,
        "status": "ok",
        "reason": "",
        "variable": False,
    }
    assert set(manifest["entries"]) == {p.name for p in index.entries(folder)}
    assert str(folder) not in json.dumps(manifest), "no path of this machine"
    moved = folder.rename(folder.with_name("moved"))
    seen = opened(monkeypatch)
    assert all(s.path.parent == moved for s in index_folder(moved, frames=8)) and seen == []


def test_hashes_follow_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(200)))
    (tmp_path / "b").write_bytes(bytes(range(200)))
    (tmp_path / "c").write_bytes(bytes(range(199)) + b"?")
    for chunk in (4 * 2**20, 64):
        monkeypatch.setattr(index, "CHUNK", chunk)
        a, b, c = (index.content_hash(tmp_path / name) for name in "abc")
        assert a == b != c


def test_an_interrupted_index_keeps_what_it_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name, noise(9), 8)
    inspect = index.inspect

    def interrupted(path: Path, stop: threading.Event) -> Source:
        if path.name == "c.mp4":
            raise KeyboardInterrupt
        return inspect(path, stop)

    with monkeypatch.context() as patch:
        patch.setattr(index, "inspect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index_folder(tmp_path, frames=8, workers=1)
    seen = opened(monkeypatch)
    assert len(index_folder(tmp_path, frames=8)) == 3 and seen == ["c.mp4"]


def test_a_stopped_decode_ends_at_once(folder: Path) -> None:
    stop = threading.Event()
    stop.set()
    for name in ("good.mp4", "frames"):
        with pytest.raises(Stopped):
            index.inspect(folder / name, stop)


def test_nothing_usable_is_exit_code_2_with_the_list(tmp_path: Path) -> None:
    for name in ("trainX", "trainY"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(b"")
        (tmp_path / name / "README.txt").write_text("hello world\n" * 99)
    done = subprocess.run(
        [sys.executable, "-m", "rlv2v.train", "--preset", "tiny", "--data", str(tmp_path), "--out", f"{tmp_path}/run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "README.txt: a text file" in done.stderr and "a.mp4: the file is empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_rounded_times_do_not_vary() -> None:
    assert not varies([0, 33, 67, 100, 133]) and not varies([0, 3, 7, 10]) and not varies([0]) and not varies([])
    assert varies([0, 33, 67, 133]) and varies([0, 3, 6, 12])
