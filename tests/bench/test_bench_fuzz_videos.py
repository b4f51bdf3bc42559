"""bench/fuzz_videos.py: damaged videos are read or refused, and a child that crashes or hangs is found out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fuzz_videos
import pytest
from data_damage import NAMES, damaged, name_of
from fuzz_videos import Args, examine_all, main, make_originals

from rlv2v.data.index import index_folder
from rlv2v.errors import UserError

CHILD = """
import json, os, signal, sys, time
for line in sys.stdin:
    print("begin", line, end="", flush=True)
    if int(line) == 3:
        os.abort()
    if int(line) == 5:
        time.sleep(600)
    if int(line) == 6:
        os.kill(os.getpid(), signal.SIGXCPU)
    print(json.dumps({"index": "ok"}), flush=True)
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_originals(folder)
    return folder


def test_the_originals_are_whole(originals: Path) -> None:
    sources = index_folder(originals, frames=1)
    assert sorted(source.path.name for source in sources) == sorted(NAMES)
    assert [(s.path.name, s.reason) for s in sources if s.status != "ok"] == []


def test_a_number_decides_the_damage(originals: Path, tmp_path: Path) -> None:
    assert all(damaged(seed, originals, tmp_path)[0].name == name_of(seed) for seed in range(40))
    first = [(path.read_bytes(), done) for path, done in (damaged(seed, originals, tmp_path) for seed in range(40))]
    again = [(path.read_bytes(), done) for path, done in (damaged(seed, originals, tmp_path) for seed in range(40))]
    assert first == again and len({data for data, _ in first}) > 35
    same = sum(data == (originals / done.split(":")[0]).read_bytes() for data, done in first)
    assert same < 10, "nearly all are damaged"


def test_crashes_and_hangs_are_failures_of_their_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(fuzz_videos, "CHILD", tmp_path / "child.py")
    results = dict(examine_all(range(8), tmp_path, tmp_path, limit=5.0))
    assert sorted(results) == list(range(8))
    assert {seed for seed, result in results.items() if "failure" in result} == {3, 5, 6}
    assert results[3]["failure"].startswith("crash: exit code -6") and results[5]["failure"].startswith("hang: no")
    assert results[6]["failure"].startswith("hang: it takes the processor")


def test_a_run_goes_on_and_counts_by_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(fuzz_videos, "CHILD", tmp_path / "child.py")
    monkeypatch.setattr(fuzz_videos, "CHUNK", 3)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="1"):
        main(Args(files=4, json=out))
    with pytest.raises(SystemExit, match="1"):
        main(Args(files=2, limit=5.0, json=out, more=True))
    result = json.loads(out.read_text())
    *kinds, total = [row for row in result["rows"] if "failures" in row]
    assert (result["first"], result["files"], total["files"], total["ok"], total["failures"]) == (0, 6, 6, 4, 2)
    for row in kinds:
        seeds = [seed for seed in range(6) if Path(name_of(seed)).suffix == row["case"]]
        assert row["files"] == len(seeds) and row["failures"] == len({3, 5} & set(seeds)) == (not row["valid"])
    assert [row["case"] for row in result["rows"] if "failure" in row] == ["file 3", "file 5"]
    with pytest.raises(UserError, match="--more: expected a --json F"):
        main(Args(more=True, json=tmp_path / "none.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="the memory of a process is limited by POSIX alone")
def test_two_hundred_damaged_files_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Args(files=200, limit=120.0, json=tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["rows"][-1]["failures"] == 0
    *kinds, row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {kind["case"] for kind in kinds} == {Path(name).suffix for name in NAMES}
    assert row["files"] == sum(kind["files"] for kind in kinds) == 200
    assert min(row["ok"], row["truncated"], row["excluded"]) > 10, "the damage is of every degree"
