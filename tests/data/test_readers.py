"""Exactly the right frames from stamped sources of every codec, in any order, at any size; faults are named."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from data_clips import VP9_FAST, by_name, encode, needs_dali, numbers_of, only_x, smooth, stamped, write_frames

from rlv2v.data import readers, video
from rlv2v.data.dali import decodes
from rlv2v.data.index import Source, index_folder
from rlv2v.data.loader import Loader
from rlv2v.data.readers import FrameReader
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

T, LENGTH, SIDE = 16, 90, 64
VP9 = {"g": "16", "cpu-used": "8", "deadline": "realtime"}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264 with B-frames.mp4": ("libx264", "yuv420p", {"g": "15", "bf": "3", "b_strategy": "0"}),
    "h264 open GOP.mp4": ("libx264", "yuv420p", {"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264 one key frame.mkv": ("libx264", "yuv420p", {"g": "250"}),
    "h264 10 bit.mp4": ("libx264", "yuv420p10le", {"g": "12"}),
    "h264 in a stream.ts": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=20:bframes=4"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "16", "deadline": "realtime"}),
    "vp8 with alt-ref.webm": ("libvpx", "yuv420p", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.mp4": ("libvpx-vp9", "yuv420p", VP9),
    "vp9 with alt-ref.webm": ("libvpx-vp9", "yuv420p", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "25"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"g": "20", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12"}),
    "mpeg4 with B-frames.mp4": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "gif.gif": ("gif", "rgb8", {}),
    "h264 at a variable rate.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "3"}),
    "vp9 at a variable rate.webm": ("libvpx-vp9", "yuv420p", VP9),
    "h264 truncated.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "h264 truncated between packets.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "3", "b_strategy": "0"}),
    "vp9 truncated.webm": ("libvpx-vp9", "yuv420p", VP9),
}
OTHERS = {"vp9 short.mp4": 48, "lossless vp9.mp4": 64, "raw.npy": LENGTH, "folder": 40}
NAMES = (*CODECS, *OTHERS)
VIDEOS = ["h264 with B-frames.mp4", "hevc.mp4", "h264 at a variable rate.mp4", "vp9.mp4", "mpeg4.avi"]


def clip_of(name: str, length: int) -> np.ndarray:
    """Waves with two stamps in the upper half: the file's place in NAMES, and the frame's number."""
    clip = smooth(length, SIDE, SIDE)
    for t, frame in enumerate(clip):
        frame[:16], frame[16:32] = stamped(NAMES.index(name), SIDE, 16), stamped(t, SIDE, 16)
    return clip


def write(path: Path) -> None:
    codec, pixels, options = CODECS[path.name]
    times = [i + i // 3 + 5 * (i // 20) for i in range(LENGTH)] if "variable" in path.name else None
    cut = "truncated" in path.name
    faststart = cut and path.suffix == ".mp4"
    encode(path, clip_of(path.name, LENGTH), codec, pixels, times=times, rate=25, faststart=faststart, **options)
    if "between packets" in path.name:
        # with the B-frames before it in time gone, the last frame would take the number of one of them
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
        last = next(i for i in range(60, LENGTH) if (packets[i + 1].pts or 0) < (packets[i].pts or 0))
        os.truncate(path, (packets[last].pos or 0) + packets[last].size)
    elif cut:
        os.truncate(path, int(0.7 * path.stat().st_size))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """One source of each name, in the order of NAMES, as the index has it."""
    root = tmp_path_factory.mktemp("stamped")
    for name in CODECS:
        write(root / name)
    encode(root / "vp9 short.mp4", clip_of("vp9 short.mp4", 48), "libvpx-vp9", rate=25, **VP9_FAST)
    write_clip(root / "lossless vp9.mp4", clip_of("lossless vp9.mp4", 64), 25, "vp9-lossless")
    np.save(root / "raw.npy", clip_of("raw.npy", LENGTH))
    write_frames(root / "folder", clip_of("folder", 40))
    sources = by_name(index_folder(root, frames=T))
    return {name: sources[name] for name in NAMES}


def test_the_index_numbers_every_source(sources: dict[str, Source]) -> None:
    for name, source in sources.items():
        if "truncated" in name:
            assert T < source.num_frames < LENGTH, source
            assert source.status == "truncated" or source.path.suffix == ".webm", source  # which holds no count to miss
        else:
            assert (source.status, source.num_frames) == ("ok", OTHERS.get(name, LENGTH)), source
    by_dali = {name for name, source in sources.items() if decodes(source, "cpu")}
    assert by_dali >= {"vp9 short.mp4", "lossless vp9.mp4", "vp9.mp4"}


def wrong(clip: np.ndarray, source: Source, start: int, num: int) -> list[int]:
    """Return the frames of a clip that are not frames start .. start+num of the source; [-1] for a wrong shape."""
    if clip.shape != (num, SIDE, SIDE, 3) or clip.dtype != np.uint8:
        return [-1]
    files, numbers = numbers_of(clip[:, :16]), numbers_of(clip[:, 16:32])
    place = NAMES.index(source.path.name)
    return [i for i in range(num) if (files[i], numbers[i]) != (place, start + i)]


def test_random_reads_give_the_frames_asked_for(sources: dict[str, Source]) -> None:
    reader, rng, faults = FrameReader(), np.random.default_rng(1), []
    for k in range(300):
        source = sources[NAMES[k % len(NAMES)]]
        num = int(rng.integers(1, T + 1))
        start = int(rng.integers(source.num_frames - num + 1))
        if bad := wrong(reader.read(source, start, num), source, start, num):
            faults.append((source.path.name, start, bad))
    assert not faults


@pytest.mark.parametrize(
    ("backend", "cache_mib", "threads"), [("auto", 0, 1), ("auto", 64, 3), pytest.param("dali", 0, 1, marks=needs_dali)]
)
def test_the_loader_gives_the_frames_it_chose(
    sources: dict[str, Source], backend: Any, cache_mib: int, threads: int
) -> None:
    options: dict[str, Any] = {"backend": backend, "cache_mib": cache_mib, "threads": threads}
    loader = Loader(
        only_x(list(sources.values())), batch={"x": 5}, frames=T, size=SIDE, seed=2, augment="none", **options
    )
    faults, seen = [], set()
    for _ in range(30):
        samples = loader.sampler.samples("x", loader.step)
        batch = next(loader).x
        assert batch is not None
        for sample, clip in zip(samples, batch.numpy(), strict=True):
            seen.add(sample.source.path.name)
            if bad := wrong(clip, sample.source, sample.start, T):
                faults.append((sample.source.path.name, sample.start, bad))
    loader.close()
    assert not faults and len(seen) > len(NAMES) // 2


def test_a_wrong_frame_would_be_seen(sources: dict[str, Source]) -> None:
    for k, source in enumerate(sources.values()):
        clip = FrameReader().read(source, 3, 4)
        assert wrong(clip, source, 3, 4) == []
        assert wrong(clip, source, 2, 4) == wrong(clip, source, 4, 4) == [0, 1, 2, 3]
        assert wrong(clip[[0, 1, 1, 3]], source, 3, 4) == [2]
        assert wrong(clip, sources[NAMES[k - 1]], 3, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [*VIDEOS, "raw.npy", "folder"])
def test_every_start_and_size_gives_the_bits_of_a_plain_read(sources: dict[str, Source], name: str) -> None:
    source, reader = sources[name], FrameReader()
    for size in (None, (48, 32), (144, 96)):
        expected = np.stack(list(video.read_frames(source.path, size=size)))
        assert expected.shape == (source.num_frames, *(size or (SIDE, SIDE))[::-1], 3)
        for start in np.random.default_rng(0).permutation(source.num_frames - 4 + 1):
            np.testing.assert_array_equal(reader.read(source, start, 4, size), expected[start : start + 4], f"{start}")
    small, large = (reader.read(source, 20, 4, size) for size in ((48, 32), (144, 96)))
    assert small.shape[1:3] == (32, 48) and large.shape[1:3] == (96, 144), "the size may change from read to read"


def test_a_video_stays_open_and_few_do(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = video.open_video
    monkeypatch.setattr(video, "open_video", lambda path: (opened.append(path.name), real(path))[1])
    monkeypatch.setattr(readers, "MAX_OPEN_PIXELS", 2 * SIDE**2)
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


def test_a_fault_names_the_file_and_the_next_one_is_read(sources: dict[str, Source], tmp_path: Path) -> None:
    reader = FrameReader()
    for name in (VIDEOS[0], "vp9.mp4", "raw.npy"):
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


@pytest.mark.parametrize("name", [VIDEOS[0], "raw.npy"])
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
