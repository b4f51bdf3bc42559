"""The schedule: what progress means, how the ramp rises, and that it goes on where it was saved."""

from __future__ import annotations

import pytest
import torch

from rlv2v.checkpoint.resume import load_states
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.schedule import Schedule

LENGTHS = [Config.of(steps=100), Config.of(budget=100.0)]


def run(schedule: Schedule, steps: int, distance: float | None = None) -> None:
    for _ in range(steps):
        schedule.advance(float(schedule.step + 1), None if distance is None else torch.tensor(distance))


@pytest.mark.parametrize("config", LENGTHS)
def test_progress_counts_steps_or_seconds(config: Config) -> None:
    schedule = Schedule(config)
    run(schedule, 25)
    assert schedule.progress == pytest.approx(0.25) and schedule.lr_factor == 1.0
    run(schedule, 50)
    assert schedule.lr_factor == pytest.approx(0.5)
    run(schedule, 50)
    assert schedule.progress == 1.0 and schedule.lr_factor == 0.0


@pytest.mark.parametrize("config", LENGTHS)
def test_the_ramp_rises_while_the_target_is_near_and_falls_while_it_is_not(config: Config) -> None:
    schedule = Schedule(config)
    ramp = schedule.ramp
    assert ramp == 0.0 and schedule.gain.item() == pytest.approx(0.1)
    run(schedule, 20, 5.0)
    assert ramp == 0.0, "as far as at the start"
    run(schedule, 27, 0.5)
    assert 0.5 < ramp < 1.0, "once the average has followed: 0.1 of the first distance"
    run(schedule, 15, 0.5)
    assert ramp == schedule.gain == 1.0
    run(schedule, 15, 5.0)
    assert 0.2 < ramp < 0.6, "it falls as it rose"
    assert schedule.ramp is ramp, "a recording reads this very tensor"


def test_what_came_before_the_first_step_does_not_raise_the_ramp() -> None:
    schedule = Schedule(Config.of(budget=100.0))
    schedule.seconds = 30.0  # of pre-training
    schedule.advance(31.0)
    assert schedule.ramp.item() == pytest.approx(0.01 / 0.2)


def test_a_run_that_starts_near_the_target_knows_how_far_an_earlier_one_was() -> None:
    schedule = Schedule(Config.of(steps=100))
    schedule.first.fill_(5.0)
    run(schedule, 20, 0.5)
    assert schedule.ramp == 1.0 and schedule.first == 5.0


def test_without_a_distance_the_ramp_follows_progress() -> None:
    schedule = Schedule(Config.of(steps=100))
    run(schedule, 5)
    assert schedule.ramp.item() == pytest.approx(0.25) and schedule.gain.item() == pytest.approx(0.325)
    run(schedule, 95)
    assert schedule.ramp == schedule.gain == 1.0


def test_a_saved_schedule_goes_on() -> None:
    config = Config.of(steps=100)
    one, two = Schedule(config), Schedule(config)
    run(one, 15, 3.0)
    two.load_state_dict(one.state_dict())
    assert two.ramp == one.ramp and two.ramp is not one.ramp
    run(one, 3, 0.1)
    run(two, 3, 0.1)
    assert one.state_dict() == two.state_dict() and isinstance(two.step, int)


@pytest.mark.parametrize("change", [{"gap": torch.zeros(())}, {"ramp": None}], ids=["more", "less"])
def test_a_schedule_of_another_version_is_refused_in_one_line(change: dict[str, torch.Tensor | None]) -> None:
    schedule = Schedule(Config.of(steps=100))
    state = {name: value for name, value in (schedule.state_dict() | change).items() if value is not None}
    message = "run: checkpoint 3: 'schedule' does not fit this run: expected step, seconds, ramp, first, distance, got "
    with pytest.raises(UserError, match=message) as error:
        load_states({"schedule": schedule}, {"schedule": state}, "run: checkpoint 3")
    assert "\n" not in str(error.value)
