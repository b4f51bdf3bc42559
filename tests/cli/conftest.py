"""What the tests of the commands share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, run_in_process
from resume_cases import PIECE, strange_nets

from rlv2v import translate_file
from rlv2v.checkpoint.export import pack_translators
from rlv2v.config import Config
from rlv2v.translate_resume import Work


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--lr", 1)` is `rlv2v train --lr 1` in this process: (exit code, stdout, stderr)."""
    return run_in_process(monkeypatch, capsys)


@pytest.fixture
def strange_run(tmp_path: Path) -> Path:
    """A run whose model changes every picture; untrained, it would keep them."""
    (run := tmp_path / "strange").mkdir()
    nets = strange_nets(config := Config.of("tiny", out=run))
    (run / "config.json").write_text(config.to_json())
    (run / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    return run


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
