"""A stopped translation that goes on gives the frames, times and sound that an uninterrupted one gives.

x264 is not the same to the bit from run to run, whatever it is given. So frames are compared where they are encoded
without loss; where they are not, up to the last cut, from which on x264 goes its own way.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from commands import Command, noise, refusal
from processes import finish, read_until, start
from resume_cases import NUM, PIECE, assert_same, listing, strange_nets, wave_clip, write_source

from rlv2v.checkpoint.export import load_translator
from rlv2v.config import Config
from rlv2v.data.images import read_image, write_image
from rlv2v.data.video import timed_frames
from rlv2v.data.writer import VideoWriter, write_clip
from rlv2v.method.translation import Stream

CASES = [
    ("out.mp4", ()),
    ("out.mov", ("--fps", 12.5, "--side-by-side")),
    ("out.mkv", ("--codec", "hevc", "--no-audio")),
    ("out.webm", ()),
    ("out.mp4", ("--codec", "av1", "--crf", 40)),
    ("out.mp4", ("--lossless", "--size", 24)),
    ("out.mkv", ("--codec", "ffv1")),
    ("images/%03d.png", ()),
]


@pytest.mark.parametrize(("out", "flags"), CASES, ids=[f"{out[-4:]}{''.join(map(str, flags))}" for out, flags in CASES])
def test_stopped_twice_it_is_as_if_nothing_had_happened(
    strange_run: Path, tmp_path: Path, command: Command, stop_after: Callable[[int], None], out: str, flags: tuple[Any]
) -> None:
    source = write_source(tmp_path / "in.mkv")
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    arguments = ("translate", strange_run, source)
    assert command(*arguments, tmp_path / "whole" / out, *flags)[0] == 0
    resumed = tmp_path / "resumed" / out
    place = resumed.parent if "%" in out else resumed
    stop_after(1)
    code, _, err = command(*arguments, resumed, *flags)
    assert code == 128 + signal.SIGTERM
    line = f"rlv2v.translate: stopped by SIGTERM; {PIECE} frames are kept: --resume goes on, --overwrite starts over"
    assert err.splitlines()[-1] == line
    assert listing(tmp_path / "resumed") == [f".resume-{place.name}"]
    stop_after(1)
    code, _, err = command(*arguments, resumed, *flags, "--resume")
    assert code == 128 + signal.SIGTERM and f"; {2 * PIECE} frames are kept" in err.splitlines()[-1]
    code, printed, err = command(*arguments, resumed, *flags, "--resume")
    assert code == 0, err
    assert f"{resumed}: {len(list(timed_frames(place)))} frames, " in printed
    assert listing(tmp_path / "resumed") == [place.name]
    lossless = "%" in out or "ffv1" in flags or "--lossless" in flags
    assert_same(place, tmp_path / "whole" / (out.split("/")[0]), lossless=lossless, cuts=2 if "--fps" in flags else 3)
    times, expected = ([float(f.time) for f in timed_frames(path)] for path in (place, source))
    if not place.is_dir() and "--fps" not in flags:
        np.testing.assert_allclose(times, expected, atol=0.005)


def test_the_frames_are_those_of_the_model_alone(
    strange_run: Path, tmp_path: Path, command: Command, stop_after: Callable[[int], None]
) -> None:
    """Neither the cuts nor the stop change a frame: FFV1 gives back what the network gave."""
    source, out = write_source(tmp_path / "in.mkv"), tmp_path / "out.mkv"
    stream = Stream(*load_translator(strange_run))
    expected = [stream(frame.rgb) for frame in timed_frames(source)]
    stop_after(2)
    assert command("translate", strange_run, source, out, "--codec", "ffv1")[0] == 128 + signal.SIGTERM
    assert command("translate", strange_run, source, out, "--codec", "ffv1", "--resume")[0] == 0
    np.testing.assert_array_equal([frame.rgb for frame in timed_frames(out)], expected)


@pytest.mark.parametrize("head", ["grid", "mask"])
def test_a_stream_goes_on_from_a_snapshot_to_the_bit(head: str) -> None:
    config = Config.of("tiny", head=head)
    g = strange_nets(config).g_y.eval()
    frames = noise(9, 24, 32)
    one = Stream(g, config)
    expected = [one(frame) for frame in frames]
    first, second = Stream(g, config), Stream(g, config)
    for frame in frames[:5]:
        first(frame)
    second.restore(first.snapshot(), frames[0])
    assert (Stream(g, config)(frames[5]) != expected[5]).any(), "the state must count, or this test says nothing"
    np.testing.assert_array_equal([second(frame) for frame in frames[5:]], expected[5:])
    with pytest.raises(ValueError, match="another size"):
        Stream(g, config, size=40).restore(first.snapshot(), noise(1, 48, 40)[0])


def test_what_was_to_be_replaced_is_replaced(
    tiny_run: Path, tmp_path: Path, command: Command, stop_after: Callable[[int], None]
) -> None:
    source = write_source(tmp_path / "in.mkv")
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "000.png", noise(1)[0])
    (tmp_path / "out.mp4").write_bytes(b"old")
    for out in ("out.mp4", "images/%03d.png"):
        arguments = ("translate", tiny_run, source, tmp_path / out)
        stop_after(1)
        assert command(*arguments, "--overwrite")[0] == 128 + signal.SIGTERM
        assert "was stopped" in refusal(command(*arguments))
        assert command(*arguments, "--resume")[0] == 0
        assert command(*arguments, "--resume")[1] == f"{tmp_path / out}: exists already, skipped\n"
    assert len(list(timed_frames(tmp_path / "out.mp4"))) == len(listing(tmp_path / "images")) == NUM
    assert read_image(tmp_path / "images" / "000.png").shape == (64, 64, 3)


def test_an_error_keeps_what_was_done_and_says_so(
    tiny_run: Path,
    tmp_path: Path,
    command: Command,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, out = write_source(tmp_path / "in.mkv"), tmp_path / "out.mp4"
    write, count = VideoWriter.write, [0]

    def full(self: VideoWriter, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == 20:
            raise OSError(28, "No space left on device", str(self.path))
        write(self, *arguments)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(VideoWriter, "write", full)
        assert "No space left" in refusal(command("translate", tiny_run, source, out))
    assert f"{out}: {PIECE} frames are kept: --resume goes on, --overwrite starts over" in caplog.messages
    assert command("translate", tiny_run, source, out, "--resume")[0] == 0


def test_of_many_videos_the_finished_are_skipped_and_the_stopped_goes_on(
    tiny_run: Path,
    tmp_path: Path,
    command: Command,
    stop_after: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    videos, out, whole = (tmp_path / name for name in ("videos", "out", "whole"))
    videos.mkdir()
    for name, num in (("a", 5), ("b", 40), ("c", 3)):
        write_clip(videos / f"{name}.mkv", np.stack(wave_clip(num)), 25)
    stop_after(2)
    code, _, err = command("translate", tiny_run, videos, out)
    assert code == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == f"{out}: stopped by SIGTERM; --resume goes on with the rest"
    assert listing(out) == [".resume-b.mp4", "a.mp4"]
    time = (out / "a.mp4").stat().st_mtime_ns
    line = refusal(command("translate", tiny_run, videos, out, "--skip-existing"))
    assert f"{out}: was stopped: {out / 'b.mp4'}; --resume goes on" in line
    code, printed, err = command("translate", tiny_run, videos, out, "--resume")
    assert code == 0 and printed.splitlines()[-1] == "2 translated, 1 skipped, 0 failed", err
    assert f"{out / 'b.mp4'}: going on after 24 frames" in caplog.messages
    assert (out / "a.mp4").stat().st_mtime_ns == time
    assert command("translate", tiny_run, videos, whole)[0] == 0
    assert listing(out) == listing(whole) == ["a.mp4", "b.mp4", "c.mp4"]
    for name in listing(out):
        assert_same(out / name, whole / name, lossless=False, cuts=0)


def test_a_writer_without_tracks_goes_on_in_step(tmp_path: Path) -> None:
    """Times that repeat or run back at a cut are put right as they are within a piece."""
    times = [Fraction(k, 10) for k in (0, 1, 2, 2, 3, 3, 3, 4, 5)]
    frames, position = wave_clip(len(times)), None
    (tmp_path / "keep").mkdir()
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "b.mp4", 10, keep=tmp_path / "keep") as writer:
        for k, (frame, time) in enumerate(zip(frames, times, strict=True)):
            if k in (3, 6):
                position = writer.cut(time)
            writer.write(frame, time)
        raise RuntimeError
    with VideoWriter(tmp_path / "b.mp4", 10, keep=tmp_path / "keep", position=position) as writer:
        for frame, time in zip(frames[6:], times[6:], strict=True):
            writer.write(frame, time)
    assert writer.count == len(times)
    got = [float(frame.time) for frame in timed_frames(tmp_path / "b.mp4")]
    np.testing.assert_allclose(got, [k / 10 for k in range(9)], atol=0.001)
    with av.open(str(tmp_path / "b.mp4")) as container:
        dts = [packet.dts or 0 for packet in container.demux(video=0) if packet.size]
    assert all(first < second for first, second in pairwise(dts))


LONGER_PIECES = "import sys; from rlv2v import cli, translate_file; translate_file.PIECE = 96; cli.main()"


@pytest.mark.thorough
def test_killed_twice_it_is_as_if_nothing_had_happened(strange_run: Path, tmp_path: Path) -> None:
    """SIGKILL leaves a half file and a lock besides."""
    source, out, whole = write_source(tmp_path / "in.mkv", 300), tmp_path / "out.mp4", tmp_path / "whole.mp4"
    arguments = ("-c", LONGER_PIECES, "translate", strange_run, source, "--lossless")
    assert finish(start(*arguments, whole))[0] == [0]
    first = start(*arguments, out)
    read_until(first, r" 1\d\dframe")
    first.kill()
    finish(first)
    assert {".resume-out.mp4", ".lock-out.mp4"} < {*listing(tmp_path)}
    second = start(*arguments, out, "--resume")
    read_until(second, r" 2[0-8]\dframe")
    second.kill()
    finish(second)
    codes, errors = finish(start(*arguments, out, "--resume"))
    assert codes == [0] and "out.mp4: going on after 192 frames" in errors[0]
    assert_same(out, whole, lossless=True, cuts=0)
    assert listing(tmp_path) == ["in.mkv", "out.mp4", "strange", "whole.mp4"]
