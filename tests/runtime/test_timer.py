"""Tests of the step timer and of the run's log."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from rlv2v.runtime.log import RunLog, read_metrics
from rlv2v.runtime.timer import SECTIONS, StepTimer


def test_each_section_has_its_time_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        for seconds, section in ((2.0, "data"), (4.0, "generators"), (1.0, "data"), (8.0, "")):
            now += seconds
            timer.mark(section)
        timer.step()
    expected = dict.fromkeys((f"time_{section}" for section in SECTIONS), 0.0)
    assert timer.read() == expected | {"time_data": 3.0, "time_generators": 4.0}
    assert timer.read() == expected, "from one reading to the next"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_without_waiting_for_it() -> None:
    timer = StepTimer(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    timer.mark("")
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    timer.mark("generators")
    timer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert timer.read()["time_generators"] > 0


def test_frames_a_second_are_logged_when_time_has_passed(tmp_path: Path) -> None:
    """Several ranks hear the clock a step late, at first what it was before the first step."""
    with closing(RunLog(tmp_path, step=0, seconds=4.0, total=("step", 20.0), frames=30)) as log:
        for step, seconds in ((1, 4.0), (11, 6.0)):
            log.write(step, seconds, {"loss": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert "frames_per_second" not in first
    assert second["frames_per_second"] == 150.0


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 10, "loss": 2.0}\n{"step": 20, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 10], "a kill cut the last line off"
    with closing(RunLog(tmp_path, step=5, seconds=1.0, total=("step", 20.0), frames=30)) as log:
        log.write(6, 2.0, {"loss": 3.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 6]
