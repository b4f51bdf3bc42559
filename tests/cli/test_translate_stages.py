"""Reading, the network and writing overlap: the same file as one after the other, and an error of each is said once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from commands import Command, noise, refusal
from processes import file_size_limit

from rlv2v.checkpoint.export import load_translator, pack_translators
from rlv2v.config import Config
from rlv2v.data.video import timed_frames
from rlv2v.data.writer import VideoWriter, write_clip
from rlv2v.method.translation import Stream
from rlv2v.model.build import build_nets
from rlv2v.translate import Args, main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A video of 20 frames."""
    write_clip(tmp_path / "in.mp4", noise(20, 32, 48), 10)
    return tmp_path / "in.mp4"


def test_the_file_is_that_of_one_thread(tiny_run: Path, source: Path, tmp_path: Path) -> None:
    main(Args(tiny_run, source, tmp_path / "out.mkv", codec="ffv1"))
    stream = Stream(*load_translator(tiny_run))
    with VideoWriter(tmp_path / "plain.mkv", 10, "ffv1", even=True, tick=Fraction(1, 10240)) as writer:
        for frame in timed_frames(source):
            writer.write(stream(frame.rgb), frame.time, frame.duration)
    shown, plain = (list(timed_frames(tmp_path / name)) for name in ("out.mkv", "plain.mkv"))
    assert len(shown) == 20
    for a, b in zip(shown, plain, strict=True):
        assert (a.rgb == b.rgb).all() and a[1:] == b[1:]


def test_threads_are_those_that_were_asked_for(
    tiny_run: Path, source: Path, tmp_path: Path, command: Command, one_thread: None
) -> None:
    torch.set_num_threads(2)
    assert command("translate", tiny_run, source, tmp_path / "a.mp4")[0] == 0
    assert torch.get_num_threads() == 1
    assert command("translate", tiny_run, source, tmp_path / "b.mp4", "--threads", 2)[0] == 0
    assert torch.get_num_threads() == 2
    assert "--threads: expected 0 or more, got -1" in refusal(
        command("translate", tiny_run, source, tmp_path / "c.mp4", "--threads", -1)
    )


def test_an_error_of_each_stage_is_said_once_and_leaves_nothing(
    tiny_run: Path, source: Path, tmp_path: Path, command: Command
) -> None:
    out, run = tmp_path / "out.mkv", tmp_path / "run"
    nets = build_nets(config := Config.of("tiny", out=run), discriminators=False)
    with torch.no_grad():
        for weight in nets.g_y.parameters():
            weight.fill_(torch.nan)
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    (run / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    files = sorted(tmp_path.iterdir())
    assert "not finite" in refusal(command("translate", run, source, out))
    with file_size_limit(20_000):
        assert f"{out}: " in refusal(command("translate", tiny_run, source, out, "--lossless"))
    assert sorted(tmp_path.iterdir()) == files


def test_a_fault_of_the_reader_is_said_once(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    write_clip(tmp_path / "in.mkv", noise(20, 32, 48), 10, "ffv1")
    content = (tmp_path / "in.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 3 // 4])
    line = refusal(command("translate", tiny_run, tmp_path / "cut.mkv", tmp_path / "out.mp4", "--strict"))
    assert "cut.mkv: " in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.mkv", "in.mkv"]
