"""bench/data.py: a wrong frame is seen, a missing peer is named, and its rows say what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import data
import data_peers as peers
import numpy as np
import pytest
from harness import Args, Bench, process_of_its_own

from rlv2v.data.synth import Counts, write_dataset

DRAWS = [(0, 0), (1, 16), (1, 7)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Path]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "NUM_FILES", 2)
        patch.setattr(data, "LENGTH", 32)
        yield data.write_forms(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_stamps_outlive_noise_and_scaling(side: int) -> None:
    rng = np.random.default_rng(side)
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    for file, index in ((0, 0), (3, 119), (63, 1023), (42, 682)):
        frame = peers.stamp(picture, file, index) + rng.normal(0, 20, picture.shape)
        clip = peers.shrink([frame.clip(0, 255).astype(np.uint8)])
        assert clip.shape == (1, 64, 64, 3) and peers.read_stamps(clip).tolist() == [file * 1024 + index]


def test_every_way_returns_the_right_frames(files: dict[str, list[Path]]) -> None:
    for name in ("rlv2v", "Loader", "PyAV", "OpenCV"):
        for form, paths in files.items():
            if form != data.RAW or name not in peers.PEERS:
                assert peers.num_wrong(peers.WAYS[name]([str(path) for path in paths]), DRAWS) == 0, (name, form)


def test_a_wrong_frame_is_counted(files: dict[str, list[Path]]) -> None:
    opened = peers.open_pyav(str(files[data.VP9_256][0]))
    for start, drawn, num, count in ((6, (0, 7), 16, 16), (7, (0, 7), 15, 16), (7, (1, 7), 16, 16), (7, (0, 7), 16, 0)):
        clip = peers.read_pyav(opened, start)[:num]
        assert peers.num_wrong(lambda draws, clip=clip: [(*draws[0], clip)], [drawn]) == count  # type: ignore[misc]


@pytest.mark.parametrize(
    "executor",
    [lambda: ThreadPoolExecutor(1), pytest.param(process_of_its_own, marks=pytest.mark.thorough)],
    ids=["thread", "process"],
)
def test_rows_of_ways_that_read(
    executor: Callable[[], Executor], files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "process_of_its_own", executor)
    monkeypatch.setattr(data, "WAYS", dict.fromkeys(("rlv2v", "PyAV", "no.such.module")))
    monkeypatch.setattr(data, "PEERS", (*data.PEERS, "no.such.module"))
    bench = Bench("data", Args())
    with ExitStack() as stack:
        workers = data.start_workers(bench, stack, tmp_path)
        assert bench.missing == {"no.such.module": "ModuleNotFoundError: No module named 'no'"}
        ours, peer = data.reading_rows(data.VP9_256, files[data.VP9_256], workers, 2)
        assert ours["valid"] and peer["valid"] and set(ours["speedup_over"]) == {"PyAV", "best peer"}
        assert ours["ours"] and not peer["ours"]
        for row in (ours, peer):
            assert row["clips_per_s"] == pytest.approx(1e6 / row["median_us"], rel=0.01)
        (row,) = data.reading_rows(data.VP9_256, [tmp_path / "gone.mp4"] * 4, {"PyAV": workers["PyAV"]}, 1)
        assert not row["valid"] and "gone.mp4" in row["wrong_data"] and "clips_per_s" not in row


def test_prepared_raw_is_compared_with_valid_peers_on_the_original_files() -> None:
    names = ("backend", "case", "median_us", "valid", "ours")
    values = [("rlv2v", data.RAW, 2, True, True), ("PyAV", data.VP9_256, 100, True, False)]
    values += [("decord", data.VP9_256, 1, False, False), ("OpenCV", data.H264_256, 20, True, False)]
    values += [("PyAV", data.PREPARED, 1, True, False)]
    rows: list[dict[str, Any]] = [dict(zip(names, each, strict=True)) for each in values]
    data.compare_raw(rows)
    ratios = {"PyAV, unprepared VP9 256": 50, "OpenCV, unprepared H.264 256": 10, "best peer": 10}
    assert rows[0]["speedup_over"] == ratios


@pytest.mark.thorough
def test_index_wait_and_memory_rows(files: dict[str, list[Path]], tmp_path: Path) -> None:
    row = data.index_row(tmp_path / "index", files, 2)
    assert row["case"] == "index of 8 files of 32 frames" and row["plain_decode_ms"] > 0
    assert all(row[name] > 0 for name in ("first_over_second", "one_at_a_time_over_plain", "first_over_plain"))
    row = data.memory_row("a case", tmp_path / "index", data.NO_CACHE, (2, 4))
    assert row["steps"] == [2, 4] and 50 < row["rss_mib"][0] <= row["rss_mib"][1] * 1.1
    write_dataset(tmp_path / "synth", size=32, frames=8, seed=0, counts=Counts(16, 16, 16, 4, 1, 1))
    row = data.wait_row(tmp_path / "synth", tmp_path / "run", 11)
    assert row["steps"] == 10 and 0 < row["wait_ms"] < row["step_ms"]
    assert row["wait_percent"] == pytest.approx(100 * row["wait_ms"] / row["step_ms"], rel=0.1, abs=0.01)
