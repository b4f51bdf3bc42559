"""What the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Command, run_in_process

from rlv2v.data.synth import Counts, write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set of the tiny preset's size and clip length."""
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=3))
    return out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--lr", 1)` is `rlv2v train --lr 1` in this process: (exit code, stdout, stderr)."""
    return run_in_process(monkeypatch, capsys)
