"""Where the time goes: parts that add up to what has passed, and frames a second."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from rlv2v.runtime.log import RunLog, read_metrics
from rlv2v.runtime.timer import PARTS, StepTimer


def test_parts_add_up() -> None:
    clock = StepTimer(torch.device("cpu"))
    began = time.perf_counter()
    clock.mark("")
    for _ in range(2):
        time.sleep(0.02)
        clock.mark("data")
        time.sleep(0.04)
        clock.mark("generators")
        time.sleep(0.01)
        clock.mark("data")
        clock.step()
    time.sleep(0.03)
    clock.mark("")
    spent = clock.read()
    assert set(spent) == {f"time_{part}" for part in PARTS}
    assert spent["time_data"] == pytest.approx(0.03, abs=0.02) and spent["time_data"] >= 0.03
    assert spent["time_generators"] == pytest.approx(0.04, abs=0.02) and spent["time_generators"] >= 0.04
    assert 2 * sum(spent.values()) <= time.perf_counter() - began - 0.03, "what is booked nowhere is left out"
    assert not any(clock.read().values()), "from one reading to the next"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_by_events() -> None:
    clock = StepTimer(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    clock.mark("")
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    clock.mark("generators")
    clock.step()
    torch.cuda.set_sync_debug_mode("default")
    assert clock.read()["time_generators"] > 0


def test_frames_a_second_are_told_when_time_has_passed(tmp_path: Path) -> None:
    """Several ranks hear the clock a step late, at first what it was before the first step."""
    with closing(RunLog(tmp_path, step=0, seconds=4.0, total=("step", 20.0), frames=30)) as log:
        for step, seconds in ((1, 4.0), (11, 6.0)):
            log.write(step, seconds, {"loss": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert "frames_per_second" not in first
    assert second["frames_per_second"] == 150.0
