"""bench/tasks.py: clips of real films, a filter's result as hidden truth, and no test frame in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import picture
import pytest
import tasks
from tasks import TASKS, Args, Clip, Name

from rlv2v.data.dali import decodes
from rlv2v.data.index import open_dataset
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError
from rlv2v.metrics.evaluation import open_split

BUNNY = {"marks": pytest.mark.thorough}  # seconds to decode
NAMES = [pytest.param(name, **BUNNY) if name == "colourise" else name for name in TASKS]
PARTS = ("val", "test")
# Clips of trainX, trainY, testX and valX, and the mean levels of trainX, trainY, testX and testTruth.
FROZEN: dict[Name, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "graded": ((15, 25, 3, 3), (103.93, 48.15, 96.61, 44.72)),
    "region": ((15, 20, 3, 2), (113.22, 44.09, 97.08, 50.46)),
    "texture": ((15, 20, 3, 2), (113.22, 164.7, 97.08, 161.48)),
    "colourise": ((25, 58, 5, 5), (105.44, 105.71, 93.37, 92.37)),
}


@cache
def sets_of(name: Name) -> dict[str, list[Clip]]:
    return tasks.make_sets(TASKS[name], 8, 32)


def pairs(name: Name, part: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    sets = sets_of(name)
    for x, y in zip(sets[f"{part}X"], sets[f"{part}Truth"], strict=True):
        yield x.frames, y.frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task") / "set"
    tasks.main(Args("graded", out, size=32))
    return out


def test_layout(written: Path) -> None:
    dataset = open_dataset(written, frames=8)
    assert [len(dataset.sets[k]) for k in "xyzs"] == [15, 25, 0, 0]
    sources = dataset.sets["x"] + dataset.sets["y"]
    assert all(s.num_frames == 8 and s.height == 32 and decodes(s, "cpu") for s in sources)
    assert [len(open_split(written, part)) for part in PARTS] == [3, 3]
    assert all(pair.truth for pair in open_split(written, "test"))
    assert [len(list((written / f"{part}Y").glob("*.mp4"))) for part in PARTS] == [1, 1]
    about = json.loads((written / "dataset.json").read_text())
    assert (about["kind"], about["task"]) == ("real", "graded")


def test_files_hold_the_pixels_and_the_same_bytes_each_time(written: Path, tmp_path: Path) -> None:
    for name, clips in sets_of("graded").items():
        for path, clip in zip(sorted((written / name).glob("*.mp4")), clips, strict=True):
            np.testing.assert_array_equal(np.stack(list(read_frames(path))), clip.frames)
    tasks.main(Args("graded", tmp_path / "set", size=32))
    files = [path.relative_to(tmp_path / "set") for path in (tmp_path / "set").rglob("*.mp4")]
    assert len(files) == 54
    assert all((tmp_path / "set" / file).read_bytes() == (written / file).read_bytes() for file in files)


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_and_the_filter_are_frozen(name: Name) -> None:
    """Figures of two commits compare only if their clips are the same; other CPUs may round a pixel differently."""
    sets = sets_of(name)
    counts, levels = FROZEN[name]
    assert tuple(len(sets[key]) for key in ("trainX", "trainY", "testX", "valX")) == counts
    means = [np.mean([c.frames.mean() for c in sets[key]]) for key in ("trainX", "trainY", "testX", "testTruth")]
    assert means == pytest.approx(levels, abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_no_frame_is_in_two_sets_and_the_domains_share_none(name: Name) -> None:
    task = TASKS[name]
    parts = tasks.split(task.source, 8, tasks.source_part), tasks.split(task.target, 8, tasks.target_part)
    held = [{(s.film, k) for s in shots for k in range(s.first, s.last)} for sets in parts for shots in sets.values()]
    assert all(held) and sum(map(len, held)) == len(set.union(*held))


@pytest.mark.parametrize("film", ["bikes.mp4", "carphone_pristine.mp4", pytest.param("bigbuckbunny.mp4", **BUNNY)])
def test_no_shot_has_a_cut_in_it(film: str) -> None:
    frames = [cv2.resize(frame, (32, 32)).astype(float) for frame in read_frames(tasks.wheel_clip(film))]
    cuts = {k for k, (a, b) in enumerate(pairwise(frames), 1) if np.abs(a - b).mean() > 40}
    assert cuts == ({30, 76, 137, 187, 242} if film == "bikes.mp4" else set())
    shots = {s for name, task in TASKS.items() if name != "graded" for s in (*task.source, *task.target)}
    assert not any(shot.first < cut < shot.last for shot in shots for cut in cuts if shot.film == film)


@pytest.mark.parametrize(("name", "most"), [("graded", 16), ("region", 17), ("texture", 14)])
def test_truth_is_the_filtered_source_and_far_from_it(name: Name, most: float) -> None:
    for part in PARTS:
        for source, truth in pairs(name, part):
            np.testing.assert_array_equal(truth, TASKS[name].make_y(source))
            assert psnr(source, truth) < most, "the task must not be trivial"


def test_the_night_falls() -> None:
    for source, truth in pairs("graded", "test"):
        assert (np.diff(truth.mean((1, 2, 3)) / source.mean((1, 2, 3))) < 0).all()


@pytest.mark.thorough
def test_colourise_hides_the_colours_alone() -> None:
    for source, truth in pairs("colourise", "test"):
        assert (source == source[..., :1]).all() and np.ptp(truth.astype(int), axis=-1).mean() > 4
        assert np.abs(truth @ tasks.LUMA - source[..., 0]).max() <= 1


def best_map(source: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the best colour map there is, 16 levels a channel: the mean truth of each source colour."""
    r, g, b = np.moveaxis(source.astype(int) // 16, -1, 0)
    colour = (256 * r + 16 * g + b).ravel()
    counts = np.maximum(np.bincount(colour, minlength=4096), 1)
    means = [np.bincount(colour, truth[..., k].ravel(), 4096) / counts for k in range(3)]
    return np.stack(means, -1)[colour].reshape(truth.shape)


def best_maps_by_index(source: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.stack([best_map(source[:, t], truth[:, t]) for t in range(source.shape[1])], 1)


def test_a_colour_map_solves_graded_but_not_region_nor_texture() -> None:
    """Fitted with the truth at hand: no method that only maps colours can do better."""

    def reached(name: Name, fit: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
        source, truth = (np.stack(clips) for clips in zip(*pairs(name, "test"), strict=True))
        return psnr(fit(source, truth), truth)

    assert reached("graded", best_maps_by_index) > 34
    assert reached("region", best_maps_by_index) < 24 and reached("texture", best_maps_by_index) < 20


def test_grade_by_hand() -> None:
    flat = np.full((3, 1, 1, 3), 128, np.uint8)
    x = (128 / 255) ** 1.1
    expected = [
        [round(255 * g * c * x + 255 * b) for c, b in ((0.55, 0), (0.65, 0), (1.0, 0.04))] for g in (0.9, 0.625, 0.35)
    ]
    assert tasks.night(flat)[:, 0, 0].tolist() == expected


def test_street_lights_by_hand() -> None:
    flat = np.full((1, 40, 60, 3), 100, np.uint8)
    night = tasks.street_lights(flat)[0]
    assert night[0, 0].tolist() == [22, 30, 55], "sky"
    assert night[39, 59].tolist() == [80, 58, 34], "ground"
    assert night[19, 9].tolist() == [
        round(100 * (0.5625 * s + 0.4375 * g)) for s, g in ((0.22, 0.80), (0.30, 0.58), (0.55, 0.34))
    ]
    lit = flat.copy()
    lit[0, 30:32, 20:22] = 255
    assert tasks.street_lights(lit)[0, 30, 20].tolist() == [255, 217, 115], "a lamp"
    assert tasks.street_lights(lit)[0, 30, 40].tolist() == night[30, 40].tolist()


def test_pencil_by_hand() -> None:
    flat = np.full((1, 40, 60, 3), 100, np.uint8)
    assert (tasks.pencil(flat) == round(255 * 0.55 + 0.45 * 100)).all(), "an even area is paper, tinted"
    edge = flat.copy()
    edge[:, :, 30:] = 200
    drawn = tasks.pencil(edge)[0, 20, :, 0]
    assert drawn[29] < 0.8 * drawn[10] and drawn[10] == 185 and drawn[50] == 230, "the dark side of an edge is a line"


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    out = tmp_path / "out"
    for args, message in (
        (Args("graded", out, frames=1), "--frames: expected 2 to 25"),
        (Args("graded", out, size=999), "--size: expected 16 to 272"),
        (Args("region", out, frames=64), "--frames: expected 2 to 2"),
        (Args("colourise", out, size=272), "--size: expected 16 to 144"),
        (Args("texture", tmp_path), "not an empty folder"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.main(args)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_task_is_drawn_without_a_run(written: Path, tmp_path: Path) -> None:
    picture.main(picture.Args(tmp_path / "task.png", written, clip=1))
    drawn = cv2.imread(str(tmp_path / "task.png"))[..., ::-1]
    step = picture.CELL + picture.MARGIN
    assert drawn.shape == (3 * step, picture.LABEL + picture.MARGIN + 8 * step, 3)
    source, truth = (
        next(p for k, p in enumerate(pairs("graded", "test")) if k == 1)[side][:, :, 21:53] for side in (0, 1)
    )
    for row, clip in enumerate((source, truth)):
        shown = drawn[row * step :, picture.LABEL + picture.MARGIN + 7 * step :][: picture.CELL, : picture.CELL]
        assert np.abs(shown.mean((0, 1)) - clip[7].mean((0, 1))).max() < 3
    with pytest.raises(UserError, match="testX has fewer than 4 clips"):
        picture.main(picture.Args(tmp_path / "task.png", written, clip=3))
