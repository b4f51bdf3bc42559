"""Many videos in one command: where results go, what is left out, skipped or fails, and how ranks share them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from commands import Command, noise, refusal

from rlv2v.data.batch import find_pairs
from rlv2v.data.images import write_image
from rlv2v.data.video import probe, read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.translate import Args, main


def write(path: Path, num: int = 3, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, noise(num, 32, 48, seed), 10)
    return path


def write_frames(folder: Path, num: int = 2) -> Path:
    folder.mkdir(parents=True)
    for k, frame in enumerate(noise(num, 16, 16)):
        write_image(folder / f"frame{k}.png", frame)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder as people have them: videos at two depths, frames, subtitles, a photo, an empty folder."""
    folder = tmp_path / "videos"
    write(folder / "a.mp4")
    write(folder / "deep" / "er" / "b.mkv", seed=1)
    write_frames(folder / "scan.v2")
    (folder / "a.SRT").write_text("subtitles")
    write_image(folder / "cover.jpg", noise(1)[0])
    (folder / "empty").mkdir()
    return folder


def test_a_folder_gives_a_result_at_the_place_of_each_video(
    tiny_run: Path, videos: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        code, printed, err = command("translate", tiny_run, videos, out, "--suffix", ".webm")
    assert code == 0 and printed.splitlines()[-1] == "3 translated, 0 skipped, 0 failed", err
    assert files_below(out) == ["a.webm", "deep/er/b.webm", "scan.v2.webm"]
    assert {probe(p).codec for p in out.rglob("*.webm")} == {"vp9"}
    assert caplog.messages == [f"{videos}: left out, no videos by their names: a.SRT, cover.jpg, empty"]
    alone = tmp_path / "alone.webm"
    main(Args(tiny_run, videos / "deep" / "er" / "b.mkv", alone))
    np.testing.assert_array_equal(list(read_frames(alone)), list(read_frames(out / "deep" / "er" / "b.webm")))


def test_a_failure_does_not_end_the_rest(tiny_run: Path, videos: Path, tmp_path: Path, command: Command) -> None:
    (videos / "a1.mp4").write_bytes(b"no video" * 99)
    out = tmp_path / "out"
    line = refusal(command("translate", tiny_run, videos, out))
    assert line == f"rlv2v.translate: 3 translated, 0 skipped, 1 failed: {videos / 'a1.mp4'}"
    assert files_below(out) == ["a.mp4", "deep/er/b.mp4", "scan.v2.mp4"]


def test_what_is_there_already_stays_or_is_asked_about(
    tiny_run: Path, videos: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.mp4").write_bytes(b"precious")
    assert "out: exists already: " in refusal(command("translate", tiny_run, videos, out))
    assert "choose one" in refusal(command("translate", tiny_run, videos, out, "--skip-existing", "--overwrite"))
    assert files_below(out) == ["a.mp4"]
    code, printed, _ = command("translate", tiny_run, videos, out, "--skip-existing")
    assert code == 0 and printed.endswith("2 translated, 1 skipped, 0 failed\n")
    assert (out / "a.mp4").read_bytes() == b"precious"
    code, printed, _ = command("translate", tiny_run, videos / "a.mp4", out / "a.mp4", "--skip-existing")
    assert code == 0 and printed == f"{out / 'a.mp4'}: exists already, skipped\n"
    code, printed, _ = command("translate", tiny_run, videos, out, "--overwrite")
    assert code == 0 and probe(out / "a.mp4").num_frames == 3


def test_a_list_keeps_the_folders_below_the_common_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x" / "a.mp4")
    write(tmp_path / "y" / "a.mp4")
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("x/a.mp4\r\n\n" + f"{tmp_path}/y/a.mp4\ny/a.mp4\nx/a.mp4\n")
    pairs = find_pairs(Path("@list.txt"), Path("out"), ".mp4")
    assert pairs == [(Path("x/a.mp4"), Path("out/x/a.mp4")), (tmp_path / "y/a.mp4", Path("out/y/a.mp4"))]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    Path("list.txt").write_text("../x/a.mp4\nb.mp4")
    pairs = find_pairs(Path("@list.txt"), Path("out"), ".mp4")
    assert pairs is not None and [pair.out for pair in pairs] == [Path("out/x/a.mp4"), Path("out/here/b.mp4")]
    Path("list.txt").write_text("\n")
    with pytest.raises(UserError, match=r"list\.txt: an empty list"):
        find_pairs(Path("@list.txt"), Path("out"), ".mp4")
    with pytest.raises(UserError, match=r"absent: cannot be read as a list of videos: No such file"):
        find_pairs(Path("@absent"), Path("out"), ".mp4")


def test_what_counts_as_one_video(tmp_path: Path) -> None:
    video, photos = write(tmp_path / "@a.mp4"), tmp_path / "photos"
    photos.mkdir()
    for name in ("dog.png", "cat.png"):
        write_image(photos / name, noise(1)[0])
    for source in (video, write_frames(tmp_path / "frames"), photos, tmp_path / "absent.mp4"):
        assert find_pairs(source, tmp_path / "out.mp4", ".mp4") is None, source


def test_frames_beside_videos_are_a_video_too(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "in")
    (folder / "a.mp4").touch()
    pairs = find_pairs(folder, tmp_path / "out", ".mp4")
    assert pairs == [(folder, tmp_path / "out" / "in.mp4"), (folder / "a.mp4", tmp_path / "out" / "a.mp4")]


def test_results_never_share_a_name(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.mp4", "a.mov", "b.mov"):
        (folder / name).touch()
    pairs = find_pairs(folder, out, ".mp4")
    assert pairs is not None and sorted(p.out.name for p in pairs) == ["a.mov.mp4", "a.mp4.mp4", "b.mp4"]
    (folder / "a.mov.avi").touch()
    with pytest.raises(UserError, match="two videos would have one result"):
        find_pairs(folder, out, ".mp4")


def test_a_folder_of_results_may_have_a_dot(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.b.mp4").touch()
    pairs = find_pairs(tmp_path / "in", tmp_path / "out.2026", ".webm")
    assert pairs == [(tmp_path / "in" / "a.b.mp4", tmp_path / "out.2026" / "a.b.webm")]


def test_results_do_not_become_sources(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "out").mkdir(parents=True)
    (folder / "a.mp4").touch()
    (folder / "out" / "a.mp4").touch()
    assert find_pairs(folder, folder / "out", ".mp4") == [(folder / "a.mp4", folder / "out" / "a.mp4")]


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("in", "out.mp4", "out.mp4: expected a folder for the results"),
        ("in", "images/%d.png", r"%d\.png: expected a folder for the results"),
        ("in", "file", "file: expected a folder for the results"),
        ("in", "no/out", "no/out: folder .*no does not exist"),
        ("in", "in", "same folder"),
        ("none", "out", "none: a folder without videos"),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path: Path, source: str, out: str, words: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=words):
        find_pairs(tmp_path / source, tmp_path / out, ".mp4")
