"""Exactly the right frames: random (file, start) from stamped sources of every codec, through every reading path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data_clips import VP9_FAST, by_name, encode, needs_dali, numbers_of, only_x, smooth, stamped, write_frames

from rlv2v.data.index import Source, index_folder
from rlv2v.data.loader import Loader
from rlv2v.data.readers import FrameReader
from rlv2v.data.writer import write_clip

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
COUNTS = [100, pytest.param(2000, marks=pytest.mark.thorough)]


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
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """One source of each name, in the order of NAMES, as the index has it."""
    root = tmp_path_factory.mktemp("stamped")
    for name in CODECS:
        write(root / name)
    encode(root / "vp9 short.mp4", clip_of("vp9 short.mp4", 48), "libvpx-vp9", rate=25, **VP9_FAST)
    write_clip(root / "lossless vp9.mp4", clip_of("lossless vp9.mp4", 64), 25, "vp9-lossless")
    np.save(root / "raw.npy", clip_of("raw.npy", LENGTH))
    write_frames(root / "folder", clip_of("folder", 40))
    sources = by_name(index_folder(root, frames=T))
    return [sources[name] for name in NAMES]


def test_the_index_numbers_every_source(sources: list[Source]) -> None:
    for source in sources:
        name = source.path.name
        if "truncated" in name:
            assert T < source.num_frames < LENGTH, source
            assert source.status == "truncated" or source.path.suffix == ".webm", source  # which holds no count to miss
        else:
            assert (source.status, source.num_frames) == ("ok", OTHERS.get(name, LENGTH)), source
    assert {s.path.name for s in sources if s.dali} >= {"vp9 short.mp4", "lossless vp9.mp4", "vp9.mp4"}


def wrong(clip: np.ndarray, source: Source, start: int, num: int) -> list[int]:
    """Return the frames of a clip that are not frames start .. start+num of the source; [-1] for a wrong shape."""
    if clip.shape != (num, SIDE, SIDE, 3) or clip.dtype != np.uint8:
        return [-1]
    files, numbers = numbers_of(clip[:, :16]), numbers_of(clip[:, 16:32])
    place = NAMES.index(source.path.name)
    return [i for i in range(num) if (files[i], numbers[i]) != (place, start + i)]


@pytest.mark.parametrize("count", COUNTS)
def test_random_reads_give_the_frames_asked_for(sources: list[Source], count: int) -> None:
    reader, rng, faults = FrameReader(), np.random.default_rng(1), []
    for k in range(count):
        source = sources[k % len(sources)]
        num = int(rng.integers(1, T + 1))
        start = int(rng.integers(source.num_frames - num + 1))
        if bad := wrong(reader.read(source, start, num), source, start, num):
            faults.append((source.path.name, start, bad))
    assert not faults


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("backend", "cache_mib", "threads"), [("auto", 0, 1), ("auto", 64, 3), pytest.param("dali", 0, 1, marks=needs_dali)]
)
def test_the_loader_gives_the_frames_it_chose(
    sources: list[Source], backend: Any, cache_mib: int, threads: int, count: int
) -> None:
    options: dict[str, Any] = {"backend": backend, "cache_mib": cache_mib, "threads": threads}
    loader = Loader(only_x(sources), batch={"x": 5}, frames=T, size=SIDE, seed=2, augment="none", **options)
    faults, seen = [], set()
    for _ in range(count // 5):
        samples = loader.sampler.samples("x", loader.step)
        batch = next(loader).x
        assert batch is not None
        for sample, clip in zip(samples, batch.numpy(), strict=True):
            seen.add(sample.source.path.name)
            if bad := wrong(clip, sample.source, sample.start, T):
                faults.append((sample.source.path.name, sample.start, bad))
    loader.close()
    assert not faults and len(seen) > len(NAMES) // 2


def test_a_wrong_frame_would_be_seen(sources: list[Source]) -> None:
    for source in sources:
        clip = FrameReader().read(source, 3, 4)
        assert wrong(clip, source, 3, 4) == []
        assert wrong(clip, source, 2, 4) == wrong(clip, source, 4, 4) == [0, 1, 2, 3]
        assert wrong(clip[[0, 1, 1, 3]], source, 3, 4) == [2]
        assert wrong(clip, sources[sources.index(source) - 1], 3, 4) == [0, 1, 2, 3]
