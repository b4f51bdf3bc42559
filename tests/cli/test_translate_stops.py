"""What stops a translation leaves one line and no files, and what writes into one output writes alone."""

from __future__ import annotations

import fcntl
import io
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Command, refusal

from rlv2v.data.video import probe
from rlv2v.errors import UserError
from rlv2v.files import output_lock

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Watcher(io.StringIO):
    """Take stderr, and send this process a signal as soon as the progress bar shows a frame."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number: int | None = number

    def write(self, text: str) -> int:
        """Take a text."""
        if self._number is not None and "/500 " in text and "0/500 " not in text:
            number, self._number = self._number, None
            signal.raise_signal(number)
        return super().write(text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A long source in a folder of its own."""
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.zeros((500, 16, 16, 3), np.uint8))
    return tmp_path / "in" / "a.npy"


@pytest.mark.parametrize("out", ["out.mp4", "images/%d.png"])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_one_line_and_leaves_nothing(
    tiny_run: Path, source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, out: str
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "stderr", said := Watcher(number))
    code, printed, _ = command("translate", tiny_run, source, tmp_path / out)
    assert code == 128 + number and printed == ""
    assert said.getvalue().splitlines()[-1] == f"rlv2v.translate: stopped by {name}"
    assert "Traceback" not in said.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert signal.getsignal(number) is before


def test_of_many_videos_those_that_are_done_stay(
    tiny_run: Path, source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(source.with_name("A.npy"), np.zeros((3, 16, 16, 3), np.uint8))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", said := Watcher(signal.SIGTERM))
        code, printed, _ = command("translate", tiny_run, source.parent, out)
    assert code == 128 + signal.SIGTERM and printed.startswith(f"{out / 'A.mp4'}: 3 frames")
    line = said.getvalue().splitlines()[-1]
    assert line == f"{out}: stopped by SIGTERM; --resume goes on with the rest"
    assert [p.name for p in out.iterdir()] == ["A.mp4"]
    source.unlink()
    code, printed, _ = command("translate", tiny_run, source.parent, out, "--skip-existing")
    assert code == 0 and printed == "0 translated, 1 skipped, 0 failed\n"


def test_a_second_run_into_one_output_is_refused(
    tiny_run: Path, source: Path, tmp_path: Path, command: Command
) -> None:
    np.save(source, np.zeros((3, 16, 16, 3), np.uint8))
    for out, place in (("out.mp4", "out.mp4"), ("images/%d.png", "images")):
        with output_lock(tmp_path / place):
            half = tmp_path / f".partial-1-{place}"
            half.touch()
            line = refusal(command("translate", tiny_run, source, tmp_path / out))
            assert f"{tmp_path / place}: another run is writing it (pid " in line
            assert half.exists(), "it is the first run's"
            half.unlink()
        assert command("translate", tiny_run, source, tmp_path / out)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "in", "out.mp4"]


def test_what_a_kill_left_is_removed(tiny_run: Path, source: Path, tmp_path: Path, command: Command) -> None:
    np.save(source, np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / ".partial-12-out.mp4").touch()
    (tmp_path / ".lock-out.mp4").touch()
    others = [tmp_path / name for name in (".partial-12-b-out.mp4", ".partial-out.mp4", ".partial-1-out.mp4x")]
    for other in others:
        other.touch()
    assert command("translate", tiny_run, source, tmp_path / "out.mp4")[0] == 0
    assert probe(tmp_path / "out.mp4").num_frames == 3
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "in", tmp_path / "out.mp4"}
    (tmp_path / ".partial-12-images").mkdir()
    (tmp_path / ".partial-12-images" / "0.png").touch()
    assert command("translate", tiny_run, source, tmp_path / "images" / "%d.png")[0] == 0
    assert not (tmp_path / ".partial-12-images").exists()


def test_a_lock_counts_only_if_its_file_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of a lock's file and its locking, the holder ends and removes it."""
    out, path, flock = tmp_path / "out", tmp_path / ".lock-out", fcntl.flock

    def late(*arguments: object) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with output_lock(out), pytest.raises(UserError, match="another run is writing it"), output_lock(out):
        pass
    assert not list(tmp_path.iterdir())
