"""Where the time goes: parts that add up to what has passed."""

from __future__ import annotations

import time

import pytest
import torch

from rlv2v.timing import PARTS, Clock


def test_parts_add_up() -> None:
    clock = Clock(torch.device("cpu"))
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
    clock = Clock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    clock.mark("")
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    clock.mark("generators")
    clock.step()
    torch.cuda.set_sync_debug_mode("default")
    assert clock.read()["time_generators"] > 0
