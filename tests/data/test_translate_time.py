"""A translated video shows each frame when its source does, and its sound stays in step."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data_clips import write_frames
from flash_clips import AT, EVEN, FPS, LENGTH, TV, VARIABLE, beeps, flashes, write_flashes

from rlv2v.data.video import probe, timed_frames
from rlv2v.data.writer import VideoWriter, fine_tick
from rlv2v.report_video import source_fps
from rlv2v.translate import Args, main

SOUND = 0.02


def translate(run: Path, source: Path, out: Path, **options: object) -> Path:
    main(Args(run, source, out, **options))
    return out


def times_of(path: Path) -> list[float]:
    return [float(frame.time) for frame in timed_frames(path)]


def length_of(path: Path) -> float:
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        if video.duration:
            return float(video.duration * video.time_base)
        return container.duration / av.time_base - float(next(container.decode(video)).time)


def assert_in_step(out: Path, times: Sequence[Fraction], tolerance: float = 0.001) -> None:
    """Times are those of the source; flashes come with the first frame at or after 1 s and 3 s, beeps to 20 ms."""
    np.testing.assert_allclose(times_of(out), [float(t) for t in times], atol=tolerance)
    shown = [min(float(t) for t in times if t >= at) for at in AT]
    np.testing.assert_allclose(flashes(out), shown, atol=tolerance)
    np.testing.assert_allclose(beeps(out), AT, atol=SOUND)
    step = float(times[-1] - times[-2])
    assert length_of(out) == pytest.approx(float(times[-1]) + step, abs=0.5 * step)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("times", [EVEN, VARIABLE], ids=["even", "variable"])
def test_times_and_sound_are_kept(tiny_run: Path, tmp_path: Path, times: Sequence[Fraction], suffix: str) -> None:
    source = write_flashes(tmp_path / "in.mp4", times)
    assert_in_step(translate(tiny_run, source, tmp_path / f"out.{suffix}"), times)


@pytest.mark.parametrize(("name", "codec", "sound"), [("in.ts", "libx264", "aac"), ("in.vob", "mpeg2video", "mp2")])
def test_a_clock_that_does_not_start_at_zero(tiny_run: Path, tmp_path: Path, name: str, codec: str, sound: str) -> None:
    options: dict[str, Any] = {"codec": codec, "sounds": [sound], "rate": 25, "tick": Fraction(1, 25)}
    source = write_flashes(tmp_path / name, TV, start=Fraction(18, 5), **options)
    assert_in_step(translate(tiny_run, source, tmp_path / "out.mp4"), TV)


@pytest.mark.parametrize("starts", [(20, 5), (5, 600)], ids=["back", "forth"])
def test_a_clock_that_starts_anew(tiny_run: Path, tmp_path: Path, starts: tuple[int, int]) -> None:
    """Two transport streams put together by `cat`: the second clip follows the first, its sound in step with it."""
    parts = [write_flashes(tmp_path / f"{k}.ts", start=Fraction(k, FPS)) for k in starts]
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    out = translate(tiny_run, source, tmp_path / "out.mp4")
    np.testing.assert_allclose(times_of(out), np.arange(80) / FPS, atol=0.04)
    expected = [*AT, *(at + LENGTH for at in AT)]
    np.testing.assert_allclose(flashes(out), expected, atol=0.04)
    np.testing.assert_allclose(beeps(out), expected, atol=SOUND)


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_sound_that_changes_its_rate_on_the_way_is_encoded_on(tiny_run: Path, tmp_path: Path, suffix: str) -> None:
    """Two broadcasts put together, whose sound is encoded anew: each is heard."""
    parts = [
        write_flashes(tmp_path / f"{rate}.ts", start=Fraction(2), sounds=["mp2"], sample_rate=rate)
        for rate in (48_000, 32_000, 44_100)
    ]
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    out = translate(tiny_run, source, tmp_path / f"out.{suffix}")
    expected = [at + LENGTH * k for k in range(3) for at in AT]
    np.testing.assert_allclose(flashes(out), expected, atol=0.04)
    np.testing.assert_allclose(beeps(out), expected, atol=SOUND)


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_sound_that_pauses_or_starts_late_stays_in_step(tiny_run: Path, tmp_path: Path, suffix: str) -> None:
    """Copied into MP4, encoded anew for WebM."""
    for number, lacking in enumerate([(0.0, 0.8), (1.4, 2.7)]):
        source = write_flashes(tmp_path / f"in{number}.mp4", lacking=lacking)
        out = translate(tiny_run, source, tmp_path / f"out{number}.{suffix}")
        np.testing.assert_allclose(beeps(out), AT, atol=SOUND)


def test_rates_are_measured_where_the_header_lies(tiny_run: Path, tmp_path: Path) -> None:
    """A browser's WebM has no rate, and FFmpeg guesses 1000; a GIF has delays."""
    browser = write_flashes(tmp_path / "browser.webm", EVEN, codec="libvpx", sounds=["libopus"], rate=1000)
    gif = write_flashes(tmp_path / "a.gif", VARIABLE, codec="gif", sounds=[], tick=Fraction(1, 100))
    rates = source_fps(tmp_path, ["browser.webm", "a.gif"])
    average = (len(VARIABLE) - 1) / float(VARIABLE[-1])
    assert probe(browser).fps == FPS == rates["browser.webm"]
    assert float(probe(gif).fps) == pytest.approx(average, rel=1e-3) == float(rates["a.gif"])
    assert_in_step(translate(tiny_run, browser, tmp_path / "out.mp4"), EVEN)
    assert length_of(tmp_path / "out.mp4") == pytest.approx(LENGTH, abs=0.02)
    np.testing.assert_allclose(times_of(translate(tiny_run, gif, tmp_path / "gif.mp4")), times_of(gif), atol=0.001)


def test_fps_takes_the_frame_that_is_shown_then(tiny_run: Path, tmp_path: Path) -> None:
    source = write_flashes(tmp_path / "in.mp4", VARIABLE)
    out = translate(tiny_run, source, tmp_path / "out.mp4", fps=12.5)
    np.testing.assert_allclose(times_of(out), np.arange(50) / 12.5, atol=1e-6)
    shown = [next(k / 12.5 for k in range(50) if k / 12.5 >= at) for at in flashes(source)]
    np.testing.assert_allclose(flashes(out), shown, atol=1e-6)
    np.testing.assert_allclose(beeps(out), AT, atol=SOUND)


def test_fps_is_the_rate_of_a_folder_of_images(tiny_run: Path, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames", np.zeros((6, 16, 16, 3), np.uint8))
    out = translate(tiny_run, tmp_path / "frames", tmp_path / "out.mp4", fps=12)
    np.testing.assert_allclose(times_of(out), np.arange(6) / 12, atol=1e-6)


def test_a_writer_keeps_times_to_a_fine_tick(tmp_path: Path) -> None:
    assert fine_tick(Fraction(1, 25)) == Fraction(1, 1000) and fine_tick(Fraction(1, 12_800)) == Fraction(1, 12_800)
    assert fine_tick(Fraction(1001, 30_000)) == Fraction(1001, 1_020_000)
    for odd in (Fraction(1, 10**9), Fraction(574916848, 17), Fraction(2097217, 42)):
        assert fine_tick(odd) == Fraction(1, 90_000)
    with VideoWriter(tmp_path / "a.mp4", 25, tick=Fraction(1, 25)) as writer:
        for time in (Fraction(0), Fraction(1, 10), Fraction(7, 20)):
            writer.write(np.zeros((16, 16, 3), np.uint8), time, Fraction(1, 2))
    np.testing.assert_allclose(times_of(tmp_path / "a.mp4"), [0, 0.1, 0.35], atol=1e-6)
    assert length_of(tmp_path / "a.mp4") == pytest.approx(0.85), "the last frame has its duration"
