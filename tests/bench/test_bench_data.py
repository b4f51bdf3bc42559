"""bench/data.py: a wrong frame is seen, a missing peer is named, and its rows say what was measured."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlv2v.data.pipeline import Loader
from rlv2v.data.synth import Counts, write_dataset

pytestmark = pytest.mark.usefixtures("bench_folder")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def files(bench_folder: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = module("data").write_forms(tmp_path_factory.mktemp("forms"))
    return found


@pytest.mark.parametrize("side", [64, 128, 256])
def test_stamps_outlive_noise_and_scaling(side: int) -> None:
    peers, rng = module("data_peers"), np.random.default_rng(side)
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    for file, index in ((0, 0), (3, 119), (63, 1023), (42, 682)):
        frame = peers.stamp(picture, file, index) + rng.normal(0, 20, picture.shape)
        clip = peers.shrink([frame.clip(0, 255).astype(np.uint8)])
        assert clip.shape == (1, 64, 64, 3) and peers.read_stamps(clip).tolist() == [file * 1024 + index]


def test_every_way_returns_the_right_frames_and_a_wrong_one_is_marked(files: dict[str, list[Path]]) -> None:
    data, peers = module("data"), module("data_peers")
    for name in ("rlv2v", "Loader", "PyAV", "OpenCV"):
        for form, paths in files.items():
            if form == data.RAW and name in peers.PEERS:
                continue
            way = peers.WAYS[name]()
            way.open([str(path) for path in paths])
            assert way.wrong([(0, 0), (3, 104), (1, 50)]) == 0, (name, form)
    way = peers.WAYS["PyAV"]()
    way.open([str(path) for path in files[data.VP9_256]])
    read = way.read
    way.read = lambda file, start: read(file, max(start - 1, 0))
    assert way.wrong([(0, 0), (3, 104), (1, 50)]) == 32
    way.read = lambda file, start: read(file, start)[1:]
    assert way.wrong([(0, 0)]) == 16
    way.read = lambda file, start: read(0, start)
    assert way.wrong([(0, 0), (1, 0)]) == 16


def test_rows_come_from_processes_of_their_own(files: dict[str, list[Path]], tmp_path: Path) -> None:
    data, peers = module("data"), module("data_peers")
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(name, tmp_path)) for name in ("rlv2v", "PyAV")}
        rows = data.case_rows(data.VP9_256, files[data.VP9_256], workers, 2)
        data.compare(rows)
        assert [(row["backend"], row["valid"]) for row in rows] == [("rlv2v", True), ("PyAV", True)]
        ours, peer = rows
        assert ours["best_peer"] == "PyAV" and "ratio" not in peer
        assert ours["ratio"] == round(ours["clips_per_s"] / peer["clips_per_s"], 3)
        assert all(20 < row["rss_mib"] < 2000 and 0.5 < row["cpu_ms"] < 1000 for row in rows)
        assert all(row["p20"] <= row["clips_per_s"] <= row["p80"] for row in rows)
        # one core: what is counted as CPU time fits into the time that passed
        spent = workers["rlv2v"].ask("run", (), data.random_draws(6, 0))
        assert 0 < spent["cpu"] <= spent["seconds"] * 1.05
        with pytest.raises(RuntimeError, match=r"PyAV: .*no such file\.mp4"):
            workers["PyAV"].ask("open", [tmp_path / "no such file.mp4"], [(0, 0)])
        (row,) = data.case_rows(data.VP9_256, [tmp_path / "gone.mp4"] * 4, {"PyAV": workers["PyAV"]}, 1)
        assert not row["valid"] and "gone.mp4" in row["wrong_data"] and "clips_per_s" not in row
        workers["rlv2v"].process.kill()
        with pytest.raises(RuntimeError, match="rlv2v: its process ended with -9"):
            workers["rlv2v"].ask("import")


def test_a_row_that_is_not_valid_is_no_peer() -> None:
    def row(backend: str, case: str, rate: float, valid: bool = True) -> dict[str, Any]:
        return {"backend": backend, "case": case, "valid": valid, "clips_per_s": rate, "cpu_ms": 1000 / rate}

    data = module("data")
    rows = [
        row("rlv2v", data.RAW, 2000),
        row("rlv2v", data.VP9_256, 90),
        row("PyAV", data.VP9_256, 100),
        row("decord", data.VP9_256, 1000, valid=False),
        row("OpenCV", data.H264_256, 200),
    ]
    data.compare(rows)
    assert (rows[0]["best_peer"], rows[0]["ratio"], rows[0]["cpu_ratio"]) == ("OpenCV", 10, 10)
    assert (rows[1]["best_peer"], rows[1]["ratio"]) == ("PyAV", 0.9)
    assert "ratio" not in rows[3]


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = module("data")
    monkeypatch.setattr(data, "WAYS", {"PyAV": None, "decord": None})
    (tmp_path / "decord.py").write_text("raise ImportError('no wheel\\nfor this')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with ExitStack() as stack:
        workers, missing = data.start(stack, tmp_path)
    assert list(workers) == ["PyAV"] and missing == {"decord": "ImportError: no wheel"}


def test_index_and_loader_rows(files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = module("data").index_rows(tmp_path / "index", files, 1)
    assert row["case"] == "index of 16 files of 120 frames"
    assert 0.5 < row["first_over_plain"] < 5 and row["first_over_second"] > 5
    loader = module("data_loader")
    early, late = loader.memory(tmp_path / "index", True, (2, 4))
    assert 50 < early <= late * 1.1
    write_dataset(tmp_path / "synth", size=32, frames=8, seed=0, counts=Counts(16, 16, 16, 4, 1, 1))
    monkeypatch.setattr(loader.train, "Loader", Loader)  # put back what `waits` replaces
    found = loader.waits(tmp_path / "synth", tmp_path / "run", 5)
    assert found["steps"] == 3 and 0 < found["wait_ms"] < found["step_ms"]
    assert found["wait_percent"] == pytest.approx(100 * found["wait_ms"] / found["step_ms"], rel=0.1, abs=0.01)
