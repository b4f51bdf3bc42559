"""Streaming translation: state, odd sizes, rates, audio, and refusals before any work."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from commands import Command, noise, refusal

from rlv2v.config import Config
from rlv2v.data.images import write_image
from rlv2v.data.video import probe, read_frames
from rlv2v.errors import UserError
from rlv2v.method.translation import Stream, translate_chunk, translate_clip
from rlv2v.model import Translator
from rlv2v.runtime.device import pick_device
from rlv2v.translate import Args, check_args, main
from rlv2v.translate_file import side_by_side

SETTINGS = Config.of(size=16, frames=4)


@pytest.fixture(scope="module")
def g() -> Translator:
    torch.manual_seed(0)
    return Translator((4, 8), patch=2, head="mask").eval()


def test_chunks_with_state_equal_one_pass(g):
    clip = noise()
    at_once = translate_clip(g, SETTINGS, clip)
    first, state = translate_chunk(g, SETTINGS, clip[:1])
    second, state = translate_chunk(g, SETTINGS, clip[1:4], state)
    third, _ = translate_chunk(g, SETTINGS, clip[4:], state)
    chunks = np.concatenate([first, second, third])
    assert np.abs(chunks.astype(int) - at_once).max() <= 1  # uint8 rounding of a float difference of about 1e-6
    alone, _ = translate_chunk(g, SETTINGS, clip[4:])
    assert np.abs(alone.astype(int) - third).max() > 1, "the state must matter, or this test says nothing"


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (9, 31), (1, 1)])
def test_sizes_that_do_not_divide_are_padded_and_cropped_back(g, height, width):
    clip = noise(2, height, width)
    out = translate_clip(g, SETTINGS, clip)
    assert out.shape == clip.shape and out.dtype == np.uint8
    height_pad, width_pad = -height % g.multiple, -width % g.multiple
    padded = np.pad(clip, ((0, 0), (0, height_pad), (0, width_pad), (0, 0)), mode="edge")
    np.testing.assert_array_equal(out, translate_clip(g, SETTINGS, padded)[:, :height, :width])


@pytest.mark.parametrize("size", [16, 0, 64, None])
def test_stream_restores_the_size(g, size):
    clip = noise(3, 30, 46)
    stream = Stream(g, SETTINGS, size)
    outputs = [stream(frame) for frame in clip]
    assert all(output.shape == (30, 46, 3) for output in outputs)
    assert (Stream(g, SETTINGS, size)(clip[2]) != outputs[2]).any(), "the state must be carried along"


def test_output_that_is_not_finite_is_refused():
    broken = Translator((4, 8), patch=2, head="mask").eval()
    with torch.no_grad():
        broken.to_rgbm.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        translate_clip(broken, SETTINGS, noise())


def test_side_by_side_has_even_sizes():
    frame = noise(1, 17, 15)[0]
    both = side_by_side(frame, frame[::-1])
    assert both.shape == (18, 30, 3)
    np.testing.assert_array_equal(both[:17, :15], frame)
    np.testing.assert_array_equal(both[:17, 15:], frame[::-1])


def test_paths_are_checked_before_any_work(tmp_path):
    source = tmp_path / "in.mp4"
    source.write_bytes(b"video")
    (tmp_path / "other.mp4").write_bytes(b"precious")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(source)
    for out, words in {
        "out.avi": "expected the suffix .mp4, .mov, .mkv, .gif, .webm, got .avi",
        "out": "got none",
        "missing/out.mp4": "does not exist; create it",
        "folder.mp4": "is a folder",
        "other.mp4": "exists already; choose another name, or give --overwrite",
        "in.mp4": "same file",
        "link.mp4": "same file",
    }.items():
        with pytest.raises(UserError, match=words):
            check_args(Args(tmp_path, source, tmp_path / out))
    with pytest.raises(UserError, match="no such video"):
        check_args(Args(tmp_path, tmp_path / "absent.mp4", tmp_path / "out.mp4"))
    check_args(Args(tmp_path, source, tmp_path / "out.mp4"))
    check_args(Args(tmp_path, source, tmp_path / "other.mp4", overwrite=True))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_unusable_device_is_named(name):
    with pytest.raises(UserError, match=f"--device: expected .* got '{name}'"):
        pick_device(name)


def write_source(path: Path, *, height: int = 30, width: int = 46, count: int = 12, rate: Fraction) -> None:
    """An MPEG-4 part 2 video with a tone: a codec and a rate that the output does not have by default."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=rate)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for frame in noise(count, height, width):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        samples = int(16000 * count / rate)
        tone = (np.sin(np.arange(samples) / 6) * 8000).astype(np.int16)[None]
        audio = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        audio.sample_rate, audio.pts = 16000, 0
        container.mux(sound.encode(audio))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))


def test_count_rate_size_and_audio_are_kept(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_source(source, rate=Fraction(30000, 1001))
    code, printed, err = command("translate", tiny_run, source, out)
    assert code == 0 and printed.startswith(f"{out}: 12 frames, 46x30, 29.97 fps; "), err
    video = probe(out)
    assert (video.codec, video.width, video.height, video.num_frames) == ("h264", 46, 30, 12)
    assert float(video.fps) == pytest.approx(30000 / 1001, rel=1e-4)
    assert video.has_audio
    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    frames, sources = np.stack(list(read_frames(out))), np.stack(list(read_frames(source)))
    assert len(frames) == 12 and np.abs(frames.astype(int) - sources).mean() > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_a_frame_folder_of_odd_size_and_the_way_back(tiny_run: Path, tmp_path: Path) -> None:
    folder, out, back = tmp_path / "frames", tmp_path / "out.mp4", tmp_path / "back.mp4"
    folder.mkdir()
    for index, frame in enumerate(noise(11, 21, 27)):
        write_image(folder / f"frame{index}.png", frame)  # frame10 comes after frame9
    main(Args(tiny_run, folder, out, exact_size=True))
    assert (probe(out).width, probe(out).height, probe(out).num_frames) == (27, 21, 11)
    main(Args(tiny_run, folder, back, direction="y2x", side_by_side=True, exact_size=True))
    assert (probe(back).width, probe(back).height) == (54, 22)
    both, one_way = np.stack(list(read_frames(back)))[:, :21], np.stack(list(read_frames(out)))
    left, right = both[:, :, :27], both[:, :, 27:].astype(int)
    assert np.abs(left.astype(int) - noise(11, 21, 27)).mean() < np.abs(right - noise(11, 21, 27)).mean()
    assert np.abs(right - one_way).mean() > 1


def test_refusals_name_the_thing_and_write_nothing(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    write_source(source, rate=Fraction(25))
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, words in [
        ((tmp_path / "no-run", source, out), "no-run"),
        ((tiny_run, tmp_path / "broken.mp4", out), "broken.mp4"),
        ((tiny_run, tmp_path / "empty.mp4", out), "empty.mp4"),
        ((tiny_run, source, source), "same file"),
        ((tiny_run, source, out, "--size", 3), "--size: expected 0 (the video's own) or at least 8 pixels, got 3"),
        ((tiny_run, source, out, "--device", "gpu"), "--device: expected one that torch can use here, got 'gpu'"),
    ]:
        assert words in refusal(command("translate", *arguments))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
