"""Every method from end to end: it trains, resumes to the bit, exports, translates, and is evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, refusal
from safetensors.torch import load_file

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import Config
from rlv2v.data.video import probe
from rlv2v.method.baselines import METHODS
from rlv2v.metrics.evaluation import evaluate_run
from rlv2v.runtime.log import read_metrics
from rlv2v.train import train

NAMES = [name for name in METHODS if name != "rlv2v"]
SMALL = {"widths": (2, 4), "disc_widths": (2, 3), "patch": 1}


def config_of(method: str, data: Path, out: Path, **changes: Any) -> Config:
    return Config.of("tiny", method, **SMALL | {"data": data, "out": out, "snapshot_seconds": 0.0} | changes)


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def states_of(run: Path) -> list[dict[str, Any]]:
    """What the newest checkpoint holds, but for the time that it took."""
    store = Checkpoints(run, keep=2, num_replicas=1)
    states = [store.load(store.steps[-1], name) for name in ("state", replica_name(0))]
    assert states[0]["schedule"].pop("seconds") > 0
    return states


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / request.param
    train(config_of(request.param, data, run))
    return run


def test_a_run_that_lost_its_last_step_makes_it_again_to_the_bit(data: Path, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "00000004")
    (run / "model.safetensors").unlink()
    train(config_of(trained.name, data, run, resume=True))
    assert same(states_of(run), states_of(trained))
    assert same(*(load_file(folder / "model.safetensors") for folder in (run, trained)))


def test_a_run_is_translated_and_evaluated(data: Path, trained: Path, tmp_path: Path, command: Command) -> None:
    lines = read_metrics(trained / "metrics.jsonl")
    assert lines[-1]["step"] == 4 and np.isfinite([*lines[-1].values()]).all()
    assert ("loss" in lines[-1]) == ("colour" not in trained.name), "a colour map has no loss"
    source = sorted((data / "testX").glob("*.mp4"))[0]
    for direction in ("x2y", "y2x"):
        out = tmp_path / f"{direction}.mp4"
        code, _, err = command("translate", trained, source, out, "--direction", direction)
        assert code == 0, err
        assert probe(out).num_frames == probe(source).num_frames
    row = evaluate_run(trained, data, "val", device="cpu", progress=False).rows["model"]
    assert row["psnr"] is not None and row["psnr"] > 0 and row["cycle_error"] is not None


def test_a_run_of_another_method_is_not_resumed(trained: Path, command: Command) -> None:
    other = next(name for name in METHODS if name != trained.name)
    line = refusal(command("train", "--resume", "--out", trained, "--method", other))
    expected = f"--method: the run in {trained} has {trained.name!r}, got {other!r}; leave it out or start a new run"
    assert line == f"rlv2v.train: {expected}"


def test_recycle_gan_needs_three_frames(data: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--preset", "tiny", "--method", "recycle-gan", "--frames", 2, "--data", data, "--out", tmp_path / "run")
    line = refusal(command("train", *flags))
    assert line == "rlv2v.train: --frames: expected at least 3 with --method recycle-gan, got 2"
