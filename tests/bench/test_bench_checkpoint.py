"""bench/checkpoint.py: it says what it measured, and sees a checkpoint that is not what the run held."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from rlv2v.config import PRESETS
from rlv2v.errors import UserError
from rlv2v.store import Checkpoints

pytestmark = pytest.mark.usefixtures("bench_folder", "one_thread")
SMALL = PRESETS["tiny"] | {"replay_capacity": 8}


def test_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("checkpoint")
    monkeypatch.setattr(bench, "CASES", {"small": SMALL})
    bench.main(bench.Args(case=("small",), folder=tmp_path, repeats=2, json=tmp_path / "out.json"))
    said = json.loads((tmp_path / "out.json").read_text())
    assert said == json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, peer = said["rows"]
    assert (ours["backend"], peer["backend"], said["bench"]) == ("rlv2v", "torch.save", "checkpoint")
    assert ours["valid"]
    assert ours["bytes"] > 8 * 2 * 16 * 16 * 3
    assert ours["percent_of_interval"] == pytest.approx(ours["median_us"] / 60e6 * 100, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(UserError, match="--case: expected some of small, got 'large'"):
        bench.main(bench.Args(case=("large",)))


def test_a_difference_is_seen(tmp_path: Path) -> None:
    bench = importlib.import_module("checkpoint")
    run, store = bench.Run(bench.Config(**SMALL)), Checkpoints(tmp_path, keep=1, num_replicas=1)
    assert len(run.replays["x"]) == 8
    assert not bench.same(store, run)
    store.save(1, run.state(), {0: run.replica()})
    store.wait()
    assert bench.same(store, run)
    with torch.no_grad():
        next(run.nets.q_y.parameters()).flatten()[0] += 1
    assert not bench.same(store, run)
