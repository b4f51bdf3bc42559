"""Any range of a source at any size has the bits of a plain read, few files stay open, and faults are named.

`test_odd_files` has the numbers of the frames of every kind of source.
"""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from data_clips import by_name, numbers_of
from odd_files import HEIGHT, WIDTH, Expected

from rlv2v.data import demux, readers, video
from rlv2v.data.demux import SharedFiles
from rlv2v.data.index import Source, index_folder
from rlv2v.data.readers import FrameReader
from rlv2v.data.upright import Upright
from rlv2v.errors import UserError

T = 4
VIDEOS = ["b_frames.mp4", "vfr.mp4", "vp9.mp4", "mpeg4.avi"]


@pytest.fixture(scope="module")
def sources(odd_files: tuple[Path, dict[str, Expected]]) -> dict[str, Source]:
    """The corpus by name, as the index has it."""
    return by_name(index_folder(odd_files[0] / "trainX", frames=1))


@pytest.mark.parametrize("name", [*VIDEOS, "hevc.mp4", "raw.npy", "frames"])
def test_every_start_and_size_gives_the_bits_of_a_plain_read(sources: dict[str, Source], name: str) -> None:
    if name not in sources:
        pytest.skip("no encoder")
    source, reader = sources[name], FrameReader()
    for size in (None, (48, 32), (144, 96)):
        expected = np.stack(list(video.read_frames(source.path, size=size)))
        assert expected.shape == (source.num_frames, *(size or (source.width, source.height))[::-1], 3)
        for start in np.random.default_rng(0).permutation(source.num_frames - T + 1):
            np.testing.assert_array_equal(reader.read(source, start, T, size), expected[start : start + T], f"{start}")
    small, large = (reader.read(source, 9, T, size) for size in ((48, 32), (144, 96)))
    assert small.shape[1:3] == (32, 48) and large.shape[1:3] == (96, 144), "the size may change from read to read"


def test_a_video_stays_open_and_few_do(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = demux.open_video
    monkeypatch.setattr(demux, "open_video", lambda path: (opened.append(path.name), real(path))[1])
    monkeypatch.setattr(readers, "MAX_OPEN_PIXELS", 2 * WIDTH * HEIGHT)
    reader = FrameReader()
    expected = {name: reader.read(sources[name], 9, T) for name in VIDEOS}
    assert sorted(opened) == sorted(VIDEOS * 2), "once for its times, once to be read"
    opened.clear()
    for name in ("vp9.mp4", "mpeg4.avi", "vp9.mp4", VIDEOS[0], "vp9.mp4", "mpeg4.avi"):
        np.testing.assert_array_equal(reader.read(sources[name], 9, T), expected[name])
    assert opened == [VIDEOS[0], "mpeg4.avi"], "the two used last stayed open"
    handles = Path("/proc/self/fd")
    gc.collect()
    if handles.is_dir():
        paths = [os.readlink(link) for link in handles.iterdir() if link.exists()]
        assert sum(path.startswith(str(sources["vp9.mp4"].path.parent)) for path in paths) == 2


def test_long_videos_do_not_stay_open(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's table of an open file grows with its frames."""
    opened: list[str] = []
    real = demux.open_video
    monkeypatch.setattr(demux, "open_video", lambda path: (opened.append(path.name), real(path))[1])
    monkeypatch.setattr(readers, "MAX_OPEN_FRAMES", sum(sources[name].num_frames for name in VIDEOS[1:3]))
    reader = FrameReader()
    for name in VIDEOS[1:3] * 3:
        reader.read(sources[name], 9, T)
    assert sorted(opened) == sorted(VIDEOS[1:3] * 2), "both stay open: once for the times, once to be read"
    for name in (VIDEOS[0], *VIDEOS[1:3]):
        reader.read(sources[name], 9, T)
    assert opened[4:] == [VIDEOS[0], VIDEOS[0], *VIDEOS[1:3]], "the long one took the place of both"


def test_threads_share_a_long_file(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is large: one is open at any time, whatever the threads, and their clips have the bits of own files."""
    name, num = VIDEOS[0], 2 * sources[VIDEOS[0]].num_frames // 3
    expected = [FrameReader().read(sources[name], start, T) for start in range(num)]
    opened: list[av.container.InputContainer] = []
    most = 0
    real = demux.open_video

    def open_video(path: Path) -> av.container.InputContainer:
        nonlocal most
        opened.append(real(path))
        most = max(most, sum(container.streams.video != () for container in opened))
        return opened[-1]

    monkeypatch.setattr(demux, "open_video", open_video)
    monkeypatch.setattr(demux, "LONG", 1)
    files, start = SharedFiles(), threading.Barrier(4)

    def read(thread: int) -> list[np.ndarray]:
        reader = FrameReader(files)
        start.wait()
        return [reader.read(sources[name], (k * 7 + thread * 3) % num, T) for k in range(num)]

    with ThreadPoolExecutor(4) as pool:
        for thread, clips in enumerate(pool.map(read, range(4))):
            for k, clip in enumerate(clips):
                np.testing.assert_array_equal(clip, expected[(k * 7 + thread * 3) % num])
    assert most == 1 and len(opened) <= 1 + 2 * 4, "one for the times, and for each thread a decoder, then the file"


def test_few_long_files_stay_open(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = demux.open_video
    monkeypatch.setattr(demux, "open_video", lambda path: (opened.append(path.name), real(path))[1])
    monkeypatch.setattr(demux, "LONG", 1)
    monkeypatch.setattr(demux, "MAX_SHARED_FRAMES", sum(sources[name].num_frames for name in VIDEOS[:2]))
    reader = FrameReader()
    for name in VIDEOS[:3]:
        reader.read(sources[name], 9, T)
    assert opened == [name for name in VIDEOS[:3] for _ in range(3)], "for the times, a decoder, and to be read"
    opened.clear()
    for name in (VIDEOS[2], VIDEOS[1], VIDEOS[0], VIDEOS[0]):
        reader.read(sources[name], 9, T)
    assert opened == [VIDEOS[0]], "the decoders stay; of the files the two used last"


def test_threads_read_packet_times_once(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = demux.packet_times
    monkeypatch.setattr(demux, "packet_times", lambda source: (calls.append(source.path.name), real(source))[1])
    files, start = SharedFiles(), threading.Barrier(8)

    def read(number: int) -> np.ndarray:
        start.wait()
        return FrameReader(files).read(sources[VIDEOS[0]], number, T)

    with ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(read, range(8)))
    assert calls == [VIDEOS[0]]
    for number, clip in enumerate(clips):
        assert numbers_of(clip) == list(range(number, number + T))
    kept = files.times(sources[VIDEOS[0]])
    assert kept is not None
    assert all(array.dtype == np.int64 and array.base is None for array in kept), "no more than the times are kept"


def test_a_fault_names_the_file_and_the_next_one_is_read(sources: dict[str, Source], tmp_path: Path) -> None:
    reader = FrameReader()
    for name in (VIDEOS[0], "vp9.mp4", "raw.npy"):
        good, path = sources[name], tmp_path / f"bad {name}"
        half, last = good.num_frames // 2, good.num_frames - T
        expected = reader.read(good, half, T)
        for content in (good.path.read_bytes()[: good.num_bytes // 2], b"", b"not a clip"):
            path.write_bytes(content)
            for start in (0, half, last):
                if start or len(content) < 20:
                    with pytest.raises(UserError, match=f"bad {name}: "):
                        reader.read(replace(good, path=path), start, T)
        path.unlink()
        with pytest.raises(UserError, match=f"bad {name}: "):
            reader.read(replace(good, path=path), 0, T)
        np.testing.assert_array_equal(reader.read(good, half, T), expected)


@pytest.mark.parametrize(("name", "long"), [(VIDEOS[0], 1), (VIDEOS[0], 10_000), ("raw.npy", 10_000)])
def test_a_file_cut_short_while_open_gives_what_is_left_or_an_error(
    sources: dict[str, Source], name: str, long: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demux, "LONG", long)
    path, content = tmp_path / name, sources[name].path.read_bytes()
    path.write_bytes(content)
    source, reader = replace(sources[name], path=path), FrameReader()
    middle = source.num_frames * 4 // 9
    expected = reader.read(source, middle, T)
    os.truncate(path, source.num_bytes // 3)
    if name == "raw.npy":
        with pytest.raises(UserError, match=f"{name}: "):
            reader.read(source, middle, T)
    else:
        for start in (middle, 0, middle + 15):
            with suppress(UserError):  # FFmpeg may still hold what it read before
                np.testing.assert_array_equal(
                    reader.read(source, start, T), FrameReader().read(sources[name], start, T)
                )
    path.write_bytes(content)
    np.testing.assert_array_equal(reader.read(source, middle, T), expected)


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
    error = Upright(size)(frame) - rgb.clip(0, 255)
    assert np.abs(error.mean((0, 1))).max() < 0.2 and np.abs(error).mean() < 0.6
