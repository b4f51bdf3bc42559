"""The schedule: what progress means, when the ramp starts, and that it goes on where it was saved."""

from __future__ import annotations

import pytest
import torch

from rlv2v.config import Config
from rlv2v.method.schedule import Schedule


def run(schedule: Schedule, steps: int, gap: float, *, whole_gap: float = 1.0, floor: float = 0.0) -> None:
    for _ in range(steps):
        schedule.measure(torch.tensor(whole_gap), torch.tensor(floor))
        schedule.advance(float(schedule.step + 1), torch.tensor(gap))


@pytest.mark.parametrize("config", [Config.of(steps=100), Config.of(budget=100.0)])
def test_progress_counts_steps_or_seconds(config: Config) -> None:
    schedule = Schedule(config)
    run(schedule, 25, 1.0)
    assert schedule.progress == pytest.approx(0.25) and schedule.lr_factor == 1.0
    run(schedule, 50, 1.0)
    assert schedule.lr_factor == pytest.approx(0.5)
    run(schedule, 50, 1.0)
    assert schedule.progress == 1.0 and schedule.lr_factor == 0.0


def test_the_ramp_follows_how_near_the_target_is() -> None:
    schedule = Schedule(Config.of(steps=1000, ramp_at=0.3, adversarial_end=0.4))
    run(schedule, 200, 0.5)
    assert schedule.ramp == 0.0 and schedule.gains == pytest.approx((1.0, 0.1))
    run(schedule, 30, 0.1)
    assert 0.0 < schedule.ramp < 0.2
    run(schedule, 200, 0.1)
    assert schedule.ramp == 1.0
    assert [gain.item() for gain in schedule.gains] == pytest.approx([0.4, 1.0])
    run(schedule, 50, 0.9)  # the content terms have pulled the translations back to the source: they loosen
    assert 0.7 < schedule.ramp < 1.0


def test_a_target_domain_that_varies_is_reached_at_its_own_spread() -> None:
    schedule = Schedule(Config.of(steps=100, ramp_at=0.3))
    run(schedule, 20, 0.5, floor=0.45)
    assert schedule.remaining_gap.item() == pytest.approx(0.05 / 0.55, rel=1e-5) and schedule.ramp > 0.0


def test_a_saved_schedule_goes_on() -> None:
    config = Config.of(steps=100)
    one, two = Schedule(config), Schedule(config)
    run(one, 30, 0.2)
    two.load_state_dict(one.state_dict())
    run(one, 10, 0.1)
    run(two, 10, 0.1)
    assert one.state_dict() == two.state_dict() and isinstance(two.step, int)
