"""The loader: addressable draws, complete and disjoint epochs, bit-exact resume, equal backends."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rlv2v.data import loader as pipeline
from rlv2v.data import readers
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import Batch, Loader, evaluation_clips
from rlv2v.data.video import centre_crop, fit
from rlv2v.data.writer import write_clip, write_image
from rlv2v.errors import UserError

T, SIZE = 4, 16
BATCH = {"x": 3, "y": 2, "z": 1, "s": 2}
needs_dali = pytest.mark.skipif(not readers.has_dali(), reason="DALI is not made for this platform")


def stamped(frames: int, mark: int, height: int = 20, width: int = 28) -> np.ndarray:
    """A clip whose pixels tell the clip (red), the frame (green) and the column (blue)."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[..., 0] = mark
    clip[..., 1] = np.arange(frames)[:, None, None]
    clip[..., 2] = np.arange(width)
    return clip


def smooth_clip(frames: int, height: int, width: int) -> np.ndarray:
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    waves = [128 + 100 * np.sin(x / width * 3 + t), 128 + 80 * np.cos(y / height * 4 + t / 2), 60 + 140 * x / width]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X: seven sources of all kinds, of 4 to 13 frames; Y, Z: videos; S: images."""
    root = tmp_path_factory.mktemp("data")
    for name in ("trainX", "trainY", "trainZ", "trainS"):
        (root / name).mkdir()
    for mark, length in enumerate((4, 4, 5, 9, 13)):
        write_clip(root / "trainX" / f"{mark}.mp4", stamped(length, mark), 8, "vp9-lossless")
    np.save(root / "trainX" / "5.npy", stamped(8, 5))
    (root / "trainX" / "6").mkdir()
    for t, frame in enumerate(stamped(6, 6)):
        write_image(root / "trainX" / "6" / f"{t}.png", frame)
    for mark in range(3):
        write_clip(root / "trainY" / f"{mark}.mp4", stamped(T, 100 + mark), 8, "vp9-lossless")
        write_image(root / "trainS" / f"{mark}.png", stamped(1, 200 + mark)[0])
    write_clip(root / "trainZ" / "0.mp4", stamped(T, 150), 8, "vp9-lossless")
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> Dataset:
    return open_dataset(root, frames=T)


def loader(data: Dataset, **changes: object) -> Loader:
    options: dict[str, object] = {"batch": BATCH, "frames": T, "size": SIZE, "seed": 0, **changes}
    return Loader(data, **options)  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in "xyzs")


def test_batches_have_their_shapes_and_empty_sets_are_none(data: Dataset) -> None:
    batch = next(loader(data))
    assert batch.x is not None and batch.x.shape == (3, T, SIZE, SIZE, 3) and batch.x.dtype == torch.uint8
    assert batch.y is not None and batch.z is not None and batch.s is not None
    assert batch.y.shape[0] == 2 and batch.z.shape[0] == 1 and batch.s.shape == (2, SIZE, SIZE, 3)
    assert next(loader(data, batch={"x": 1, "y": 1})).z is None
    none = Dataset(data.root, {**data.sets, "z": [], "s": []}, [], data.fingerprint)
    assert next(loader(none)).z is None and next(loader(none)).s is None


def test_frames_follow_each_other_and_come_from_the_set(data: Dataset) -> None:
    for _, batch in zip(range(20), loader(data, size=20, augment="none"), strict=False):
        for name, low, high in (("x", 0, 6), ("y", 100, 102), ("z", 150, 150)):
            for clip in getattr(batch, name):
                assert (clip[..., 0] == clip[0, 0, 0, 0]).all() and low <= clip[0, 0, 0, 0] <= high
                assert clip[:, 0, 0, 1].diff().tolist() == [1] * (T - 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_epochs_are_complete_and_disjoint_over_ranks(data: Dataset, world_size: int) -> None:
    clips = Counter(s.path for s in data.sets["x"] for _ in range(s.num_frames // T))
    n = sum(clips.values())
    assert n == 1 + 1 + 1 + 2 + 3 + 2 + 1
    ranks = [loader(data, rank=r, world_size=world_size) for r in range(world_size)]
    draws = [d for step in range(2 * n) for r in ranks for d in r.draws("x", step)]
    epochs = [draws[e * n : (e + 1) * n] for e in range(6)]
    for epoch in epochs:
        assert Counter(d.source.path for d in epoch) == clips
        assert all(0 <= d.start <= d.source.num_frames - T for d in epoch)
    assert len({tuple(d.source.path for d in epoch) for epoch in epochs}) == 6, "each epoch has its own order"


def test_one_rank_with_batch_2n_equals_two_ranks_with_n(data: Dataset) -> None:
    one = loader(data, batch={"x": 4, "y": 2})
    two = [loader(data, batch={"x": 2, "y": 1}, rank=r, world_size=2) for r in range(2)]
    for _ in range(8):
        whole, parts = next(one), [next(r) for r in two]
        assert torch.equal(whole.x, torch.cat([p.x for p in parts])) and torch.equal(
            whole.y, torch.cat([p.y for p in parts])
        )


def test_every_start_is_drawn_and_windows_of_a_source_do_not_repeat(data: Dataset) -> None:
    long = next(s for s in data.sets["x"] if s.num_frames == 13)
    one = Dataset(data.root, {"x": [long], "y": data.sets["y"], "z": [], "s": []}, [], "")
    source = loader(one, batch={"x": 3})
    starts = [[d.start for d in source.draws("x", step)] for step in range(200)]
    assert {s for epoch in starts for s in epoch} == set(range(10))
    assert all(len(set(epoch)) == 3 for epoch in starts)


def test_seeds_differ_and_repeat(data: Dataset) -> None:
    same, again, other = loader(data, seed=1), loader(data, seed=1), loader(data, seed=2)
    found = [(next(same), next(again), next(other)) for _ in range(5)]
    assert all(equal(a, b) for a, b, _ in found) and not all(equal(a, c) for a, _, c in found)


@pytest.mark.parametrize("at", [0, 1, 9])
def test_resume_is_bit_exact_whatever_the_threads_cache_and_backend(data: Dataset, at: int) -> None:
    whole = loader(data, augment="dihedral")
    expected = [next(whole) for _ in range(at + 8)][at:]
    first = loader(data, augment="dihedral")
    for _ in range(at):
        next(first)
    state = first.state_dict()
    resumed = loader(data, augment="dihedral", threads=3, cache_mib=0)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(equal(next(resumed), batch) for batch in expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_refuses_what_changed_by_name(data: Dataset, world_size: int) -> None:
    state = loader(data, batch={"x": 2 * world_size}).state_dict()
    loader(data, batch={"x": 2}, world_size=world_size).load_state_dict(state)  # same batch over all ranks
    other = Dataset(data.root, data.sets, [], "other")
    for changed, message in (
        (loader(data, batch={"x": 5}), "the batch over all ranks must stay"),
        (loader(data, batch={"x": 2 * world_size}, seed=4), "seed must stay as saved: expected 0, got 4"),
        (loader(data, batch={"x": 2 * world_size}, size=8), "size must stay"),
        (loader(data, batch={"x": 2 * world_size}, augment="none"), "augment must stay"),
        (loader(other, batch={"x": 2 * world_size}), "the dataset .* must stay"),
    ):
        with pytest.raises(UserError, match=message):
            changed.load_state_dict(state)
    with pytest.raises(UserError, match=r"expected .*, which it lacks"):
        loader(data).load_state_dict({"step": 3})
    with pytest.raises(UserError, match="step must be 0 or more"):
        loader(data, batch={"x": 2 * world_size}).load_state_dict({**state, "step": -1})


def growth(columns: torch.Tensor) -> tuple[int, int]:
    """Which way the stamped column number (H,W) grows: (rightwards, downwards)."""
    return int((columns[0, -1] - columns[0, 0]).sign()), int((columns[-1, 0] - columns[0, 0]).sign())


def test_augmentation_is_one_draw_a_clip(data: Dataset) -> None:
    kinds: set[tuple[int, int]] = set()
    for _, batch in zip(range(40), loader(data, batch={"x": 2, "s": 2}, augment="dihedral"), strict=False):
        for clip in batch.x:
            columns = clip[..., 2].int()
            assert (columns - columns[0]).abs().max() <= 1, "all frames of a clip are cropped and flipped alike"
            kinds.add(growth(columns[0]))
    assert kinds == {(1, 0), (-1, 0), (0, 1), (0, -1)}, "left-right and transposed both occur"
    for augment, expected in (("none", {(1, 0)}), ("flip", {(1, 0), (-1, 0)})):
        batches = [batch for batch, _ in zip(loader(data, augment=augment), range(20), strict=False)]
        assert {growth(clip[0, ..., 2].int()) for batch in batches for clip in batch.x} == expected
    lefts = {d.crop for step in range(10) for d in loader(data, augment="none").draws("x", step)}
    assert len(lefts) == 30, "the crop stays random"


@pytest.mark.parametrize("backend", ["auto", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("fault", ["cut", "shorter", "gone"])
def test_a_file_that_breaks_while_in_use_is_named(root: Path, tmp_path: Path, backend: str, fault: str) -> None:
    shutil.copytree(root, tmp_path / "copy")
    data = open_dataset(tmp_path / "copy", frames=T)
    file = tmp_path / "copy" / "trainY" / "1.mp4"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif fault == "shorter":
        write_clip(file, stamped(T - 1, 101), 8, "vp9-lossless")
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"trainY/1\.mp4: ") as caught:
        next(loader(data, batch={"y": 3}, backend=backend))
    assert "\n" not in str(caught.value)


def test_asking_for_a_missing_backend_raises(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "has_dali", lambda: False)
    with pytest.raises(UserError, match="DALI is not installed"):
        loader(data, backend="dali")
    assert next(loader(data, backend="auto")).x is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"w": 1}}, "expected sets x, y, z, s, got w"),
        ({"batch": {"x": -1}}, "batch: expected 0 or more"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"frames": 6}, "4 frames, shorter than the clip length 6"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to"),
        ({"augment": "spin"}, "augment: expected none, flip, dihedral, got spin"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"backend": "magic"}, "backend: expected auto or dali, got magic"),
    ],
)
def test_bad_options_are_named(data: Dataset, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(data, **changes)


def test_cache_is_bounded_and_changes_nothing(tmp_path: Path) -> None:
    for name in ("trainX", "trainY"):
        (tmp_path / name).mkdir()
        for k in range(3):
            np.save(tmp_path / name / f"{k}.npy", stamped(8, k, 200, 260))  # 8*200*260*3 bytes = 1.19 MiB
    data = open_dataset(tmp_path, frames=T)
    small, none = (
        loader(data, batch={"x": 2}, size=200, cache_mib=3),
        loader(data, batch={"x": 2}, size=200, cache_mib=0),
    )
    for _ in range(8):
        assert torch.equal(next(small).x, next(none).x)
    kept = sum(frames.nbytes for frames in small._clips._cache._frames.values())
    assert 1 * 2**20 < kept <= 3 * 2**20


def test_evaluation_clips_are_the_centre_in_name_order(tmp_path: Path) -> None:
    for name, length in (("clip10", 9), ("clip2", 7), ("tiny", 2)):
        write_clip(tmp_path / f"{name}.mp4", smooth_clip(length, 30, 41), 8, "vp9-lossless")
    found = list(evaluation_clips(tmp_path, frames=5, size=12))
    assert [name for name, _ in found] == ["clip2", "clip10"]
    assert found[1][1].shape == (5, 12, 12, 3)
    np.testing.assert_array_equal(found[1][1], centre_crop(fit(smooth_clip(9, 30, 41)[:5], 12), 12))
    assert [len(clip) for _, clip in evaluation_clips(tmp_path, frames=None, size=12)] == [7, 9, 2]
    with pytest.raises(UserError, match=r"no usable clip: clip2\.mp4: 7 frames"):
        list(evaluation_clips(tmp_path, frames=50, size=12))
    with pytest.raises(UserError, match="no such folder"):
        list(evaluation_clips(tmp_path / "none", frames=5, size=12))
