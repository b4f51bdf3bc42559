"""Reading and writing frames: every kind of source through one function, and a writer that leaves no half file."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_clips import psnr, smooth, write_frames

from rlv2v.data import to_model, to_uint8, video
from rlv2v.data.tracks import Tracks
from rlv2v.data.writer import VideoWriter, write_clip
from rlv2v.errors import UserError


def read(path: Path, start: int = 0, num: int | None = None) -> np.ndarray:
    return np.stack(list(video.read_frames(path, start=start, num=num)))


def test_raw_clips_images_and_folders(tmp_path: Path) -> None:
    clip = smooth(12, 20, 24)
    np.save(tmp_path / "a.npy", clip)
    write_frames(tmp_path / "folder", clip)  # 10.png sorts after 9.png
    for source in (tmp_path / "a.npy", tmp_path / "folder"):
        np.testing.assert_array_equal(read(source), clip)
        np.testing.assert_array_equal(read(source, 2, 3), clip[2:5])
        assert video.probe(source).num_frames == 12
    np.testing.assert_array_equal(read(tmp_path / "folder" / "3.png")[0], clip[3])


def test_raw_headers_are_parsed_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy parses them by CPython's parser, which counts its depth for all threads together."""
    np.save(tmp_path / "a.npy", smooth(2, 4, 4))
    parse, at_once, most = np.lib.format.read_array_header_1_0, [], []

    def watched(file: object) -> object:
        at_once.append(file)
        most.append(len(at_once))
        time.sleep(0.01)
        at_once.remove(file)
        return parse(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", watched)
    with ThreadPoolExecutor(4) as threads:
        shapes = list(threads.map(video.raw_shape, [tmp_path / "a.npy"] * 8))
    assert shapes == [((2, 4, 4, 3), 2)] * 8 and most == [1] * 8


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (1, 1)])
def test_h264_keeps_size_rate_count_and_colour(tmp_path: Path, height: int, width: int) -> None:
    clip = smooth(25, height, width)
    write_clip(tmp_path / "a.mp4", clip, Fraction(30000, 1001))
    probe = video.probe(tmp_path / "a.mp4")
    assert (probe.codec, probe.width, probe.height, probe.num_frames) == ("h264", width, height, 25)
    assert probe.fps == Fraction(30000, 1001)
    assert psnr(read(tmp_path / "a.mp4"), clip) > 36, "a mix-up of BT.601 and BT.709 gives about 30 dB"


def test_lossless_is_lossless_at_odd_sizes(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 17, 31, 3), dtype=np.uint8)
    write_clip(tmp_path / "a.mp4", clip, 8, "vp9-lossless")
    np.testing.assert_array_equal(read(tmp_path / "a.mp4"), clip)


def test_writer_leaves_no_half_file(tmp_path: Path) -> None:
    path, clip = tmp_path / "a.mp4", smooth(4, 32, 32)
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 8) as writer:
        writer.write(clip[0])
        assert path.read_bytes() == b"old", "the name is taken only at the end"
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"
    with pytest.raises(ValueError, match="no frames"), VideoWriter(path, 8):
        pass
    with pytest.raises(ValueError, match=r"frame 1 must be \(32, 32, 3\), got"), VideoWriter(path, 8) as writer:
        writer.write(clip[0])
        writer.write(clip[0, :16])
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"
    write_clip(path, clip, 8)
    assert len(read(path)) == 4


@pytest.mark.parametrize(("name", "message"), [("no/a.mp4", "does not exist"), ("a.txt", "got .txt")])
def test_writer_names_a_bad_path(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name, 8)
    assert list(tmp_path.iterdir()) == []


def test_audio_is_copied_up_to_the_end_of_the_video(tmp_path: Path) -> None:
    rate, clip = 16000, smooth(20, 32, 32)
    with av.open(str(tmp_path / "in.mp4"), "w") as output:
        pictures, sound = output.add_stream("libx264", rate=10), output.add_stream("aac", rate=rate)
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        for frame in clip:
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = (np.sin(np.arange(2 * rate) / 10)[None] * 0.3).astype(np.float32)
        samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        samples.sample_rate, samples.pts = rate, 0
        output.mux(sound.encode(samples))
        output.mux(pictures.encode(None) + sound.encode(None))
    with VideoWriter(tmp_path / "out.mp4", 10, tracks=Tracks(tmp_path / "in.mp4", Fraction(0))) as writer:
        for frame in clip[:10]:
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0)) / rate
    probe = video.probe(tmp_path / "out.mp4")
    assert probe.has_audio and probe.num_frames == 10
    assert 0.9 <= heard <= 1.2, f"expected about 1 s of sound, got {heard}"


@pytest.mark.parametrize("shape", [(3, 5, 3), (2, 4, 6, 7, 3)])
def test_model_range_round_trip(shape: tuple[int, ...]) -> None:
    frames = torch.arange(int(np.prod(shape))).reshape(shape).mul(37).remainder(256).to(torch.uint8)
    floats = to_model(frames)
    assert floats.shape == (*shape[:-3], 3, *shape[-3:-1]) and floats.dtype == torch.float32
    assert floats.min() >= -1 and floats.max() <= 1
    assert torch.equal(to_uint8(floats), frames)
    assert torch.equal(to_uint8(floats * 9 + 9), to_uint8((floats * 9 + 9).clamp(-1, 1)))
    with pytest.raises(ValueError, match="uint8"):
        to_model(floats)
