"""After an hour of frames at irregular times, pictures and sound of a translation are still where they were."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from flash_clips import beeps, flashes, write_flashes

from rlv2v.data.video import timed_frames
from rlv2v.translate import Args, main

LENGTH, NUM_CLICKS, SAMPLE_RATE = 3600, 30, 16000
"""Of the clip: seconds, flashes with a click, samples a second."""
PAUSE = (1803, 1843)
"""Seconds from and to which one of the clips has neither pictures nor sound."""


def clicks() -> list[float]:
    """Return the times of the clicks, one in each piece of the clip, the last one two seconds before the end."""
    rng, piece = np.random.default_rng(0), LENGTH / NUM_CLICKS
    early = [piece * number + float(rng.uniform(50, piece - 1)) for number in range(NUM_CLICKS - 1)]
    return [*early, LENGTH - 2.0]


def frame_times(at: list[float], pause: tuple[int, int]) -> tuple[Fraction, ...]:
    """Return the times of frames: 5 to 30 a second at random around each click, one every 5 to 20 s between them."""
    rng = np.random.default_rng(1)
    times = [0.0]
    for click in at:
        while times[-1] < click - 0.5 - 20:
            times.append(times[-1] + float(rng.uniform(5, 20)))
        times.append(click - 0.5)
        while times[-1] < click + 0.4:
            times.append(times[-1] + 1 / float(rng.uniform(5, 30)))
    times += list(np.arange(times[-1] + 0.2, LENGTH, 0.2))
    return tuple(Fraction(round(90 * 1000 * t), 90_000) for t in times if not pause[0] <= t < pause[1])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "rate", "start", "pause"),
    [
        ("irregular.mp4", 30, 0, (0, 0)),
        ("declares 240 a second.mkv", 240, 0, (0, 0)),
        ("starts at 100 s and pauses.mkv", 30, 100, PAUSE),
    ],
)
def test_an_hour_stays_in_step(
    tiny_run: Path, tmp_path: Path, name: str, rate: int, start: int, pause: tuple[int, int]
) -> None:
    at = clicks()
    times = frame_times(at, pause)
    options: dict[str, Any] = {"lacking": pause, "at": at, "length": LENGTH, "sample_rate": SAMPLE_RATE}
    options |= {"preset": "ultrafast", "rate": rate, "start": Fraction(start)}
    source, out = write_flashes(tmp_path / name, times, **options), tmp_path / "out.mp4"
    if rate == 240:
        with av.open(str(source)) as container:
            assert container.streams.video[0].average_rate == rate, "the header lies"
    main(Args(tiny_run, source, out))
    shown = [float(frame.time) for frame in timed_frames(out)]
    np.testing.assert_allclose(shown, [float(t) for t in times], atol=0.001)
    lit = [min(float(t) for t in times if t >= click) for click in at]
    np.testing.assert_allclose(flashes(out), lit, atol=0.001)
    np.testing.assert_allclose(beeps(out), at, atol=0.02)
    assert len(lit) == len(set(lit)) == NUM_CLICKS
    with av.open(str(out)) as container:
        video = container.streams.video[0]
        assert video.duration and float(video.duration * video.time_base) == pytest.approx(LENGTH, abs=0.3)
