"""Reading in any order: the frames of a plain decode, whatever was read before, at any size; faults are named."""

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
from data_clips import HEIGHT, WIDTH, by_name, encode, smooth, write_frames

from rlv2v.data import readers, video
from rlv2v.data.index import Source, index_folder
from rlv2v.data.readers import FrameReader
from rlv2v.errors import UserError

T, LENGTH = 4, 60
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"g": "9", "bf": "3"}),
    "pyramid.mp4": ("libx264", {"g": "30", "bf": "7", "b_strategy": "0", "x264-params": "b-pyramid=normal"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=20:bframes=4"}),
    "vp9.mp4": ("libvpx-vp9", {"g": "9"}),
    "mpeg4.avi": ("mpeg4", {"g": "9"}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root, clip = tmp_path_factory.mktemp("readers"), smooth(LENGTH, HEIGHT, WIDTH)
    uneven = [t + t // 7 for t in range(LENGTH)]  # seven frames, then a gap, where the container can hold that
    for name, (codec, options) in CODECS.items():
        encode(root / name, clip, codec, times=None if name.endswith("avi") else uneven, rate=30, **options)
    encode(root / "turned.mp4", clip, times=uneven, rate=30, rotation=90, g="9")
    np.save(root / "raw.npy", clip)
    write_frames(root / "folder", (frame[: HEIGHT - t % 2] for t, frame in enumerate(clip[:20])))
    return by_name(index_folder(root, frames=T))


@pytest.mark.parametrize("size", [None, (48, 32), (144, 96)], ids=["own size", "smaller", "larger"])
@pytest.mark.parametrize("name", [*CODECS, "turned.mp4", "raw.npy", "folder"])
def test_every_start_gives_the_bits_of_a_plain_read(
    sources: dict[str, Source], name: str, size: tuple[int, int] | None
) -> None:
    source, reader = sources[name], FrameReader()
    expected = np.stack(list(video.read_frames(source.path, size=size)))
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
    monkeypatch.setattr(readers, "MAX_OPEN_PIXELS", 2 * HEIGHT * WIDTH)
    reader = FrameReader()
    expected = {name: reader.read(sources[name], 9, T) for name in CODECS}
    assert sorted(opened) == sorted([*CODECS, *CODECS]), "once for its times, once to be read"
    opened.clear()
    for name in ("vp9.mp4", "mpeg4.avi", "vp9.mp4", "h264.mp4", "vp9.mp4", "mpeg4.avi"):
        np.testing.assert_array_equal(reader.read(sources[name], 9, T), expected[name])
    assert opened == ["h264.mp4", "mpeg4.avi"], "the two used last stayed open"
    handles = Path("/proc/self/fd")
    gc.collect()
    if handles.is_dir():
        paths = [os.readlink(link) for link in handles.iterdir() if link.exists()]
        assert sum(path.startswith(str(sources["vp9.mp4"].path.parent)) for path in paths) == 2


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
    path, content = tmp_path / name, sources[name].path.read_bytes()
    path.write_bytes(content)
    source, reader = replace(sources[name], path=path), FrameReader()
    expected = reader.read(source, 40, T)
    os.truncate(path, source.num_bytes // 3)
    if name == "raw.npy":
        with pytest.raises(UserError, match=f"{name}: "):
            reader.read(source, 40, T)
    else:
        for start in (40, 0, 55):
            with suppress(UserError):  # FFmpeg may still hold what it read before
                np.testing.assert_array_equal(
                    reader.read(source, start, T), FrameReader().read(sources[name], start, T)
                )
    path.write_bytes(content)
    np.testing.assert_array_equal(reader.read(source, 40, T), expected)


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_colours_are_those_of_the_formula(size: tuple[int, int] | None) -> None:
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
