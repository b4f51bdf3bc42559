"""The schedule: what progress means, when the ramp starts, and that it goes on where it was saved."""

from __future__ import annotations

import pytest

from rlv2v.config import Config
from rlv2v.schedule import LATEST, RAMP, START, Schedule


def run(schedule: Schedule, steps: int, gap: float) -> None:
    for _ in range(steps):
        schedule.advance(float(schedule.step + 1), gap)


@pytest.mark.parametrize("config", [Config.of(steps=100), Config.of(budget=100.0)])
def test_progress_counts_steps_or_seconds(config: Config) -> None:
    schedule = Schedule(config)
    run(schedule, 25, 1.0)
    assert schedule.progress == 0.25 and schedule.learning == 1.0
    run(schedule, 50, 1.0)
    assert schedule.learning == pytest.approx(0.5)
    run(schedule, 50, 1.0)
    assert schedule.progress == 1.0 and schedule.learning == 0.0


def test_the_ramp_waits_until_the_target_is_near() -> None:
    schedule = Schedule(Config.of(steps=1000, ramp_at=0.3, adversarial_end=0.4))
    run(schedule, 200, 0.5)
    assert schedule.ramp == 0.0 and schedule.gains == (1.0, START)
    run(schedule, 30, 0.1)
    assert 0.0 < schedule.ramp < 0.2
    run(schedule, int(1000 * RAMP), 0.5)  # once begun it goes on
    assert schedule.ramp == 1.0
    assert schedule.gains == pytest.approx((0.4, 1.0))


def test_the_ramp_comes_in_any_case() -> None:
    schedule = Schedule(Config.of(steps=100))
    run(schedule, int(100 * LATEST) - 1, 5.0)
    assert schedule.ramp == 0.0
    run(schedule, 40, 5.0)
    assert schedule.ramp == 1.0


def test_a_saved_schedule_goes_on() -> None:
    config = Config.of(steps=100)
    one, two = Schedule(config), Schedule(config)
    run(one, 30, 0.2)
    two.load_state_dict(one.state_dict())
    run(one, 10, 0.1)
    run(two, 10, 0.1)
    assert one.state_dict() == two.state_dict() and isinstance(two.step, int)
