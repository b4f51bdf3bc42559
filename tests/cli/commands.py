"""Commands run in the test's own process: a start of torch in another one costs seconds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from rlv2v import cli

Command = Callable[..., tuple[int, str, str]]


def run_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the console script with its arguments: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlv2v", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the module is imported already
                cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def refusal(result: tuple[int, str, str]) -> str:
    """Return the one line that a command wrote for a mistake of the user's."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("rlv2v")]
    assert code == 2 and "Traceback" not in err and len(lines) == 1, err
    return lines[0]


def noise(t: int = 6, h: int = 16, w: int = 16, seed: int = 0) -> np.ndarray:
    """Return random frames (T,H,W,3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)
