"""Reading and writing frames: every kind of source through one function, and a writer that leaves no half file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from rlv2v.data import to_model, to_uint8, video
from rlv2v.data.writer import VideoWriter, write_clip, write_image
from rlv2v.errors import UserError


def smooth_clip(frames: int, height: int, width: int) -> np.ndarray:
    """A clip without sharp colour edges, other in each frame: (T,H,W,3)."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    channels = [128 + 100 * np.sin(x / width * 3 + t), 128 + 80 * np.cos(y / height * 4 + t / 2), 60 + 140 * x / width]
    return np.stack(channels, -1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def encode(path: Path, clip: np.ndarray, codec: str, pix_fmt: str, rotation: int = 0, **options: str) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


CODECS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "h264_10bit.mp4": ("libx264", "yuv420p10le"),
    "h264_444.mkv": ("libx264", "yuv444p"),
    "hevc.mp4": ("libx265", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
    "name with spaces, ü and\nnewline.mp4": ("libx264", "yuv420p"),
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_reads_upright_and_in_order(tmp_path: Path, name: str) -> None:
    clip = smooth_clip(9, 64, 96)  # x265 corrupts memory below 64 pixels
    encode(tmp_path / name, clip, *CODECS[name], **({"x265-params": "log-level=none"} if "hevc" in name else {}))
    found = np.stack(list(video.read_frames(tmp_path / name)))
    assert found.shape == clip.shape and found.dtype == np.uint8
    for t, frame in enumerate(found):
        match = [psnr(frame, other) for other in clip]
        assert int(np.argmax(match)) == t and match[t] > 25, (t, match)  # the next best is below 20 dB
    part = np.stack(list(video.read_frames(tmp_path / name, start=3, num=4)))
    np.testing.assert_array_equal(part, found[3:7])


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    clip = smooth_clip(3, 48, 64)
    encode(tmp_path / "a.mp4", clip, "libx264", "yuv444p", rotation=degrees)
    with av.open(str(tmp_path / "a.mp4")) as container:
        turned = next(container.decode(video=0)).rotation
    assert abs(turned) == abs(degrees), "the file must carry the rotation"
    upright = np.stack([np.rot90(f, turned // 90) for f in clip])  # AVDisplayMatrix: counterclockwise degrees
    found = np.stack(list(video.read_frames(tmp_path / "a.mp4")))
    assert found.shape == upright.shape and psnr(found, upright) > 35
    about = video.probe(tmp_path / "a.mp4")
    assert (about.height, about.width) == upright.shape[1:3]


def test_gif_raw_images_and_folders(tmp_path: Path) -> None:
    clip = smooth_clip(12, 20, 24)
    encode(tmp_path / "a.gif", clip, "gif", "rgb8")
    assert len(list(video.read_frames(tmp_path / "a.gif"))) == 12
    np.save(tmp_path / "a.npy", clip)
    (tmp_path / "folder").mkdir()
    for t, frame in enumerate(clip):
        write_image(tmp_path / "folder" / f"frame{t}.png", frame)  # frame10 sorts after frame9
    for source in (tmp_path / "a.npy", tmp_path / "folder"):
        np.testing.assert_array_equal(np.stack(list(video.read_frames(source))), clip)
        np.testing.assert_array_equal(np.stack(list(video.read_frames(source, start=2, num=3))), clip[2:5])
        assert video.probe(source).num_frames == 12
    np.testing.assert_array_equal(next(video.read_frames(tmp_path / "folder" / "frame3.png")), clip[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.mp4", b"", "cannot be opened as a video"),
        ("text.mp4", b"hello" * 100, "cannot be opened as a video"),
        ("broken.png", b"\x89PNG", "cannot be read as an image"),
        ("broken.npy", b"\x93NUMPY", "cannot be read as .npy"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}") as caught:
        list(video.read_frames(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((3, 4, 4, 3)))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "dir.mp4").mkdir()
    for name, message in (
        ("float.npy", r"expected uint8 \(T,H,W,3\), got float64"),
        ("pickle.npy", r"expected uint8 \(T,H,W,3\), got object"),
        ("dir.mp4", "a folder without images"),
        ("none.mp4", "no such file"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            list(video.read_frames(tmp_path / name))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (1, 1)])
def test_h264_keeps_size_rate_count_and_colour(tmp_path: Path, height: int, width: int) -> None:
    clip = smooth_clip(25, height, width)
    write_clip(tmp_path / "a.mp4", clip, Fraction(30000, 1001))
    about = video.probe(tmp_path / "a.mp4")
    assert (about.codec, about.width, about.height, about.num_frames) == ("h264", width, height, 25)
    assert about.fps == Fraction(30000, 1001)
    found = np.stack(list(video.read_frames(tmp_path / "a.mp4")))
    assert psnr(found, clip) > 36, "colours must survive: a mix-up of BT.601 and BT.709 gives about 30 dB"


def test_lossless_is_lossless_at_odd_sizes(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 17, 31, 3), dtype=np.uint8)
    write_clip(tmp_path / "a.mp4", clip, 8, "vp9-lossless")
    np.testing.assert_array_equal(np.stack(list(video.read_frames(tmp_path / "a.mp4"))), clip)


def test_writer_leaves_no_half_file(tmp_path: Path) -> None:
    path, clip = tmp_path / "a.mp4", smooth_clip(4, 32, 32)
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
    assert len(list(video.read_frames(path))) == 4


@pytest.mark.parametrize(("name", "message"), [("no/a.mp4", "does not exist"), ("a.txt", "cannot write .txt")])
def test_writer_names_a_bad_path(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name, 8)
    assert list(tmp_path.iterdir()) == []


def test_audio_is_copied_up_to_the_end_of_the_video(tmp_path: Path) -> None:
    rate, clip = 16000, smooth_clip(20, 32, 32)
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
    with VideoWriter(tmp_path / "out.mp4", 10, audio_from=tmp_path / "in.mp4") as writer:
        for frame in clip[:10]:
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0)) / rate
    assert video.probe(tmp_path / "out.mp4").has_audio and video.probe(tmp_path / "out.mp4").num_frames == 10
    assert 0.9 <= heard <= 1.2, f"expected about 1 s of sound, got {heard}"


@pytest.mark.parametrize("shape", [(3, 5, 3), (2, 4, 6, 7, 3)])
def test_model_range_round_trip(shape: tuple[int, ...]) -> None:
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    floats = to_model(frames)
    assert floats.shape == (*shape[:-3], 3, *shape[-3:-1]) and floats.dtype == torch.float32
    assert floats.min() >= -1 and floats.max() <= 1
    assert torch.equal(to_uint8(floats), frames)
    assert torch.equal(to_uint8(floats * 9 + 9), to_uint8((floats * 9 + 9).clamp(-1, 1)))
    with pytest.raises(ValueError, match="uint8"):
        to_model(floats)
