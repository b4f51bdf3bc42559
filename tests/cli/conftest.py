"""What the tests of the commands share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, run_in_process
from resume_cases import PIECE, write_strange_run

from rlv2v import translate_file
from rlv2v.translate_resume import Work


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--lr", 1)` is `rlv2v train --lr 1` in this process: (exit code, stdout, stderr)."""
    return run_in_process(monkeypatch, capsys)


@pytest.fixture
def strange_run(tmp_path: Path) -> Path:
    """A run whose model changes every picture; untrained, it would keep them."""
    return write_strange_run(tmp_path / "strange")


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_after(n)`: after the n-th time that work is saved, this process gets SIGTERM; pieces are short."""
    save, left = Work.save, [0]

    def save_and_stop(self: Work, *arguments: Any) -> None:
        save(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Work, "save", save_and_stop)
    monkeypatch.setattr(translate_file, "PIECE", PIECE)

    def arm(saves: int) -> None:
        left[0] = saves

    return arm
