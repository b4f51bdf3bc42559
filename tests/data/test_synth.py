"""The synthetic dataset: what is written is what was drawn, and the truth is the source on Y's background."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlv2v.data import synth, video
from rlv2v.data.index import open_dataset
from rlv2v.data.synth import Counts, Reading, Switch
from rlv2v.errors import UserError
from rlv2v.synth import Args, main

COUNTS = Counts(x=48, y=18, z=18, s=7, val=4, test=4)
FRAMES, SIZE = 6, 33
BLUE, RED = (0, 0, 255), (255, 0, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "set"
    synth.write_dataset(out, size=SIZE, frames=FRAMES, seed=3, counts=COUNTS)
    return out


def read_set(folder: Path) -> list[np.ndarray]:
    return [np.stack(list(video.read_frames(path))) for path in sorted(folder.iterdir()) if path.name[0] != "."]


def test_layout_and_counts(written: Path) -> None:
    counts = {p.name: len(list(p.iterdir())) for p in written.iterdir() if p.is_dir()}
    clips = {"trainX": 8, "trainY": 3, "trainZ": 3, "trainS": 7, "valX": 4, "valTruth": 4, "testX": 4, "testTruth": 4}
    assert counts == clips
    description = json.loads((written / "dataset.json").read_text())
    assert description["kind"] == "synthetic" and description["size"] == SIZE and description["seed"] == 3


@pytest.mark.parametrize("name", synth.SETS)
def test_codec_gives_every_pixel_back(written: Path, name: str) -> None:
    for index, clip in enumerate(read_set(written / name)):
        drawn, _ = synth.clip_of(name, index, seed=3, frames=FRAMES, size=SIZE)
        np.testing.assert_array_equal(clip, drawn, err_msg=f"{name} {index}: the codec changed the pixels")


@pytest.mark.parametrize("part", ["val", "test"])
def test_truth_is_the_source_with_its_background_replaced(written: Path, part: str) -> None:
    sources, truths = read_set(written / f"{part}X"), read_set(written / f"{part}Truth")
    for source, truth in zip(sources, truths, strict=True):
        inside = source.any(-1)
        assert inside.any((1, 2)).all(), "the object must be in every frame"
        expected = synth.background(FRAMES, SIZE)
        expected[inside] = source[inside]
        np.testing.assert_array_equal(truth, expected)


def test_background_turns_red_in_the_second_half(written: Path) -> None:
    for clip in read_set(written / "trainY") + read_set(written / "trainZ"):
        blue, red = (clip == BLUE).all(-1).sum((1, 2)), (clip == RED).all(-1).sum((1, 2))
        assert (blue[: FRAMES // 2] > 0).all() and not red[: FRAMES // 2].any()
        assert (red[FRAMES // 2 :] > 0).all() and not blue[FRAMES // 2 :].any()


def test_sets_are_disjoint(written: Path) -> None:
    clips = [clip.tobytes() for name in ("trainX", "valX", "testX") for clip in read_set(written / name)]
    assert len(set(clips)) == len(clips), "a clip occurs twice"


def test_objects_move_straight_stay_inside_and_keep_their_colour_distance() -> None:
    for index in range(200):
        clip, _ = synth.clip_of("trainX", index, seed=0, frames=8, size=32)
        colours = np.unique(clip[clip.any(-1)], axis=0)
        assert len(colours) == 1, "one colour, no anti-aliasing"
        distances = [np.linalg.norm((colours[0] - np.array(c, float)) / 255) for c in ((0, 0, 0), BLUE, RED)]
        assert min(distances) >= 0.45
        boxes = np.array([[v for axis in np.nonzero(f.any(-1)) for v in (axis.min(), axis.max() + 1)] for f in clip])
        sides = boxes[:, 1::2] - boxes[:, ::2]
        assert (sides == sides[0]).all() and (sides >= 8).all() and (sides <= 16).all(), sides
        steps = np.diff(boxes[:, ::2], axis=0)
        assert (np.abs(steps) <= 3).all() and (np.ptp(steps, axis=0) <= 1).all(), "constant speed, rounded to pixels"


def test_same_seed_same_bytes_other_seed_other_clips(tmp_path: Path) -> None:
    few = Counts(x=16, y=8, z=0, s=2, val=1, test=1)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synth.write_dataset(tmp_path / name, size=16, frames=8, seed=seed, counts=few)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/trainX/00000.mp4").read_bytes() != (tmp_path / "c/trainX/00000.mp4").read_bytes()
    assert open_dataset(tmp_path / "a", frames=8).sets["z"] == []


def test_a_folder_with_content_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"out: exists and is not an empty folder"):
        synth.write_dataset(tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth, "write_image", full)
    with pytest.raises(OSError, match="No space"):
        synth.write_dataset(tmp_path / "out", size=16, counts=Counts(x=8, y=8, z=0, s=1, val=0, test=0))
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    for changes, message in (
        ({"size": 4}, "--size: expected 16 to 4096 pixels, got 4"),
        ({"frames": 1}, "--frames: expected 2"),
        ({"counts": Counts(y=3)}, "--counts.y: expected 8 or more, got 3"),
        ({"counts": Counts(s=-1)}, "--counts.s: expected 0 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            main(Args(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def digest(**settings: Any) -> str:
    """Return the start of the SHA-256 over the pixels of the first three clips of every set, and their truths."""
    clips = [clip for name in synth.SETS for k in range(3) for clip in synth.clip_of(name, k, **settings)]
    return hashlib.sha256(b"".join(clip.tobytes() for clip in clips)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("reading", "switch", "expected"),
    [
        ("ours", "half", "e6603fb64beca473"),
        ("paper", "half", "03911aa0f01faafe"),
        ("ours", "crossing", "1102f7e4e1922a2a"),
    ],
)
def test_the_sets_are_frozen(reading: Reading, switch: Switch, expected: str) -> None:
    """Figures of two commits compare only if their clips are the same: never draw anything in another order."""
    assert digest(seed=0, frames=8, size=32, reading=reading, switch=switch) == expected


def test_the_papers_words_put_circles_on_black_into_z_and_on_one_colour_into_s() -> None:
    for name, behind in (("trainZ", [(0, 0, 0)]), ("trainS", [BLUE, RED])):
        for index in range(6):
            clip, truth = synth.clip_of(name, index, seed=1, frames=8, size=32, reading="paper")
            colours = {tuple(colour) for colour in np.unique(clip.reshape(-1, 3), axis=0)}
            assert colours & {(0, 0, 0), BLUE, RED} == {behind[index % len(behind)]} and len(colours) == 2
            inside = (truth != truth[:, :1, :1]).any(-1) if name == "trainS" else clip.any(-1)
            box = inside[0][np.ix_(inside[0].any(1), inside[0].any(0))]
            assert box.shape[0] == box.shape[1] and not box[0, 0] and box[len(box) // 2].all(), "a circle"
    for name in ("trainX", "trainY", "testX"):
        drawn = [synth.clip_of(name, 0, seed=1, frames=8, size=32, reading=r) for r in ("ours", "paper")]
        np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (16, 64), (2, 16), (5, 33)])
def test_the_background_turns_red_when_the_object_leaves_its_half(frames: int, size: int) -> None:
    """The rule by hand, from the source's pixels alone: each frame's first and last column of the object."""
    times, sides = [], []
    for index in range(60):
        source, truth = synth.clip_of("testX", index, seed=0, frames=frames, size=size, switch="crossing")
        columns = [np.flatnonzero(frame.any((0, 2))) for frame in source]
        sides.append([np.sign(c[0] + c[-1] + 1 - size) for c in columns])
        assert sides[-1][0] != 0
        expected = next(t for t, side in enumerate(sides[-1]) if side != sides[-1][0])
        behind = [{tuple(colour) for colour in frame[~mask]} for frame, mask in zip(truth, source.any(-1), strict=True)]
        assert behind == [{BLUE}] * expected + [{RED}] * (frames - expected)
        times.append(expected)
    assert set(times) == set(range(1, frames)), "at every frame but the first, so the index does not tell"
    places = np.array(sides)[:, -1]
    assert 15 < np.count_nonzero(places > 0) < 45, "red on either side, so the place does not tell"


def test_the_cue_is_in_y_and_z_too(tmp_path: Path) -> None:
    main(Args(tmp_path / "cue", switch="crossing", counts=Counts(x=8, y=80, z=80, s=2, val=1, test=1)))
    for name in ("trainY", "trainZ"):
        times = {int((clip == RED).all(-1).any((1, 2)).argmax()) for clip in read_set(tmp_path / "cue" / name)}
        assert len(times) >= 3 and 0 not in times
    assert json.loads((tmp_path / "cue/dataset.json").read_text())["switch"] == "crossing"
