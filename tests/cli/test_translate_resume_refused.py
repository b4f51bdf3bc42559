"""What is kept of a stopped translation is lost by no mistake, damage or change, each of which is one line."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from commands import Command, refusal
from resume_cases import assert_same, listing, wave_clip, write_source

from rlv2v.checkpoint.export import pack_translators
from rlv2v.config import Config
from rlv2v.data.writer import write_clip
from rlv2v.model.build import build_nets


@pytest.fixture
def stopped(
    tiny_run: Path, tmp_path: Path, command: Command, stop_after: Callable[[int], None]
) -> tuple[Path, Path, Path]:
    """A run, a source and an output that was stopped after a piece."""
    run, source, out = tmp_path / "run", tmp_path / "in.mkv", tmp_path / "out.mp4"
    shutil.copytree(tiny_run, run)
    write_clip(source, np.stack(wave_clip(30)), 25)
    stop_after(1)
    assert command("translate", run, source, out)[0] == 128 + signal.SIGTERM
    return run, source, out


def kept(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.with_name(f".resume-{out.name}").iterdir()}


def flag(*flags: object) -> Callable[[Path, Path], tuple[object, ...]]:
    return lambda run, source: flags


def other_source(run: Path, source: Path) -> tuple[object, ...]:
    write_clip(source, np.stack(wave_clip(31)), 25)
    return ()


def other_model(run: Path, source: Path) -> tuple[object, ...]:
    config = Config.from_json((run / "config.json").read_text(), "")
    nets = build_nets(config, discriminators=False)
    (run / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    return ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_source, "IN has changed"),
        (other_model, "the model has changed"),
        (flag("--direction", "y2x"), "the model has changed"),
        (flag("--crf", 30, "--side-by-side"), "--side-by-side was False and is True, --crf was None and is 30"),
        (flag("--threads", 2), "--threads was 1 and is 2"),
    ],
)
def test_what_changed_is_named_and_nothing_lost(
    stopped: tuple[Path, Path, Path], command: Command, change: Callable[..., tuple[object, ...]], named: str
) -> None:
    run, source, out = stopped
    flags, before = change(run, source), kept(out)
    line = refusal(command("translate", run, source, out, "--resume", *flags))
    expected = f"{out}: cannot go on where it stopped: {named}; undo that, or --overwrite starts over"
    assert line == f"rlv2v.translate: {expected}"
    assert kept(out) == before and not out.exists()


def test_another_version_is_named(
    stopped: tuple[Path, Path, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source, out = stopped
    monkeypatch.setattr(av, "__version__", "99.1")
    line = refusal(command("translate", run, source, out, "--resume"))
    assert "cannot go on where it stopped: PyAV was " in line and " and is 99.1;" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["packets", "state"])
def test_damage_is_one_line_and_nothing_is_lost(
    stopped: tuple[Path, Path, Path], command: Command, damage: Callable[[Path], Any], name: str
) -> None:
    run, source, out = stopped
    path = out.with_name(f".resume-{out.name}") / name
    damage(path)
    before = kept(out)
    if name == "state" and not path.exists():  # then nothing was saved yet
        assert command("translate", run, source, out, "--resume")[0] == 0
        return
    result = command("translate", run, source, out, "--resume")
    assert f"{path}: " in refusal(result) and "--overwrite starts over" in refusal(result)
    assert "are kept" not in result[2]
    assert kept(out) == before and not out.exists()
    assert command("translate", run, source, out, "--overwrite")[0] == 0
    assert listing(out.parent) == ["in.mkv", "out.mp4", "run"]


def test_a_foreign_folder_is_left_alone(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    source, out, folder = tmp_path / "in.mkv", tmp_path / "out.mp4", tmp_path / ".resume-out.mp4"
    write_clip(source, np.stack(wave_clip(3)), 25)
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    for flags in ((), ("--resume",), ("--overwrite",)):
        line = refusal(command("translate", tiny_run, source, out, *flags))
        assert line.endswith(f"{folder}: holds mine.txt, which is not of a translation; move it away")
    assert (folder / "mine.txt").read_text() == "precious"
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert f"{folder}: is a file" in refusal(command("translate", tiny_run, source, out))
    assert listing(tmp_path) == [".resume-out.mp4", "in.mkv"]


def test_without_a_flag_nothing_is_lost(
    stopped: tuple[Path, Path, Path], command: Command, stop_after: Callable[[int], None]
) -> None:
    run, source, out = stopped
    before = kept(out)
    line = refusal(command("translate", run, source, out))
    assert line.endswith(f"{out}: a translation to it was stopped; --resume goes on, --overwrite starts over")
    assert "choose one of them" in refusal(command("translate", run, source, out, "--resume", "--overwrite"))
    assert kept(out) == before
    assert command("translate", run, source, out, "--overwrite")[0] == 0
    assert listing(out.parent) == ["in.mkv", "out.mp4", "run"]
    code, printed, _ = command("translate", run, source, out, "--resume")
    assert code == 0 and printed == f"{out}: exists already, skipped\n"


def test_missing_images_are_one_line(
    tiny_run: Path, tmp_path: Path, command: Command, stop_after: Callable[[int], None]
) -> None:
    source, out = write_source(tmp_path / "in.mkv"), tmp_path / "images" / "%d.png"
    stop_after(2)
    assert command("translate", tiny_run, source, out)[0] == 128 + signal.SIGTERM
    images = tmp_path / ".resume-images" / "images"
    cut(images / "7.png")
    (images / "99.png").write_bytes(b"after the last piece")
    assert "missing or cut; --overwrite starts over" in refusal(command("translate", tiny_run, source, out, "--resume"))
    assert (images / "23.png").exists() and not out.parent.exists()


@pytest.mark.parametrize(
    ("source", "out", "reason"),
    [
        ("in.mkv", "out.gif", "a GIF is not written in pieces; leave it out"),
        ("in.mkv", "-", "what went to stdout is gone; leave it out"),
        ("-", "out.mp4", "- can be read once only; leave it out"),
        (".", "out --suffix .gif", "a GIF is not written in pieces; give --skip-existing"),
    ],
)
def test_what_cannot_go_on_is_refused(
    tiny_run: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    out: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "in.mkv", np.stack(wave_clip(2)), 25)
    result = command("translate", tiny_run, source, *out.split(), "--resume")
    assert refusal(result) == f"rlv2v.translate: --resume: {reason}"


def test_what_follows_the_last_piece_does_not_count(stopped: tuple[Path, Path, Path], command: Command) -> None:
    """A kill comes while pictures are written that no state knows of."""
    run, source, out = stopped
    with (out.with_name(f".resume-{out.name}") / "packets").open("ab") as file:
        file.write(b"half a packet")
    assert command("translate", run, source, out, "--resume")[0] == 0
    again = out.with_name("again.mp4")
    assert command("translate", run, source, again)[0] == 0
    assert_same(out, again, lossless=False, cuts=2)
