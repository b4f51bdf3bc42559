"""Every kind of output: what it holds, its codecs, and what is refused before any work."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from data_clips import psnr, smooth
from flash_clips import AT, VARIABLE, beeps, flashes, write_flashes

from rlv2v.data.containers import CODECS, CONTAINERS, choose_codec
from rlv2v.data.sequence import SequenceWriter, is_sequence
from rlv2v.data.tracks import Tracks
from rlv2v.data.video import probe, read_frames, timed_frames
from rlv2v.data.writer import TV_TICK, VideoWriter, write_clip
from rlv2v.errors import UserError
from rlv2v.translate import Args, main


@pytest.mark.parametrize(("suffix", "codec"), [(s, c) for s, row in CONTAINERS.items() for c in row.codecs])
def test_every_codec_of_every_container_gives_back_the_pictures(tmp_path: Path, suffix: str, codec: str) -> None:
    if CODECS[codec].encoder not in av.codecs_available:
        pytest.skip("no encoder")
    clip = smooth(5, 64, 96)
    write_clip(tmp_path / f"a{suffix}", clip, 10, codec)
    frames = np.stack(list(read_frames(tmp_path / f"a{suffix}")))
    assert probe(tmp_path / f"a{suffix}").fps == 10 and frames.shape == clip.shape
    assert psnr(frames, clip) > (26 if codec == "gif" else 36), "a mix-up of BT.601 and BT.709 gives about 30 dB"


@pytest.mark.parametrize(("suffix", "name"), [(".mp4", None), (".mkv", "ffv1"), (".webm", None), (".mp4", "vp9")])
def test_lossless_keeps_every_value(tmp_path: Path, suffix: str, name: str | None) -> None:
    codec = choose_codec(tmp_path / f"a{suffix}", name, lossless=True)
    clip = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    write_clip(tmp_path / f"a{suffix}", clip, 10, codec)
    np.testing.assert_array_equal(np.stack(list(read_frames(tmp_path / f"a{suffix}"))), clip)


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("a.webm", {"codec": "h264"}, "--codec: expected one that .webm holds, vp9, av1, got h264"),
        ("a.mp4", {"codec": "hevc", "lossless": True}, "--lossless: hevc is written with losses only"),
        ("a.mp4", {"crf": 52}, "--crf: expected 0 to 51"),
        ("a.mp4", {"crf": 5, "lossless": True}, "--crf: h264-lossless have no such quality"),
        ("a/%d.png", {"crf": 5}, "--crf: images have no such quality"),
        ("a.mp4", {"fps": 0.0}, "--fps: expected more than 0"),
        ("full/%d.png", {}, "full: is not empty"),
        ("a/b/%d.png", {}, "a does not exist"),
        ("in.mp4/%d.png", {}, "in.mp4: is a file"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, out: str, options: dict, words: str) -> None:
    (tmp_path / "in.mp4").write_bytes(b"video")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("keep")
    with pytest.raises(UserError, match=words):
        main(Args(tmp_path, tmp_path / "in.mp4", tmp_path / out, **options))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "in.mp4"]


def test_an_output_stays_unless_it_may_be_replaced(tiny_run: Path, tmp_path: Path) -> None:
    source, out = write_flashes(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already"):
        main(Args(tiny_run, source, out))
    assert out.read_bytes() == b"precious"
    main(Args(tiny_run, source, out, overwrite=True))
    assert flashes(out) == list(AT)


def test_crf_is_the_quality(tiny_run: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "in.npy", noise)
    for crf in (5, 40):
        main(Args(tiny_run, tmp_path / "in.npy", tmp_path / f"{crf}.mp4", crf=crf))
    assert (tmp_path / "5.mp4").stat().st_size > 3 * (tmp_path / "40.mp4").stat().st_size


def test_webm_has_vp9_and_opus(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.webm"
    main(Args(tiny_run, write_flashes(tmp_path / "in.mp4", VARIABLE), out))
    assert probe(out).codec == "vp9" and probe(out).has_audio
    np.testing.assert_allclose([float(f.time) for f in timed_frames(out)], [float(t) for t in VARIABLE], atol=0.001)
    np.testing.assert_allclose(beeps(out), AT, atol=0.02)


def test_gif_keeps_times_and_says_that_the_sound_is_gone(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.gif"
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, write_flashes(tmp_path / "in.mp4", VARIABLE), out))
    np.testing.assert_allclose([float(f.time) for f in timed_frames(out)], [float(t) for t in VARIABLE], atol=0.011)
    assert "left out, since the output cannot hold it: sound (aac)" in caplog.text


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_sequence_of_images(tiny_run: Path, tmp_path: Path, suffix: str) -> None:
    clip = smooth(3, 31, 47)
    np.save(tmp_path / "in.npy", clip)
    main(Args(tiny_run, tmp_path / "in.npy", tmp_path / "out" / f"a%03d.{suffix}"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"a00{k}.{suffix}" for k in range(3)]
    frames = np.stack(list(read_frames(tmp_path / "out")))
    if suffix == "jpg":
        assert psnr(frames, clip) > 30
    else:
        np.testing.assert_array_equal(frames, clip)


def test_a_sequence_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), SequenceWriter(tmp_path / "out" / "%d.png") as writer:
        writer.write(smooth(1, 8, 8)[0])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    names = {"%05d.png": True, "a%d.jpg": True, "%d.mp4": False, "a.png": False, "%s.png": False, "%d%d.png": False}
    assert {name: is_sequence(Path(name)) for name in names} == names


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_times_that_a_container_cannot_hold_are_refused_in_a_line(tmp_path: Path, suffix: str) -> None:
    """Damaged files have such times; the muxer of MP4 or the encoder of VP9 refuses them."""
    out, frame = tmp_path / f"out{suffix}", np.zeros((32, 32, 3), np.uint8)
    with (
        pytest.raises(UserError, match=rf"out{suffix}: this kind of file cannot hold the video: invalid"),
        VideoWriter(out, 25, "h264" if suffix == ".mp4" else "vp9", tick=Fraction(1, 1000)) as writer,
    ):
        for time in (0, 2**52):
            writer.write(frame, Fraction(time))
    assert not list(tmp_path.iterdir())


def test_such_times_are_refused_in_a_line_with_sound_too(tmp_path: Path) -> None:
    """A packet of the pictures waits in the muxer for one of the sound, with which it is then refused."""
    source = write_flashes(tmp_path / "in.mkv")
    with (
        pytest.raises(UserError, match=r"out\.mp4: this kind of file cannot hold the video: invalid"),
        VideoWriter(tmp_path / "out.mp4", 25, tick=TV_TICK, tracks=Tracks(source, Fraction(0))) as writer,
    ):
        writer.write(np.zeros((32, 32, 3), np.uint8), Fraction(0), Fraction(30_000))
    assert not (tmp_path / "out.mp4").exists()
