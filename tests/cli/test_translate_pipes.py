"""Streams: y4m on stdin and stdout of real processes, what ends them, and devices of libavdevice."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from commands import Command, refusal
from processes import finish, read_until, start

from rlv2v.checkpoint.export import load_translator
from rlv2v.data.damage import Faults
from rlv2v.data.live import open_live
from rlv2v.data.video import probe, read_frames, timed_frames
from rlv2v.data.y4m import Y4mWriter
from rlv2v.errors import UserError
from rlv2v.method.translation import Stream

HEADER = b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C420mpeg2 XYSCSS=420MPEG2 XCOLORRANGE=LIMITED\n"


def smooth(num: int, height: int, width: int) -> np.ndarray:
    """Return colourful frames (T,H,W,3) uint8 that a codec keeps well."""
    t, y, x = np.meshgrid(np.arange(num), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(y / height * 3 + t / 9), np.cos(x / width * 4 - t / 9), np.sin((x + y) / (height + width) * 5)]
    return np.round(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean distance of two clips, levels; a mix-up of BT.601 and BT.709 makes it several."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


@contextmanager
def stdout_to(file: Path | int) -> Iterator[None]:
    """Send this process's stdout, the descriptor, elsewhere."""
    sys.stdout.flush()
    saved = os.dup(1)
    descriptor = file if isinstance(file, int) else os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        os.dup2(descriptor, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(descriptor)


def write_y4m(path: Path, clip: np.ndarray, fps: int = 10, *, even: bool = True) -> bytes:
    with stdout_to(path), Y4mWriter(Fraction(fps), even=even) as writer:
        for frame in clip:
            writer.write(frame)
            print("not into the pipe", flush=True)
            os.write(1, b"nor this")
    return path.read_bytes()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (720, 128)])
def test_y4m_is_what_readers_expect(tmp_path: Path, height: int, width: int) -> None:
    clip = smooth(3, height, width)
    content = write_y4m(tmp_path / "a.y4m", clip)
    header = HEADER % (width, height, 10)
    assert content.startswith(header + b"FRAME\n")
    assert len(content) == len(header) + 3 * (6 + width * height * 3 // 2)
    frames = np.stack(list(read_frames(tmp_path / "a.y4m")))
    assert distance(frames, clip) < 2
    assert probe(tmp_path / "a.y4m").fps == 10


def test_y4m_of_odd_sides(tmp_path: Path) -> None:
    clip = smooth(2, 31, 47)
    write_y4m(tmp_path / "even.y4m", clip)
    assert (probe(tmp_path / "even.y4m").width, probe(tmp_path / "even.y4m").height) == (48, 32)
    content = write_y4m(tmp_path / "exact.y4m", clip, even=False)
    assert b" C444 " in content.partition(b"\n")[0]
    assert distance(np.stack(list(read_frames(tmp_path / "exact.y4m"))), clip) < 1.5


def test_a_reader_that_has_ended_is_one_line() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = "-: the program that reads stdout has ended after 0 frames"
    with stdout_to(writing), pytest.raises(UserError, match=words), Y4mWriter(Fraction(10)) as writer:
        writer.write(smooth(1, 16, 16)[0])


def test_from_stdin_to_stdout(strange_run: Path, tmp_path: Path) -> None:
    content = write_y4m(tmp_path / "in.y4m", smooth(4, 48, 64))
    process = subprocess.run(
        [sys.executable, "-m", "rlv2v.translate", str(strange_run), "-", "-"],
        input=content, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert b"-: 4 frames, 64x48, 10 fps" in process.stderr
    header = HEADER % (64, 48, 10)
    assert process.stdout.startswith(header) and len(process.stdout) == len(content)
    (tmp_path / "out.y4m").write_bytes(process.stdout)
    stream = Stream(*load_translator(strange_run))
    expected = np.stack([stream(frame) for frame in read_frames(tmp_path / "in.y4m")])
    assert distance(np.stack(list(read_frames(tmp_path / "out.y4m"))), expected) < 4
    assert distance(expected, smooth(4, 48, 64)) > 8, "the model must change the pictures, or this test says nothing"


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.webm", "libvpx-vp9"), ("a.gif", "gif")])
def test_containers_on_stdin(tmp_path: Path, name: str, codec: str) -> None:
    """What is read from the pipe of another program, frame by frame, is what is read from the file."""
    with av.open(str(tmp_path / name), "w") as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
        for frame in smooth(12, 48, 64):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    saved = os.dup(0)
    try:
        with subprocess.Popen(["cat", tmp_path / name], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            os.dup2(cat.stdout.fileno(), 0)
            video, frames = open_live(Path("-"), faults=(faults := Faults()))
            piped = list(frames)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    expected = list(timed_frames(tmp_path / name))
    assert (video.width, video.height, len(piped)) == (64, 48, 12) and faults.lines() == []
    for a, b in zip(piped, expected, strict=True):
        assert a.time == b.time and (a.rgb == b.rgb).all()


def test_a_signal_ends_a_wait_for_stdin(tiny_run: Path, tmp_path: Path) -> None:
    content = write_y4m(tmp_path / "in.y4m", smooth(4, 48, 64))
    out = tmp_path / "out.mp4"
    process = start("-m", "rlv2v.translate", tiny_run, "-", out, stdin=subprocess.PIPE)
    stdin, last = process.stdin, content.rindex(b"FRAME")
    assert stdin is not None
    stdin.buffer.write(content[:last])
    stdin.buffer.flush()
    read_until(process, "0frame")
    time.sleep(0.5)  # the bar is drawn anew at most ten times a second
    stdin.buffer.write(content[last:])
    stdin.buffer.flush()
    read_until(process, "[1-4]frame")
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    (code,), (err,) = finish(process)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err
    assert err.splitlines()[-1] == "rlv2v.translate: stopped by SIGTERM"
    assert [p.name for p in tmp_path.iterdir()] == ["in.y4m"]


def test_a_named_pipe_is_read_once(strange_run: Path, tmp_path: Path, command: Command) -> None:
    """A shell makes one of `<(command)`."""
    write_y4m(tmp_path / "in.y4m", smooth(4, 48, 64))
    os.mkfifo(pipe := tmp_path / "a: pipe")
    with subprocess.Popen(f"cat '{tmp_path / 'in.y4m'}' > '{pipe}'", shell=True):
        code, _, err = command("translate", strange_run, pipe, tmp_path / "piped.mp4", "--lossless")
    assert code == 0, err
    assert command("translate", strange_run, tmp_path / "in.y4m", tmp_path / "read.mp4", "--lossless")[0] == 0
    piped, read = (list(read_frames(tmp_path / f"{name}.mp4")) for name in ("piped", "read"))
    assert len(piped) == 4
    np.testing.assert_array_equal(piped, read)
    line = refusal(command("translate", strange_run, pipe, tmp_path / "out.mp4", "--resume"))
    assert f"--resume: {pipe} can be read once only" in line


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_wait_for_a_program_that_opens_the_pipe(
    tiny_run: Path, tmp_path: Path, command: Command, name: str
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    number = getattr(signal, name)
    waiting = threading.Timer(1, os.kill, (os.getpid(), number))
    waiting.start()
    code, printed, err = command("translate", tiny_run, pipe, tmp_path / "out.mp4")
    waiting.join()
    assert (code, printed, err) == (128 + number, "", f"rlv2v.translate: stopped by {name}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_device_is_read_and_its_frames_keep_their_times(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out.mp4"
    code, _, err = command(
        "translate", tiny_run, "testsrc=size=64x48:rate=10:duration=1", out, "--input-format", "lavfi"
    )
    assert code == 0, err
    assert [float(frame.time) for frame in timed_frames(out)] == pytest.approx([k / 10 for k in range(10)])


class Watcher(io.StringIO):
    """Take stderr, and press Ctrl-C as soon as the progress bar shows a frame."""

    pressed = False

    def write(self, text: str) -> int:
        """Take a text."""
        if not self.pressed and "frame [" in text and " 0frame" not in text:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_completes_the_recording_of_a_device(
    tiny_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.mp4"
    monkeypatch.setattr(sys, "stderr", said := Watcher())
    code, printed, _ = command("translate", tiny_run, "testsrc=size=64x48:rate=10", out, "--input-format", "lavfi")
    assert code == 0 and said.pressed and printed.startswith(f"{out}: "), said.getvalue()
    assert len(list(timed_frames(out))) == int(printed.split()[1]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_streams_that_cannot_be(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    np.save(tmp_path / "in.npy", smooth(2, 16, 16))
    flags = ("--input-format", "lavfo")
    assert "--input-format: this PyAV has no lavfo; did you mean lavfi?" in refusal(
        command("translate", tiny_run, "x", tmp_path / "a.mp4", *flags)
    )
    for flag in (("--codec", "h264"), ("--crf", 3), ("--lossless",)):
        assert f"{flag[0]}: y4m" in refusal(command("translate", tiny_run, tmp_path / "in.npy", "-", *flag))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").touch()
    assert "-: expected a folder" in refusal(command("translate", tiny_run, tmp_path / "in", "-"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "in.npy"]


def test_a_varying_rate_is_resampled_for_y4m(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    times = [0, 1, 2, 3, 7, 8, 9]
    with av.open(str(tmp_path / "in.mkv"), "w") as output:
        stream = output.add_stream("ffv1", rate=10, time_base=Fraction(1, 10))
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for time, frame in zip(times, smooth(len(times), 16, 16), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
            picture.pts, picture.time_base = time, Fraction(1, 10)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    for flags, rate, shown in (
        (("--fps", 10), Fraction(10), [0, 1, 2, 3, 3, 3, 3, 4, 5, 6]),
        ((), Fraction(20, 3), [0, 1, 3, 3, 3, 4, 6]),
    ):
        with stdout_to(tmp_path / "out.y4m"):
            code, _, err = command("translate", tiny_run, tmp_path / "in.mkv", "-", *flags)
        frames = list(read_frames(tmp_path / "out.y4m"))
        assert code == 0 and f"-: {len(shown)} frames, 16x16, " in err and len(frames) == len(shown)
        assert probe(tmp_path / "out.y4m").fps == rate
        same = [bool((a == b).all()) for a, b in pairwise(frames)]
        assert same == [a == b for a, b in pairwise(shown)]
        (tmp_path / "out.y4m").unlink()
