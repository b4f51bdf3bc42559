"""Reading at random: the frames of a plain decode, whatever was read before, at any size; faults are named."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from rlv2v.data import readers, video
from rlv2v.data.index import Source, index_folder
from rlv2v.data.readers import FrameReader
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip, write_image
from rlv2v.errors import UserError

T, LENGTH = 4, 60
HEIGHT, WIDTH = 64, 96
"""Below 64 pixels x265 writes outside its memory."""
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"g": "9", "bf": "3"}),
    "pyramid.mp4": ("libx264", {"g": "30", "bf": "7", "b_strategy": "0", "x264-params": "b-pyramid=normal"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=20:bframes=4"}),
    "vp9.mp4": ("libvpx-vp9", {"g": "9"}),
    "mpeg4.avi": ("mpeg4", {"g": "9"}),
}


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    waves = [128 + 100 * np.sin(x / width * 3 + t), 128 + 80 * np.cos(y / height * 4 + t / 2), 60 + 140 * x / width]
    return np.stack(waves, -1).astype(np.uint8)


def encode(path: Path, clip: np.ndarray, codec: str, options: dict[str, str], rotation: int = 0) -> None:
    """At a variable rate where the container can: seven frames, then a gap."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for t, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = t if path.suffix == ".avi" else t + t // 7
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("readers")
    for name, (codec, options) in CODECS.items():
        encode(root / name, smooth(LENGTH, HEIGHT, WIDTH), codec, options)
    encode(root / "turned.mp4", smooth(LENGTH, HEIGHT, WIDTH), "libx264", {"g": "9"}, rotation=90)
    np.save(root / "raw.npy", smooth(LENGTH, HEIGHT, WIDTH))
    (root / "folder").mkdir()
    for t, frame in enumerate(smooth(20, HEIGHT, WIDTH)):
        write_image(root / "folder" / f"{t}.png", frame[: HEIGHT - t % 2])
    return {source.path.name: source for source in index_folder(root, frames=T)}


@pytest.mark.parametrize("size", [None, (48, 32), (144, 96)], ids=["own size", "smaller", "larger"])
@pytest.mark.parametrize("name", [*CODECS, "turned.mp4", "raw.npy", "folder"])
def test_every_start_gives_the_bits_of_a_plain_read(
    sources: dict[str, Source], name: str, size: tuple[int, int] | None
) -> None:
    source, reader = sources[name], FrameReader()
    expected = np.stack(list(read_frames(source.path, size=size)))
    assert len(expected) == source.num_frames == (20 if name == "folder" else LENGTH)
    assert expected.shape[1:3] == (size or (source.width, source.height))[::-1]
    for start in np.random.default_rng(0).permutation(source.num_frames - T + 1):
        np.testing.assert_array_equal(reader.read(source, start, T, size), expected[start : start + T], f"{start}")
    if name != "folder":
        assert np.abs(expected[1:].astype(int) - expected[:-1]).mean((1, 2, 3)).min() > 3, "no two frames are alike"


def test_a_video_stays_open_and_few_do(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = video.open_video
    monkeypatch.setattr(video, "open_video", lambda path: (opened.append(path.name), real(path))[1])
    monkeypatch.setattr(readers, "KEPT_PIXELS", 2 * HEIGHT * WIDTH)
    reader = FrameReader()
    expected = {name: reader.read(sources[name], 9, T) for name in CODECS}
    assert sorted(opened) == sorted([*CODECS, *CODECS]), "once for its times, once to be read"
    opened.clear()
    for name in ("vp9.mp4", "mpeg4.avi", "vp9.mp4", "h264.mp4", "vp9.mp4", "mpeg4.avi"):
        np.testing.assert_array_equal(reader.read(sources[name], 9, T), expected[name])
    assert opened == ["h264.mp4", "mpeg4.avi"], "the two used last were kept"
    handles = Path("/proc/self/fd")
    gc.collect()
    if handles.is_dir():
        held = [os.readlink(link) for link in handles.iterdir() if link.exists()]
        mine = [path for path in held if path.startswith(str(sources["vp9.mp4"].path.parent))]
        assert len(mine) == 2


def test_the_size_may_change_from_read_to_read(sources: dict[str, Source]) -> None:
    reader, source = FrameReader(), sources["h264.mp4"]
    for size in ((24, 16), None, (24, 16), (48, 32), (20, 20)):
        np.testing.assert_array_equal(reader.read(source, 20, T, size), FrameReader().read(source, 20, T, size))


def test_a_fault_names_the_file_and_the_next_one_is_read(sources: dict[str, Source], tmp_path: Path) -> None:
    reader = FrameReader()
    for name in ("h264.mp4", "vp9.mp4", "raw.npy"):
        good, path = sources[name], tmp_path / f"bad {name}"
        expected = reader.read(good, 30, T)
        for content in (good.path.read_bytes()[: good.num_bytes // 2], b"", b"not a clip"):
            path.write_bytes(content)
            for start in (0, 30, LENGTH - T):
                if start or len(content) < 20:
                    with pytest.raises(UserError, match=f"bad {name}: "):
                        reader.read(replace(good, path=path), start, T)
        path.unlink()
        with pytest.raises(UserError, match=f"bad {name}: "):
            reader.read(replace(good, path=path), 0, T)
        np.testing.assert_array_equal(reader.read(good, 30, T), expected)


@pytest.mark.parametrize("name", ["h264.mp4", "raw.npy"])
def test_a_file_cut_short_while_open_gives_what_is_left_or_an_error(
    sources: dict[str, Source], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(sources[name].path.read_bytes())
    source, reader = replace(sources[name], path=path), FrameReader()
    expected = reader.read(source, 40, T)
    os.truncate(path, source.num_bytes // 3)
    if name == "raw.npy":
        with pytest.raises(UserError, match=f"{name}: "):
            reader.read(source, 40, T)
    else:
        for start in (40, 0, 55):  # FFmpeg may still hold what it read before
            with suppress(UserError):
                found = reader.read(source, start, T)
                np.testing.assert_array_equal(found, FrameReader().read(sources[name], start, T))
    path.write_bytes(sources[name].path.read_bytes())
    np.testing.assert_array_equal(reader.read(source, 40, T), expected)


def test_a_raw_clip_in_fortran_order_or_of_other_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "turned.npy", np.zeros((3, 4, 5, 9), np.uint8).T)
    np.save(tmp_path / "wide.npy", np.zeros((9, 5, 4, 4), np.uint8))
    (tmp_path / "v3.npy").write_bytes(b"\x93NUMPY\x03\x00" + bytes(120))
    (tmp_path / "v9.npy").write_bytes(b"\x93NUMPY\x09\x00" + bytes(120))
    for name, message in (
        ("turned", r"got uint8 \(9, 5, 4, 3\) in Fortran order"),
        ("wide", r"got uint8 \(9, 5, 4, 4\)"),
        ("v3", "cannot be read as .npy"),
        ("v9", "cannot be read as .npy"),
    ):
        with pytest.raises(UserError, match=message):
            video.raw_shape(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_colours_are_those_of_the_formula(tmp_path: Path, size: tuple[int, int] | None) -> None:
    """BT.601 limited range in floating point; FFmpeg's fast conversion would be a level or more too dark."""
    y, x = np.mgrid[:128, :128]
    planes = [60 + 0.9 * y + 20 * np.sin(x / 9), 100 + 0.2 * y[::2, ::2], 140 - 0.15 * x[::2, ::2]]
    frame = av.VideoFrame(128, 128, "yuv420p")
    frame.colorspace, frame.color_range = Colorspace.ITU601, ColorRange.MPEG
    for plane, values in zip(frame.planes, planes, strict=True):
        memory = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        memory[:, : plane.width] = values
    luma, cb, cr = (np.floor(p).repeat(2 if k else 1, 0).repeat(2 if k else 1, 1) for k, p in enumerate(planes))
    bright, blue, red = (luma - 16) * 255 / 219, (cb - 128) * 255 / 224, (cr - 128) * 255 / 224
    rgb = np.stack([bright + 1.402 * red, bright - 0.344136 * blue - 0.714136 * red, bright + 1.772 * blue], -1)
    if size:
        rgb = rgb.reshape(32, 4, 32, 4, 3).mean((1, 3))
    error = video.Upright(size)(frame) - rgb.clip(0, 255)
    assert np.abs(error.mean((0, 1))).max() < 0.2 and np.abs(error).mean() < 0.6


def test_a_lossless_clip_comes_back_bit_for_bit(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (20, 18, 22, 3), np.uint8)
    write_clip(tmp_path / "a.mp4", clip, 25, "vp9-lossless")
    (source,) = index_folder(tmp_path, frames=T)
    for start in (0, 13, 5):
        np.testing.assert_array_equal(FrameReader().read(source, start, T), clip[start : start + T])
