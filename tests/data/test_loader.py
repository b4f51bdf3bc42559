"""The loader: addressable samples, complete and disjoint epochs, bit-exact resume, equal backends."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_clips import BACKENDS, open_loader, smooth, write_frames

from rlv2v.crop_size import CropSize
from rlv2v.data.images import write_image
from rlv2v.data.index import Dataset, index_folder, open_dataset
from rlv2v.data.loader import Batch, evaluation_clips
from rlv2v.data.scaling import centre_crop, cover, resize
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

T, SIZE = 4, 16
PINNED = [
    ("4.mp4", 0, 0.575367, (False, False, True)),
    ("0.mp4", 0, 0.003079, (True, True, True)),
    ("2.mp4", 1, 0.734906, (False, True, False)),
]


def marked(frames: int, mark: int, height: int = 20, width: int = 28) -> np.ndarray:
    """Return a clip whose pixels tell the clip (red), the frame (green) and the column (blue)."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[..., 0] = mark
    clip[..., 1] = np.arange(frames)[:, None, None]
    clip[..., 2] = np.arange(width)
    return clip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X: seven sources of all kinds, of 4 to 13 frames; Y, Z: videos; S: images."""
    root = tmp_path_factory.mktemp("data")
    for name in ("trainX", "trainY", "trainZ", "trainS"):
        (root / name).mkdir()
    for mark, length in enumerate((4, 4, 5, 9, 13)):
        write_clip(root / "trainX" / f"{mark}.mp4", marked(length, mark), 8, "vp9-lossless")
    np.save(root / "trainX" / "5.npy", marked(8, 5))
    write_frames(root / "trainX" / "6", marked(6, 6))
    for mark in range(3):
        write_clip(root / "trainY" / f"{mark}.mp4", marked(T, 100 + mark), 8, "vp9-lossless")
        write_image(root / "trainS" / f"{mark}.png", marked(1, 200 + mark)[0])
    write_clip(root / "trainZ" / "0.mp4", marked(T, 150), 8, "vp9-lossless")
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> Dataset:
    return open_dataset(root, frames=T)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in "xyzs")


def test_batches_have_their_shapes_and_empty_sets_are_none(data: Dataset) -> None:
    batch = next(open_loader(data))
    assert batch.x is not None and batch.x.shape == (3, T, SIZE, SIZE, 3) and batch.x.dtype == torch.uint8
    assert batch.y is not None and batch.z is not None and batch.s is not None
    assert batch.y.shape[0] == 2 and batch.z.shape[0] == 1 and batch.s.shape == (2, SIZE, SIZE, 3)
    assert next(open_loader(data, batch={"x": 1, "y": 1})).z is None
    without = next(open_loader(Dataset(data.root, {**data.sets, "z": [], "s": []}, [], data.fingerprint)))
    assert without.x is not None and without.z is None and without.s is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_holds_the_frames_that_were_chosen(data: Dataset, backend: str) -> None:
    loader = open_loader(data, backend=backend, augment="dihedral", threads=3)
    for _ in range(30):
        samples, batch = loader.sampler.samples("x", loader.step), next(loader).x
        assert batch is not None
        for sample, clip in zip(samples, batch, strict=True):
            assert (clip[..., 0] == int(sample.source.path.stem)).all()
            assert (clip[..., 1] == sample.start + torch.arange(T)[:, None, None]).all()
    loader.close()


@pytest.mark.parametrize("cache_mib", [0, 8])
def test_a_clip_of_a_still_is_a_crop_that_moves_evenly(data: Dataset, tmp_path: Path, cache_mib: int) -> None:
    """Rows and columns of a ramp say where the crop is; it never leaves the picture, and what S shows of it stays."""
    rows, columns = np.mgrid[:40, :40].astype(np.uint8)
    write_image(tmp_path / "ramp.png", np.stack([5 * rows, 5 * columns, rows], -1))
    (still,) = index_folder(tmp_path, frames=1)
    dataset = replace(data, sets={**data.sets, "y": [still], "s": [still]})
    loader, side, moved = open_loader(dataset, augment="none", cache_mib=cache_mib), round(1.25 * SIZE), set()
    for _ in range(8):
        samples, batch = loader.sampler.samples("y", loader.step), next(loader)
        assert batch.y is not None and batch.s is not None and batch.s.shape == (2, SIZE, SIZE, 3)
        whole = resize(np.stack([5 * rows, 5 * columns, rows], -1), side, side)
        for sample, clip in zip(samples, batch.y.numpy(), strict=True):
            assert sample.end is not None and len(clip) == T
            top, left = (np.linspace(a, b, T) for a, b in zip(sample.crop, sample.end, strict=True))
            for t, frame in enumerate(clip):
                row, column = int(top[t] * (side - SIZE + 1)), int(left[t] * (side - SIZE + 1))
                assert np.array_equal(frame, whole[row : row + SIZE, column : column + SIZE])
                moved.add((row, column))
    assert len(moved) > 8, "it moves"
    loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_epochs_are_complete_and_disjoint_over_ranks(data: Dataset, world_size: int) -> None:
    clips = Counter(s.path for s in data.sets["x"] for _ in range(s.num_frames // T))
    n = sum(clips.values())
    assert n == 1 + 1 + 1 + 2 + 3 + 2 + 1
    ranks = [open_loader(data, rank=r, world_size=world_size).sampler for r in range(world_size)]
    samples = [s for step in range(2 * n) for r in ranks for s in r.samples("x", step)]
    epochs = [samples[e * n : (e + 1) * n] for e in range(6)]
    for epoch in epochs:
        assert Counter(s.source.path for s in epoch) == clips
        assert all(0 <= s.start <= s.source.num_frames - T for s in epoch)
    assert len({tuple(s.source.path for s in epoch) for epoch in epochs}) == 6, "each epoch has its own order"


def test_the_samples_of_a_seed_are_pinned(data: Dataset) -> None:
    """A run of an older version resumes with the same clips."""
    sampler = open_loader(data, seed=7, augment="dihedral").sampler
    assert sampler.samples("x", 11) != open_loader(data, seed=8, augment="dihedral").sampler.samples("x", 11)
    rows = [(s.source.path.name, s.start, round(s.crop[0], 6), s.flips) for s in sampler.samples("x", 11)]
    assert rows == PINNED


def test_one_rank_with_batch_2n_equals_two_ranks_with_n(data: Dataset) -> None:
    one = open_loader(data, batch={"x": 4, "y": 2})
    two = [open_loader(data, batch={"x": 2, "y": 1}, rank=r, world_size=2) for r in range(2)]
    for _ in range(8):
        batch, shares = next(one), [next(r) for r in two]
        assert torch.equal(batch.x, torch.cat([b.x for b in shares]))
        assert torch.equal(batch.y, torch.cat([b.y for b in shares]))


def test_every_start_is_drawn_and_windows_of_a_source_do_not_repeat(data: Dataset) -> None:
    long = next(s for s in data.sets["x"] if s.num_frames == 13)
    one = Dataset(data.root, {"x": [long], "y": data.sets["y"], "z": [], "s": []}, [], "")
    sampler = open_loader(one, batch={"x": 3}).sampler
    starts = [[s.start for s in sampler.samples("x", step)] for step in range(200)]
    assert {s for epoch in starts for s in epoch} == set(range(10))
    assert all(len(set(epoch)) == 3 for epoch in starts)


@pytest.mark.parametrize("step", [0, 1, 9])
def test_resume_is_bit_exact_whatever_the_threads_and_cache(data: Dataset, step: int) -> None:
    reference = open_loader(data, augment="dihedral")
    expected = [next(reference) for _ in range(step + 8)][step:]
    first = open_loader(data, augment="dihedral")
    for _ in range(step):
        next(first)
    state = first.state_dict()
    resumed = open_loader(data, augment="dihedral", threads=3, cache_mib=0)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(equal(next(resumed), batch) for batch in expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_refuses_what_changed_by_name(data: Dataset, world_size: int) -> None:
    batch = {"x": 2 * world_size}
    state = open_loader(data, batch=batch).state_dict()
    open_loader(data, batch={"x": 2}, world_size=world_size).load_state_dict(state)  # same batch over all ranks
    other = Dataset(data.root, data.sets, [], "other")
    for changed, message in (
        (open_loader(data, batch={"x": 5}), "the batch over all ranks must stay"),
        (open_loader(data, batch=batch, seed=4), "seed must stay as saved: expected 0, got 4"),
        (open_loader(data, batch=batch, size=8), "size must stay"),
        (open_loader(data, batch=batch, augment="none"), "augment must stay"),
        (open_loader(other, batch=batch), "resume: .* must stay as it was: .* (changed|appeared|vanished)"),
    ):
        with pytest.raises(UserError, match=message):
            changed.load_state_dict(state)
    with pytest.raises(UserError, match=r"expected .*, which it lacks"):
        open_loader(data).load_state_dict({"step": 3})
    with pytest.raises(UserError, match="step must be 0 or more"):
        open_loader(data, batch=batch).load_state_dict({**state, "step": -1})


def growth(columns: torch.Tensor) -> tuple[int, int]:
    """Return which way the column number (H,W) grows: (rightwards, downwards)."""
    return int((columns[0, -1] - columns[0, 0]).sign()), int((columns[-1, 0] - columns[0, 0]).sign())


def test_augmentation_is_one_choice_a_clip(data: Dataset) -> None:
    kinds: set[tuple[int, int]] = set()
    for _, batch in zip(range(40), open_loader(data, batch={"x": 2, "s": 2}, augment="dihedral"), strict=False):
        for clip in batch.x:
            columns = clip[..., 2].int()
            assert (columns - columns[0]).abs().max() <= 1, "all frames of a clip are cropped and flipped alike"
            kinds.add(growth(columns[0]))
    assert kinds == {(1, 0), (-1, 0), (0, 1), (0, -1)}, "left-right and transposed both occur"
    for augment, expected in (("none", {(1, 0)}), ("flip", {(1, 0), (-1, 0)})):
        batches = [batch for batch, _ in zip(open_loader(data, augment=augment), range(20), strict=False)]
        assert {growth(clip[0, ..., 2].int()) for batch in batches for clip in batch.x} == expected
    sampler = open_loader(data, augment="none").sampler
    assert len({s.crop for step in range(10) for s in sampler.samples("x", step)}) == 30, "the crop stays random"


def test_without_dali_the_threads_work_and_the_extra_is_named(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for changes in ({"backend": "dali"}, {"device": "gpu"}):
        with pytest.raises(UserError, match=r"DALI, which is not installed; .*: pip install 'rlv2v\[dali\]'"):
            open_loader(data, **changes)
    assert next(open_loader(data, backend="auto")).x is not None
    code = "import sys; sys.modules['nvidia.dali'] = None; import rlv2v.data.loader, rlv2v.prepare"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_options_are_named(data: Dataset) -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"batch": {"w": 1}}, "batch: expected 0 or more of each set x, y, z, s, got"),
        ({"batch": {"x": -1}}, "batch: expected 0 or more"),
        ({"frames": 6}, "4 frames, shorter than the clip length 6"),
        ({"augment": "spin"}, "expected none or flip or dihedral, got spin"),
        ({"device": "tpu"}, "expected cpu or gpu, got tpu"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to"),
    ]
    for changes, message in options:
        with pytest.raises(UserError, match=message):
            open_loader(data, **changes)


def test_cache_is_bounded_and_changes_nothing(tmp_path: Path) -> None:
    for name in ("trainX", "trainY"):
        (tmp_path / name).mkdir()
        for k in range(3):
            np.save(tmp_path / name / f"{k}.npy", marked(8, k, 200, 260))  # 8*200*260*3 bytes = 1.19 MiB
    data = open_dataset(tmp_path, frames=T)
    small, none = (open_loader(data, batch={"x": 2}, size=200, cache_mib=mib) for mib in (3, 0))
    for _ in range(8):
        assert torch.equal(next(small).x, next(none).x)
    assert small.clips.free_bytes == 3 * 2**20 - 2 * 8 * 200 * 260 * 3, "room for two of six sources"


def test_evaluation_clips_are_the_centre_in_name_order(tmp_path: Path) -> None:
    for name, length in (("clip10", 9), ("clip2", 7), ("tiny", 2)):
        write_clip(tmp_path / f"{name}.mp4", smooth(length, 30, 41), 8, "vp9-lossless")
    size = CropSize(12, 12)
    clips = list(evaluation_clips(tmp_path, frames=5, size=size))
    assert [name for name, _ in clips] == ["clip2", "clip10"]
    assert clips[1][1].shape == (5, 12, 12, 3)
    np.testing.assert_array_equal(clips[1][1], centre_crop(cover(smooth(9, 30, 41)[:5], size), size))
    assert [len(clip) for _, clip in evaluation_clips(tmp_path, frames=None, size=size)] == [7, 9, 2]
    with pytest.raises(UserError, match=r"no usable clip: clip2\.mp4: 7 frames"):
        list(evaluation_clips(tmp_path, frames=50, size=size))
    with pytest.raises(UserError, match="no such folder"):
        list(evaluation_clips(tmp_path / "none", frames=5, size=size))
