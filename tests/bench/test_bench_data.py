"""bench/data.py: a wrong frame is seen, a missing peer is named, and its rows say what was measured."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import data
import data_peers as peers
import numpy as np
import pytest
from harness import Args, Bench

from rlv2v.data.synth import Counts, write_dataset

DRAWS = [(0, 0), (3, 104), (1, 50)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return data.write_forms(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_stamps_outlive_noise_and_scaling(side: int) -> None:
    rng = np.random.default_rng(side)
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    for file, index in ((0, 0), (3, 119), (63, 1023), (42, 682)):
        frame = peers.stamp(picture, file, index) + rng.normal(0, 20, picture.shape)
        clip = peers.shrink([frame.clip(0, 255).astype(np.uint8)])
        assert clip.shape == (1, 64, 64, 3) and peers.read_stamps(clip).tolist() == [file * 1024 + index]


@pytest.mark.parametrize("name", ["rlv2v", "Loader", "PyAV", "OpenCV"])
def test_every_way_returns_the_right_frames(name: str, files: dict[str, list[Path]]) -> None:
    for form, paths in files.items():
        if form != data.RAW or name not in peers.PEERS:
            way = peers.WAYS[name]()
            way.open([str(path) for path in paths])
            assert way.wrong(DRAWS) == 0, form


def test_a_wrong_frame_is_counted(files: dict[str, list[Path]]) -> None:
    way = peers.WAYS["PyAV"]()
    way.open([str(path) for path in files[data.VP9_256]])
    read = way.read
    for wrong, draws, count in (
        (lambda file, start: read(file, max(start - 1, 0)), DRAWS, 32),
        (lambda file, start: read(file, start)[1:], DRAWS[:1], 16),
        (lambda file, start: read(0, start), [(0, 0), (1, 0)], 16),
    ):
        way.read = wrong  # type: ignore[method-assign]
        assert way.wrong(draws) == count


def test_rows_come_from_processes_of_their_own(files: dict[str, list[Path]], tmp_path: Path) -> None:
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(name, tmp_path)) for name in ("rlv2v", "PyAV")}
        ours, peer = data.reading_rows(data.VP9_256, files[data.VP9_256], workers, 2)
        assert ours["valid"] and peer["valid"] and set(ours["speedup_over"]) == {"PyAV", "best peer"}
        assert ours["ours"] and not peer["ours"]
        for row in (ours, peer):
            assert row["clips_per_s"] == pytest.approx(1e6 / row["median_us"], rel=0.01) and row["cpu_ms"] > 0
        with pytest.raises(RuntimeError, match=r"PyAV: .*no such file\.mp4"):
            workers["PyAV"].ask("open", [tmp_path / "no such file.mp4"], [(0, 0)])
        (row,) = data.reading_rows(data.VP9_256, [tmp_path / "gone.mp4"] * 4, {"PyAV": workers["PyAV"]}, 1)
        assert not row["valid"] and "gone.mp4" in row["wrong_data"] and "clips_per_s" not in row
        workers["rlv2v"].process.kill()
        with pytest.raises(RuntimeError, match="rlv2v: its process ended with -9"):
            workers["rlv2v"].ask("import")


def test_prepared_raw_is_compared_with_valid_peers_on_the_original_files() -> None:
    def row(backend: str, case: str, us: float, valid: bool = True) -> dict[str, Any]:
        return {"backend": backend, "case": case, "valid": valid, "median_us": us, "ours": backend == "rlv2v"}

    rows = [
        row("rlv2v", data.RAW, 2),
        row("PyAV", data.VP9_256, 100),
        row("decord", data.VP9_256, 1, valid=False),
        row("OpenCV", data.H264_256, 20),
        row("PyAV", data.PREPARED, 1),
    ]
    data.compare_raw(rows)
    assert rows[0]["speedup_over"] == {
        "PyAV, unprepared VP9 256": 50, "OpenCV, unprepared H.264 256": 10, "best peer": 10
    }  # fmt: skip


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "WAYS", {"PyAV": None, "decord": None})
    (tmp_path / "decord.py").write_text("raise ImportError('no wheel\\nfor this')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    bench = Bench("data", Args())
    with ExitStack() as stack:
        assert list(data.start_workers(bench, stack, tmp_path)) == ["PyAV"]
    assert bench.missing == {"decord": "ImportError: no wheel"}


@pytest.mark.thorough
def test_index_wait_and_memory_rows(files: dict[str, list[Path]], tmp_path: Path) -> None:
    rows = data.index_rows(tmp_path / "index", files, 2)
    assert [row["backend"] for row in rows] == ["plain decode", "one at a time", "first time", "second time"]
    assert rows[0]["case"].startswith("index of 16 files of 120 frames")
    assert rows[3]["speedup_over"]["plain decode"] > 5
    row = data.memory_row("a case", tmp_path / "index", True, (2, 4))
    assert row["steps"] == [2, 4] and 50 < row["rss_mib"][0] <= row["rss_mib"][1] * 1.1
    write_dataset(tmp_path / "synth", size=32, frames=8, seed=0, counts=Counts(16, 16, 16, 4, 1, 1))
    row = data.wait_row(tmp_path / "synth", tmp_path / "run", 11)
    assert row["steps"] == 10 and 0 < row["wait_ms"] < row["step_ms"]
    assert row["wait_percent"] == pytest.approx(100 * row["wait_ms"] / row["step_ms"], rel=0.1, abs=0.01)
