"""Files that break after the index was made: a warning each, other clips in their place, an end when too many do."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlv2v.data import readers
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

T, NUM = 4, 11
needs_dali = pytest.mark.skipif(not readers.has_dali(), reason="DALI is not made for this platform")
BACKENDS = ["auto", pytest.param("dali", marks=needs_dali)]
FAULTS = ["gone", "cut", "noise"]


@pytest.fixture(scope="module", params=["vp9", "h264", "raw"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X: eleven sources of one kind with two clips each, whose red tells the source; Y: one source."""
    root = tmp_path_factory.mktemp(request.param)
    for name in ("trainX", "trainY"):
        (root / name).mkdir()
        for k in range(NUM if name == "trainX" else 1):
            clip = np.random.default_rng(k).integers(0, 9, (2 * T, 24, 32, 3)).astype(np.uint8)
            clip[..., 0] = 20 * k
            if request.param == "raw":
                np.save(root / name / f"{k}.npy", clip)
            else:
                codec = "h264" if request.param == "h264" else "vp9-lossless"
                write_clip(root / name / f"{k}.mp4", clip, 8, codec)  # type: ignore[arg-type]
    return root


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Dataset:
    """A copy that may be broken, indexed while it is whole."""
    shutil.copytree(whole, tmp_path / "data")
    return open_dataset(tmp_path / "data", frames=T)


def damage(path: Path, fault: str) -> None:
    """Break a file; a raw one by a new file of its name, for to cut a mapped one in place kills any process at once."""
    content, raw = path.read_bytes(), path.suffix == ".npy"
    if fault == "gone" or raw:
        path.unlink()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 3])
    elif fault == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(content)))


def loader(data: Dataset, **changes: object) -> Loader:
    options: dict[str, object] = {"batch": {"x": 3, "y": 1}, "frames": T, "size": 16, "seed": 0, "cache_mib": 0}
    return Loader(data, **{**options, **changes})  # type: ignore[arg-type]


def take(source: Loader, num: int) -> torch.Tensor:
    batches = [next(source) for _ in range(num)]
    assert all(batch.y is not None for batch in batches)
    return torch.stack([batch.x for batch in batches if batch.x is not None])


def shown(clips: torch.Tensor) -> set[int]:
    """The sources that clips (...,T,H,W,3) come from, by their red."""
    return set(((clips[..., 0].float().mean((-1, -2, -3)) + 4) / 20).int().flatten().tolist())


@pytest.fixture(autouse=True)
def nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is open can be read after it is gone: here each read opens its file, so that what breaks shows."""
    monkeypatch.setattr(readers, "KEPT_FILES", 0)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on_without_the_files_that_break(
    data: Dataset, backend: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = [source.path for source in data.sets["x"]]
    intact = loader(data, backend=backend)
    before = take(intact, 16)
    draws = [intact.draws("x", step) for step in range(16)]
    assert shown(before) == set(range(NUM))
    damage(files[4], fault)
    one = loader(data, backend=backend)
    with caplog.at_level(logging.WARNING):
        after = take(one, 16)
        assert shown(after) == set(range(NUM)) - {4}
        damage(files[7], fault)  # a second one, in use
        later = take(one, 24)
    mapped = backend == "dali" and files[7].suffix == ".npy"  # DALI keeps what it has mapped: still there to be read
    lost = [4] if mapped else [4, 7]
    warned = [r.getMessage() for r in caplog.records if "left out from step" in r.getMessage()]
    assert [text.partition(": ")[0] for text in warned] == [str(files[k]) for k in lost]
    assert shown(later[8:]) == set(range(NUM)) - set(lost)
    for step, drawn in enumerate(draws):  # what has nothing to do with the file stays as it was
        for k, draw in enumerate(drawn):
            assert torch.equal(after[step, k], before[step, k]) == (draw.source.path != files[4])
    for source in (intact, one):
        source.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_a_resume_see_the_same_clips(whole: Path, data: Dataset, backend: str) -> None:
    for k in (2, 9):
        damage(data.sets["x"][k].path, FAULTS[k % 3])
    one, three = loader(data, backend=backend), loader(data, backend=backend, threads=3, cache_mib=8)
    expected = take(one, 40)
    assert torch.equal(take(three, 25), expected[:25])
    state = three.state_dict()
    assert [entry["path"] for entry in state["denied"]["x"]] != [] and "y" not in state["denied"]
    again = open_dataset(data.root, frames=T)  # as a new process would: without what broke
    assert len(again.sets["x"]) == NUM - 2 and again.fingerprint != data.fingerprint
    mended = data.root.with_name("mended")
    shutil.copytree(whole, mended)
    for dataset in (data, again, open_dataset(mended, frames=T)):
        resumed = loader(dataset, backend=backend, threads=2)
        next(resumed)
        resumed.load_state_dict(state)
        assert torch.equal(take(resumed, 15), expected[25:])
        assert [entry["path"] for entry in resumed.state_dict()["denied"]["x"]] == [
            entry["path"] for entry in state["denied"]["x"]
        ]
        resumed.close()
    for source in (one, three):
        source.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_a_fifth_lost_ends_the_run_with_the_list(data: Dataset, backend: str) -> None:
    source = loader(data, backend=backend)
    for k, fault in zip((0, 5, 10), FAULTS, strict=True):
        damage(data.sets["x"][k].path, fault)
    with pytest.raises(UserError, match=r"set X: expected at most 20% of its 11 files .* lost 3") as caught:
        take(source, 30)
    assert source.step > 0, "two of eleven are borne"
    assert all(f"{data.sets['x'][k].path}: " in str(caught.value) for k in (0, 5, 10))
    assert "\n" not in str(caught.value)
    source.close()


def test_a_resume_without_a_file_that_was_never_denied_is_refused(data: Dataset) -> None:
    damage(data.sets["x"][3].path, "gone")
    source = loader(data)
    take(source, 20)
    damage(data.sets["x"][6].path, "gone")
    with pytest.raises(UserError, match=r"the dataset .* must stay"):
        loader(open_dataset(data.root, frames=T)).load_state_dict(source.state_dict())


def test_epochs_of_ranks_lose_only_what_broke(data: Dataset) -> None:
    broken = data.sets["x"][4]
    ranks = [loader(data, batch={"x": 1}, rank=r, world_size=2) for r in range(2)]
    before = [d for step in range(NUM) for r in ranks for d in r.draws("x", step)]
    for rank in ranks:
        rank.plan.deny("x", 0, {broken: "test"})
    after = [d for step in range(NUM) for r in ranks for d in r.draws("x", step)]
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 2
    assert all((a == b) == (a.source != broken) for a, b in zip(before, after, strict=True))
    assert all(a.crop == b.crop and a.flips == b.flips for a, b in zip(before, after, strict=True))
