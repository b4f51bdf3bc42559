"""A time that is damaged (2^62, a day too late, before the start) makes no video endless."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from data_clips import numbers_of
from odd_files import NUM, write

from rlv2v.data.clock import MAX_FPS, MAX_GAP, MIN_FPS, Clock, measured_rate, without_leaps
from rlv2v.data.index import index_folder
from rlv2v.data.prepare.convert import survey_source
from rlv2v.data.video import probe, resampled, timed_frames
from rlv2v.data.writer import VideoWriter

DAY = 24 * 3600


def leaping(path: Path) -> Path:
    """Write a video of 10 frames a second whose frames from 7 on are a day late; ticks of 1/100 s."""
    return write(path, "ffv1", "bgr0", times=[10 * k + 100 * DAY * (k >= 7) for k in range(NUM)])


def test_one_wrong_time_does_not_move_the_frames_after_it(tmp_path: Path) -> None:
    """Muxers refuse times that run back, so that the frames are made here."""
    with av.open(str(leaping(tmp_path / "leap.mkv"))) as container:
        clock, times = Clock(container.streams.video[0]), []
        for pts in (-5000, -4900, 2**62, -4700, -(2**62), None, -4400):
            frame = av.VideoFrame(16, 16, "gray")
            frame.pts = pts
            times.append(float(clock.time_of(frame)))
    np.testing.assert_allclose(times, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], atol=0.101)
    assert (np.diff(times) > 0).all()


def test_a_leap_in_the_times_is_closed(tmp_path: Path) -> None:
    path = leaping(tmp_path / "leap.mkv")
    frames = list(timed_frames(path))
    assert numbers_of(frame.rgb for frame in frames) == list(range(NUM))
    np.testing.assert_allclose([float(f.time) for f in frames], np.arange(NUM) / 10, atol=0.05)
    assert all(0 < frame.duration <= MAX_GAP for frame in frames)
    assert sum(1 for _ in resampled(iter(frames), Fraction(10))) in (NUM - 1, NUM, NUM + 1)
    assert probe(path).fps == pytest.approx(10, rel=0.2)
    (source,) = index_folder(tmp_path, frames=1)
    assert (source.num_frames, source.status) == (NUM, "ok") and source.fps == pytest.approx(10, rel=0.2)
    for fps in (None, 1000.0):
        item, _ = survey_source(path, fps)
        assert item.usable and item.frames < 3 * NUM * (fps or 10) / 10


def test_times_without_a_leap_are_not_touched() -> None:
    seconds = np.cumsum(np.random.default_rng(0).uniform(0.01, MAX_GAP - 1, 50))
    assert without_leaps(seconds, 0.1) is seconds
    leap = np.where(np.arange(50) < 20, seconds, seconds + 2.0**62)
    np.testing.assert_allclose(np.diff(without_leaps(leap[:21], 0.1))[:19], np.diff(seconds)[:19])
    assert without_leaps(leap[:21], 0.1)[20] == pytest.approx(seconds[19] + 0.1)


def test_a_rate_is_never_above_what_a_video_may_have() -> None:
    assert measured_rate(np.arange(9) * 1e-6, None) == MAX_FPS
    assert measured_rate(np.array([0, 2.0**62, 2.0**63]), Fraction(10)) == 10


@pytest.mark.parametrize(("scale", "rate"), [(574916848, 17), (2097217, 42)])
def test_a_rate_of_less_than_a_frame_an_hour_is_none(tmp_path: Path, scale: int, rate: int) -> None:
    """Damage writes such a rate, and with it a clock of which a frame is a tick."""
    path = write(tmp_path / "a.avi", "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    place = data.index(b"vidsMJPG") + 20
    assert struct.unpack_from("<II", data, place)[1] % 10 == 0
    struct.pack_into("<II", data, place, scale, rate)
    path.write_bytes(data)
    assert 0 < rate / scale < MIN_FPS
    video, frames = probe(path), list(timed_frames(path))
    assert video.fps == 25 and video.tick == Fraction(scale, rate)
    assert [frame.time for frame in frames] == [Fraction(k, 25) for k in range(len(frames))] and len(frames) >= NUM
    with VideoWriter(tmp_path / "out.mp4", video.fps, tick=video.tick) as writer:
        for frame in frames:
            writer.write(frame.rgb, frame.time, frame.duration)
    got = [float(frame.time) for frame in timed_frames(tmp_path / "out.mp4")]
    np.testing.assert_allclose(got, np.arange(len(frames)) / 25, atol=0.001)
