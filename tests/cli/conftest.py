"""What the tests of the commands share."""

from __future__ import annotations

import pytest
from commands import Command, run_in_process


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--lr", 1)` is `rlv2v train --lr 1` in this process: (exit code, stdout, stderr)."""
    return run_in_process(monkeypatch, capsys)
