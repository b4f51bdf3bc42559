"""Runs on crops of unequal sides, from end to end: they train, resume to the bit, translate, and are shown as such."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from commands import Command, noise, refusal

from rlv2v.checkpoint.resume import settle
from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import Config
from rlv2v.crop_size import CropSize
from rlv2v.data.video import probe
from rlv2v.data.writer import write_clip
from rlv2v.flags import as_typed, resolve
from rlv2v.method.baselines import METHODS
from rlv2v.method.translation import Stream
from rlv2v.train import train

SMALL: dict[str, Any] = {"size": "16x24", "snapshot_seconds": 0.0, "warmup_steps": 1, "rl_every": 1}
CASES: dict[str, dict[str, Any]] = {
    "grid": {},
    "mask": {"head": "mask", "contrast": 1.0, "mask_prior": 1.0},
    **{name: {"method": name, "patch": 1, "disc_widths": (2, 3)} for name in METHODS if name != "rlv2v"},
}


def config_of(case: str, data: Path, out: Path, **changes: Any) -> Config:
    return Config.of("tiny", **{"data": data, "out": out} | SMALL | CASES[case] | changes)


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


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp("runs") / request.param
    train(config_of(request.param, data, run, steps=2))
    return request.param, run


def test_it_trains_resumes_to_the_bit_and_translates(
    data: Path, trained: tuple[str, Path], tmp_path: Path, command: Command
) -> None:
    case, first = trained
    run = shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "00000002")
    assert command("train", "--resume", "--out", run)[0] == 0
    assert same(states_of(run), states_of(first))
    assert json.loads((run / "config.json").read_text())["data"]["size"] == "16x24"
    _, replica = states_of(first)
    assert replica["loader"]["size"] == "16x24"
    if case in ("grid", "mask"):
        assert replica["replay_x"]["frame_shape"] == [16, 24, 3]
    sheet = cv2.imread(str(first / "samples" / "00000002.png"))
    assert sheet.shape == (6 * 16, 4 * 24, 3), "two clips of 4 frames: source, translation, truth"
    write_clip(tmp_path / "in.mp4", noise(5, 30, 40), 8)
    assert command("translate", first, tmp_path / "in.mp4", tmp_path / "out.mp4")[0] == 0
    out = probe(tmp_path / "out.mp4")
    assert (out.width, out.height, out.num_frames) == (40, 30, 5)


@pytest.mark.parametrize("size", ["16x24", "24x16"])
def test_a_whole_frame_is_shown_with_the_short_side_of_the_crops(size: str) -> None:
    """A 40x30 frame becomes 21x16 for a network that paints, padded to multiples of 8."""
    config, seen = config_of("mask", Path(), Path(), size=size).check(), []
    g = METHODS["rlv2v"].generators(config).g_y
    g.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    assert Stream(g, config)(noise(1, 30, 40)[0]).shape == (30, 40, 3)
    assert Stream(g, config)(noise(1, 40, 30)[0]).shape == (40, 30, 3)
    assert seen == [(1, 1, 3, 16, 24), (1, 1, 3, 24, 16)]


def test_the_report_names_the_size(data: Path, tmp_path: Path, command: Command) -> None:
    train(config_of("colour-map", data, tmp_path / "run", steps=2))
    code, _, err = command("report", tmp_path / "run", "--clips", 1)
    assert code == 0, err
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "16x24, 4 frames" in page and ">16x24<" in page


def test_a_size_survives_its_file_and_a_square_is_the_number_that_it_was() -> None:
    wide = Config.of("tiny", size="96x160").check()
    assert Config.from_json(wide.to_json(), "config") == wide and as_typed(wide.data.size) == "96x160"
    square = Config.of("tiny", size="64x64").check()
    assert square == Config.of("tiny", size=64) == Config.of("tiny", size=CropSize(64, 64))
    assert square == resolve({"preset": "tiny", "data": {"size": "64"}})
    values = json.loads(square.to_json())
    assert values["data"]["size"] == 64 and isinstance(values["data"]["size"], int)
    assert Config.from_json(json.dumps(values), "config") == square


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        *(
            (f"--size {typed}", f"--size: expected SIDE|HEIGHTxWIDTH, got {typed!r}")
            for typed in ("64x", "x64", "64x64x3", "64X96", "-64x64", "big", "123456")
        ),
        ("--size 0x64", "--size: expected at least 8 pixels a side, got 0x64"),
        ("--size 4", "--size: expected at least 8 pixels a side, got 4"),
        (
            "--size 20x24",
            "--size: expected a multiple of 8 (patch * 2 ** number of widths): 16 or 24 high and 24 wide, got 20x24",
        ),
        ("--size 16x24 --augment dihedral", "--augment: expected none or flip with --size 16x24, got 'dihedral'"),
    ],
)
def test_what_cannot_be_is_one_line(data: Path, tmp_path: Path, flags: str, line: str, command: Command) -> None:
    arguments = ("train", "--preset", "tiny", "--data", data, "--out", tmp_path / "run", *flags.split())
    assert refusal(command(*arguments)) == f"rlv2v.train: {line}"


def test_another_size_is_another_run(trained: tuple[str, Path], command: Command) -> None:
    line = refusal(command("train", "--resume", "--out", trained[1], "--size", 16))
    assert line == f"rlv2v.train: --size: the run in {trained[1]} has 16x24, got 16; leave it out or start a new run"


def test_prepare_takes_the_same_sizes(tmp_path: Path, command: Command) -> None:
    (tmp_path / "src").mkdir()
    write_clip(tmp_path / "src" / "a.mp4", noise(3, 60, 40), 8)
    assert command("prepare", tmp_path / "src", tmp_path / "out", "--size", "16x24", "--jobs", 1)[0] == 0
    (made,) = (tmp_path / "out" / "trainX").glob("*.npy")
    assert np.load(made).shape == (3, 36, 24, 3)
    line = refusal(command("prepare", tmp_path / "src", tmp_path / "out", "--size", "16x"))
    assert line == "rlv2v.prepare: --size: expected SIDE|HEIGHTxWIDTH, got '16x'"


def test_the_synthetic_set_has_the_long_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settle(Config.of("tiny", size="16x24", out=tmp_path / "run"), 1)
    assert config.data.folder == Path("data/synth-24x4")
    clip = probe(next((config.data.folder / "trainX").iterdir()))
    assert (clip.width, clip.height) == (24, 24)
