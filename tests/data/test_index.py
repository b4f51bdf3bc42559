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

import numpy as np
import pytest
from data_clips import by_name, encode, write_frames

from rlv2v.data import index
from rlv2v.data.images import write_image
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.inspect import Stopped
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources of every status; `test_odd_files` has every kind of fault."""
    clip = noise(20)
    write_clip(tmp_path / "good.mp4", clip, 8)
    write_clip(tmp_path / "vp9.mp4", clip, 8, "vp9-lossless")
    np.save(tmp_path / "raw.npy", clip)
    write_frames(tmp_path / "frames", clip)
    write_clip(tmp_path / "short.mp4", clip[:5], 8)
    (tmp_path / "text.mp4").write_text("not a video")
    encode(tmp_path / "intact.mp4", clip, faststart=True, g="4", bf="0", crf="10")  # its table is in front
    data = (tmp_path / "intact.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    write_frames(tmp_path / "hole", clip[:12])
    (tmp_path / "hole" / "9.png").write_bytes(b"broken")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "line\nbreak.mp4").write_bytes(b"")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    return tmp_path


def test_every_source_has_its_status_and_reason(folder: Path) -> None:
    sources = by_name(index_folder(folder, frames=8))
    assert list(sources) == [p.name for p in index.source_paths(folder)] and ".hidden.mp4" not in sources
    assert {name for name, source in sources.items() if source.pixels and source.codec == "vp9"} == {"vp9.mp4"}
    short, broken = sources["short.mp4"], sources["line\nbreak.mp4"]
    assert (short.status, short.reason) == ("excluded", "5 frames, shorter than the clip length 8")
    assert (broken.status, broken.reason) == ("excluded", "the file is empty (0 bytes)")


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the sources that are decoded from now on."""
    seen: list[str] = []
    inspect = index.inspect
    monkeypatch.setattr(index, "inspect", lambda path, stop: (seen.append(path.name), inspect(path, stop))[1])
    return seen


def test_unchanged_files_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder, frames=8)
    seen = decoded(monkeypatch)
    written = (folder / index.MANIFEST).stat().st_mtime_ns
    assert index_folder(folder, frames=8) == first and seen == [], "what is wrong with a file is remembered too"
    assert (folder / index.MANIFEST).stat().st_mtime_ns == written
    assert by_name(index_folder(folder, frames=3))["short.mp4"].status == "ok", "the length is judged anew"
    good = folder / "good.mp4"
    good.write_bytes(good.read_bytes()[:-1] + b"?")  # another content of the same size
    (folder / "frames" / "4.png").rename(folder / "frames" / "40.png")  # another order: another clip
    index_folder(folder, frames=8)
    assert sorted(seen) == ["frames", "good.mp4"]
    write_clip(good, noise(11), 8)
    write_image(folder / "frames" / "41.png", noise(1)[0])
    again = by_name(index_folder(folder, frames=8))
    assert again["good.mp4"].num_frames == 11 and again["frames"].num_frames == 21


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 3, "entries": {"good.mp4": {"key": 1}}}']
)
def test_a_broken_manifest_is_replaced(tmp_path: Path, text: str) -> None:
    write_clip(tmp_path / "good.mp4", noise(9), 8)
    (tmp_path / index.MANIFEST).write_text(text)
    assert index_folder(tmp_path, frames=8)[0].num_frames == 9
    assert "good.mp4" in index.load_manifest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [index.MANIFEST, "good.mp4"]


def write_dataset(root: Path, names: tuple[str, ...] = ("trainX", "trainY")) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        write_clip(root / name / "a.mp4", noise(9, seed=seed), 8)
    return root


def test_cyclegan_layout_and_missing_sets(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path, ("trainA", "trainB")), frames=8)
    assert [len(dataset.sets[k]) for k in "xyzs"] == [1, 1, 0, 0]
    assert dataset.sets["x"][0].path.parent.name == "trainA"


def test_loose_numbered_images_are_one_video_and_stills_are_single(tmp_path: Path) -> None:
    write_dataset(tmp_path, ("trainY",))
    for name in ("trainX", "trainS"):
        write_frames(tmp_path / name, noise(8))
    dataset = open_dataset(tmp_path, frames=8)
    assert [(s.kind, s.num_frames) for s in dataset.sets["x"]] == [("frames", 8)]
    assert [(s.kind, s.num_frames) for s in dataset.sets["s"]] == [("image", 1)] * 8


def test_nested_folders_are_read_at_any_depth(tmp_path: Path) -> None:
    write_dataset(tmp_path, ("trainY", "trainX/b/c"))
    write_frames(tmp_path / "trainX" / "b" / "frames", noise(9))
    (tmp_path / "trainX" / "b" / "frames" / "deeper").mkdir()
    write_clip(tmp_path / "trainX" / "b" / "frames" / "deeper" / "a.mp4", noise(9, seed=3), 8)
    (tmp_path / "trainX" / "b" / "up").symlink_to(tmp_path / "trainX")  # no end, if it is followed
    (tmp_path / "trainX" / "nothing").mkdir()
    dataset = open_dataset(tmp_path, frames=8)
    names = [s.path.relative_to(tmp_path).as_posix() for s in dataset.sets["x"]]
    assert names == ["trainX/b/c/a.mp4", "trainX/b/frames", "trainX/b/frames/deeper/a.mp4"]
    assert [s.path.name for s in dataset.excluded] == ["nothing"]
    assert list(index.load_manifest(tmp_path / "trainX")) == sorted(
        ["b/c/a.mp4", "b/frames", "b/frames/deeper/a.mp4", "nothing"]
    )
    assert dataset.contents().keys() == {*names, "trainY/a.mp4"}


@pytest.mark.parametrize(
    ("names", "numbered"),
    [
        ("frame_0001 frame_0002 frame_0010", True),
        ("1 2 3", True),
        ("shot3-1-left shot3-2-left", True),
        ("beach tower dog", False),
        ("a_1 b_2", False),
        ("20240501_120000 20240612_093000", False),
        ("frame_1 frame_2 cover", False),
        ("frame_1", False),
    ],
)
def test_images_are_a_video_if_one_number_tells_them_apart(names: str, numbered: bool) -> None:
    assert index.are_numbered([Path(f"{name}.png") for name in names.split()]) == numbered


def test_photos_are_stills_and_said_to_be_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path)
    for folder in ("trainY", "trainY/more", "trainS/more"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, image in zip(("beach", "dog", "tower"), noise(3), strict=True):
            write_image(tmp_path / folder / f"{name}.png", image)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(tmp_path, frames=8)
    assert [s.path.name for s in dataset.sets["y"]] == ["a.mp4"] and len(dataset.sets["s"]) == 3
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == (
        f"{tmp_path / 'trainY'}: 6 images are stills of one frame, since their names are not numbered as frame_1, "
        "frame_2; left out, as a clip of 8 frames needs more; stills serve in trainS"
    )


@pytest.mark.parametrize(("folders", "used"), [("trainY trainS", "trainY"), ("trainS", "trainS")])
def test_stills_alone_are_a_target(tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: str, used: str) -> None:
    """Those of Y come first; a broken video of Y is named, and does not change that."""
    write_dataset(tmp_path, ("trainX",))
    for folder in folders.split():
        (tmp_path / folder / "more").mkdir(parents=True)
        for name, image in zip(("beach", "more/dog"), noise(2, seed=len(folder)), strict=True):
            write_image(tmp_path / folder / f"{name}.png", image)
    if used == "trainY":
        (tmp_path / used / "broken.mp4").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(tmp_path, frames=8)
    paths = [s.path.relative_to(tmp_path).as_posix() for s in dataset.sets["y"]]
    assert paths == [f"{used}/beach.png", f"{used}/more/dog.png"]
    assert [s.status for s in dataset.sets["y"]] == ["ok", "ok"]
    assert len(dataset.sets["s"]) == 2 and len(dataset.excluded) == (used == "trainY")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == f"{tmp_path / used}: Y has no video; its clips are crops that move over 2 stills"
    assert len(messages) == 1 + (used == "trainY")


def test_a_target_that_is_nowhere_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, ("trainX",))
    with pytest.raises(UserError, match=r"expected a folder trainY or trainB, found trainX"):
        open_dataset(tmp_path, frames=8)
    (tmp_path / "trainS").mkdir()
    with pytest.raises(UserError, match=r"expected videos or stills of the target domain in trainY, or stills in tr"):
        open_dataset(tmp_path, frames=8)
    (tmp_path / "trainY").mkdir()
    (tmp_path / "trainY" / "a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"trainY: no usable clip of 8 frames: a.mp4: "):
        open_dataset(tmp_path, frames=8)


def test_a_change_names_a_few_files_and_counts_the_rest() -> None:
    before = {name: "1" for name in ("a", "b", "c", "d", "e", "f")}
    now = {"a": "1", "b": "2", "c": "2", "d": "2", "e": "2", "g": "1"}
    assert index.describe_change(before, now) == "b, c, d and 1 more changed; g appeared; f vanished"


def test_broken_files_are_warned_about_by_name_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path)
    (tmp_path / "trainX" / "bad\n1.mp4").write_bytes(b"bad")
    np.save(tmp_path / "trainX" / "cut.npy", noise(9))
    os.truncate(tmp_path / "trainX" / "cut.npy", 128 + 8 * 32 * 48 * 3)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(tmp_path, frames=8)
    assert [s.path.name for s in dataset.sets["x"]] == ["a.mp4", "cut.npy"]
    assert [s.path.name for s in dataset.excluded] == ["bad\n1.mp4"]
    left_out, in_part = (record.getMessage() for record in caplog.records)
    assert r"bad\n1.mp4: cannot be opened" in left_out and left_out.endswith("; left out") and "\n" not in left_out
    assert in_part.endswith("cut.npy: the file ends after 8 of 9 frames; its first 8 frames are used")


def test_nothing_usable_lists_every_file(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "trainX" / "b\nad.mp4").write_bytes(b"bad")
    (tmp_path / "trainX" / "README.txt").write_text("hello world\n" * 99)
    with pytest.raises(UserError, match=r"trainX: no usable clip of 50 frames: README\.txt: a text file") as caught:
        open_dataset(tmp_path, frames=50)
    assert r"a.mp4: 9 frames, shorter" in str(caught.value) and r"b\nad.mp4: cannot be opened" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_files_that_are_not_usable_a_few_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    for number in range(20):
        (tmp_path / "trainX" / f"{number:02}.mp4").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"00\.mp4: .*07\.mp4: [^;]* and 1[0-9] more$"):
        open_dataset(tmp_path, frames=50)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere", frames=8)
    write_dataset(tmp_path, ("trainX", "videos"))
    with pytest.raises(UserError, match="expected a folder trainY or trainB, found trainX, videos"):
        open_dataset(tmp_path, frames=8)
    (tmp_path / "trainY").mkdir()
    with pytest.raises(UserError, match="trainY: no usable clip of 8 frames: it is empty"):
        open_dataset(tmp_path, frames=8)


def test_fingerprint_follows_content_not_place_or_time(tmp_path: Path) -> None:
    first = open_dataset(write_dataset(tmp_path / "a"), frames=8).fingerprint
    moved = (tmp_path / "a").rename(tmp_path / "b")
    os.utime(moved / "trainX" / "a.mp4", (1, 1))
    assert open_dataset(moved, frames=8).fingerprint == first
    write_clip(moved / "trainX" / "a.mp4", noise(10), 8)
    assert open_dataset(moved, frames=8).fingerprint != first


def test_a_folder_that_cannot_be_written_to_goes_without_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write_clip(tmp_path / "good.mp4", noise(9), 8)
    monkeypatch.setattr(index, "write_atomically", refuse)
    with caplog.at_level(logging.INFO):
        assert index_folder(tmp_path, frames=8)[0].status == "ok"
    assert "no manifest stored" in caplog.text and [p.name for p in tmp_path.iterdir()] == ["good.mp4"]


def test_a_touched_or_copied_file_is_known_by_its_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_folder(folder, frames=8)
    for name in ("good.mp4", "raw.npy", "text.mp4", "frames/3.png"):
        os.utime(folder / name, (1, 1))
    seen = decoded(monkeypatch)
    assert index_folder(folder, frames=8) == first and seen == []
    monkeypatch.setattr(index, "content_hash", lambda path, stop: pytest.fail("the new times are stored"))
    files = [p for p in index.source_paths(folder) if p.name not in ("line\nbreak.mp4", "loop.mp4")]
    monkeypatch.setattr(index, "source_paths", lambda folder, stills: files)
    assert len(index_folder(folder, frames=8)) == len(files)


def test_a_repaired_file_is_found_again(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", noise(9), 8)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(b"x" * len(content))
    os.utime(tmp_path / "a.mp4", (1, 1))
    (tmp_path / "dead.mp4").symlink_to(tmp_path / "later" / "a.mp4")
    assert [s.status for s in index_folder(tmp_path, frames=8)] == ["excluded", "excluded"]
    (tmp_path / "later").mkdir()
    for path in (tmp_path / "a.mp4", tmp_path / "later" / "a.mp4"):
        path.write_bytes(content)
    sources = by_name(index_folder(tmp_path, frames=8))
    assert sources["a.mp4"].status == "ok" and sources["dead.mp4"].status == "ok"


def test_damage_is_judged_anew_by_another_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_folder(folder, frames=8)
    monkeypatch.setattr(index.av, "__version__", "0.0.1")
    seen = decoded(monkeypatch)
    index_folder(folder, frames=8)
    assert {"cut.mp4", "text.mp4", "hole"} <= set(seen) and not {"good.mp4", "frames"} & set(seen)


def test_the_manifest_describes_each_file_and_moves_with_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(folder, frames=8)
    manifest = json.loads((folder / index.MANIFEST).read_text())
    good = manifest["entries"]["good.mp4"]
    older = {**good, "source": {**good["source"], "variable": False}}
    status = (folder / "good.mp4").stat()
    assert manifest["version"] == 5 and good["key"] == [1, status.st_size, status.st_mtime_ns]
    assert good["source"].pop("hash") == hashlib.sha256((folder / "good.mp4").read_bytes()).hexdigest()
    assert good["source"] == {
        "kind": "video",
        "codec": "h264",
        "num_frames": 20,
        "fps": 8.0,
        "width": 48,
        "height": 32,
        "num_bytes": status.st_size,
        "pixels": "",
        "status": "ok",
        "reason": "",
        "interlaced": False,
    }
    assert set(manifest["entries"]) == {p.name for p in index.source_paths(folder)}
    assert str(folder) not in json.dumps(manifest), "no path of this machine"
    manifest["entries"]["good.mp4"] = older
    (folder / index.MANIFEST).write_text(json.dumps(manifest))
    moved = folder.rename(folder.with_name("moved"))
    seen = decoded(monkeypatch)
    assert all(s.path.parent == moved for s in index_folder(moved, frames=8)) and seen == []


def test_an_interrupted_index_stores_what_it_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    seen = decoded(monkeypatch)
    assert len(index_folder(tmp_path, frames=8)) == 3 and seen == ["c.mp4"]


def test_a_progress_bar_that_is_switched_off_holds_nothing_up(folder: Path) -> None:
    """tqdm reads its environment when it is imported."""
    code = """if True:
        import sys
        from pathlib import Path
        from rlv2v.data.index import index_folder
        print(len(index_folder(Path(sys.argv[1]), frames=2)))"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env=os.environ | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(index_folder(folder, frames=2)) > 1


def test_a_stopped_decode_ends_at_once(folder: Path) -> None:
    stop = threading.Event()
    stop.set()
    for name in ("good.mp4", "frames"):
        with pytest.raises(Stopped):
            index.inspect(folder / name, stop)
