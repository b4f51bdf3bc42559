"""Files that break after the index was made: a warning each, other clips in their place, an end when too many do."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_clips import BACKENDS, needs_dali, open_loader

from rlv2v.data import readers
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

T, NUM = 4, 11
FAULTS = ["gone", "cut", "noise", "shorter"]
CASES = [("auto", fault) for fault in FAULTS] + [pytest.param("dali", "shorter", marks=needs_dali)]
CASES += [pytest.param("dali", fault, marks=[needs_dali, pytest.mark.thorough]) for fault in FAULTS[:3]]


@pytest.fixture(scope="module", params=["vp9", pytest.param("h264", marks=pytest.mark.thorough), "raw"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X: eleven sources of one kind with two clips each, whose red tells the source; Y: one source."""
    root = tmp_path_factory.mktemp(request.param)
    for name, num in (("trainX", NUM), ("trainY", 1)):
        (root / name).mkdir()
        for k in range(num):
            clip = np.random.default_rng(k).integers(0, 9, (2 * T, 24, 32, 3)).astype(np.uint8)
            clip[..., 0] = 20 * k
            if request.param == "raw":
                np.save(root / name / f"{k}.npy", clip)
            else:
                write_clip(root / name / f"{k}.mp4", clip, 8, "h264" if request.param == "h264" else "vp9-lossless")
    return root


@pytest.fixture
def data(intact: Path, tmp_path: Path) -> Dataset:
    """A copy that may be broken, indexed while it is intact."""
    shutil.copytree(intact, tmp_path / "data")
    return open_dataset(tmp_path / "data", frames=T)


def damage(path: Path, fault: str) -> None:
    """Break a file."""
    content, raw = path.read_bytes(), path.suffix == ".npy"
    if fault == "gone":
        path.unlink()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 3])
    elif fault == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(content)))
    elif fault == "shorter" and raw:
        np.save(path, np.zeros((T - 1, 24, 32, 3), np.uint8))
    elif fault == "shorter":
        write_clip(path, np.zeros((T - 1, 24, 32, 3), np.uint8), 8, "vp9-lossless")


def loader(data: Dataset, **changes: Any) -> Loader:
    return open_loader(data, **{"batch": {"x": 3, "y": 1}, "cache_mib": 0, **changes})


def take(source: Loader, num: int) -> torch.Tensor:
    batches = [next(source) for _ in range(num)]
    assert all(batch.y is not None for batch in batches)
    return torch.stack([batch.x for batch in batches if batch.x is not None])


def shown(clips: torch.Tensor) -> set[int]:
    """Return the sources that clips (...,T,H,W,3) come from, by their red."""
    return set(((clips[..., 0].float().mean((-1, -2, -3)) + 4) / 20).int().flatten().tolist())


@pytest.fixture(autouse=True)
def nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is open can be read after it is gone: in these tests each read opens its file."""
    monkeypatch.setattr(readers, "MAX_OPEN_FILES", 0)


@pytest.mark.parametrize(("backend", "fault"), CASES)
def test_training_goes_on_without_the_files_that_break(
    data: Dataset, backend: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = [source.path for source in data.sets["x"]]
    reference = loader(data, backend=backend)
    expected = take(reference, 16)
    samples = [reference.sampler.samples("x", step) for step in range(16)]
    assert shown(expected) == set(range(NUM))
    damage(files[4], fault)
    source = loader(data, backend=backend)
    with caplog.at_level(logging.WARNING):
        clips = take(source, 16)
        assert shown(clips) == set(range(NUM)) - {4}
        damage(files[7], fault)  # a second one, in use
        later = take(source, 24)
    warned = [r.getMessage() for r in caplog.records if "left out from step" in r.getMessage()]
    assert [text.partition(": ")[0] for text in warned] == [str(files[k]) for k in (4, 7)]
    assert shown(later[8:]) == set(range(NUM)) - {4, 7}
    for step, row in enumerate(samples):  # what has nothing to do with the file stays as it was
        for k, sample in enumerate(row):
            assert torch.equal(clips[step, k], expected[step, k]) == (sample.source.path != files[4])
    for each in (reference, source):
        each.close()


@pytest.mark.parametrize("backend", ["auto", pytest.param("dali", marks=[needs_dali, pytest.mark.thorough])])
def test_threads_and_a_resume_see_the_same_clips(intact: Path, data: Dataset, backend: str) -> None:
    for k in (2, 9):
        damage(data.sets["x"][k].path, FAULTS[k % 3])
    one, three = loader(data, backend=backend), loader(data, backend=backend, threads=3, cache_mib=8)
    expected = take(one, 40)
    assert torch.equal(take(three, 25), expected[:25])
    state = three.state_dict()
    excluded = [row["path"] for row in state["excluded"]["x"]]
    assert excluded and "y" not in state["excluded"]
    again = open_dataset(data.root, frames=T)  # as a new process would: without what broke
    assert len(again.sets["x"]) == NUM - 2 and again.fingerprint != data.fingerprint
    mended = shutil.copytree(intact, data.root.with_name("mended"))
    for dataset in (data, again, open_dataset(mended, frames=T)):
        resumed = loader(dataset, backend=backend, threads=2)
        next(resumed)
        resumed.load_state_dict(state)
        assert torch.equal(take(resumed, 15), expected[25:])
        assert [row["path"] for row in resumed.state_dict()["excluded"]["x"]] == excluded
        resumed.close()
    for source in (one, three):
        source.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_a_fifth_lost_ends_the_run_with_the_list(data: Dataset, backend: str) -> None:
    source = loader(data, backend=backend)
    for k, fault in zip((0, 5, 10), FAULTS, strict=False):
        damage(data.sets["x"][k].path, fault)
    with pytest.raises(UserError, match=r"set X: expected at most 20% of its 11 files .* lost 3") as caught:
        take(source, 30)
    assert source.step > 0, "two of eleven are borne"
    assert all(f"{data.sets['x'][k].path}: " in str(caught.value) for k in (0, 5, 10))
    assert "\n" not in str(caught.value)
    source.close()


def test_a_resume_without_a_file_that_was_never_excluded_is_refused(data: Dataset) -> None:
    damage(data.sets["x"][3].path, "gone")
    source = loader(data)
    take(source, 20)
    damage(data.sets["x"][6].path, "gone")
    with pytest.raises(UserError, match=r"resume: .*/data must stay as it was: trainX/6\.\w+ vanished; restore it"):
        loader(open_dataset(data.root, frames=T)).load_state_dict(source.state_dict())


def test_epochs_of_ranks_lose_only_what_broke(data: Dataset) -> None:
    broken = data.sets["x"][4]
    ranks = [loader(data, batch={"x": 1}, rank=r, world_size=2).sampler for r in range(2)]
    first = [s for step in range(NUM) for rank in ranks for s in rank.samples("x", step)]
    for rank in ranks:
        rank.exclude("x", 0, {broken: "test"})
    second = [s for step in range(NUM) for rank in ranks for s in rank.samples("x", step)]
    assert [a == b for a, b in zip(first, second, strict=True)].count(False) == 2
    assert all((a == b) == (a.source != broken) for a, b in zip(first, second, strict=True))
    assert all(a.crop == b.crop and a.flips == b.flips for a, b in zip(first, second, strict=True))
