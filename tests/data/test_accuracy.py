"""Exactly the right frames: random (file, start) draws from stamped sources of every codec, through every reading path.

Every frame carries its file and its number in squares that outlive compression. RLV2V_DRAWS sets the number of draws
of each path.
"""

from __future__ import annotations

import importlib
import os
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from priority import usual_priority

from rlv2v.data import readers
from rlv2v.data.index import Dataset, Source, index_folder
from rlv2v.data.loader import Loader
from rlv2v.data.readers import FrameReader
from rlv2v.data.writer import write_clip, write_image

DRAWS = int(os.environ.get("RLV2V_DRAWS", "2000"))
T, LENGTH, SIDE = 16, 90, 64
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264 with B-frames.mp4": ("libx264", "yuv420p", {"g": "15", "bf": "3", "b_strategy": "0"}),
    "h264 open GOP.mp4": ("libx264", "yuv420p", {"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264 one key frame.mkv": ("libx264", "yuv420p", {"g": "250"}),
    "h264 10 bit.mp4": ("libx264", "yuv420p10le", {"g": "12"}),
    "h264 in a stream.ts": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=20:bframes=4"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "16", "deadline": "realtime"}),
    "vp8 with alt-ref.webm": ("libvpx", "yuv420p", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.mp4": ("libvpx-vp9", "yuv420p", {"g": "16", "cpu-used": "8", "deadline": "realtime"}),
    "vp9 with alt-ref.webm": ("libvpx-vp9", "yuv420p", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "25"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"g": "20", "preset": "12"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12"}),
    "mpeg4 with B-frames.mp4": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "gif.gif": ("gif", "rgb8", {}),
    "h264 at a variable rate.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "3"}),
    "vp9 at a variable rate.webm": ("libvpx-vp9", "yuv420p", {"g": "16", "cpu-used": "8", "deadline": "realtime"}),
    "h264 truncated.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "h264 truncated between packets.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "3", "b_strategy": "0"}),
    "vp9 truncated.webm": ("libvpx-vp9", "yuv420p", {"g": "16", "cpu-used": "8", "deadline": "realtime"}),
}
SHORT = "vp9 short.mp4"
OTHERS = (SHORT, "lossless vp9.mp4", "raw.npy", "folder")
NAMES = (*CODECS, *OTHERS)
CUT = 0.7  # of the bytes of a truncated file


def peers() -> ModuleType:
    return importlib.import_module("data_peers")


def stamped(name: str, length: int) -> np.ndarray:
    """Moving waves, with the stamps of the file's place in NAMES."""
    t, y, x = np.mgrid[:length, :SIDE, :SIDE].astype(float)
    waves = [
        128 + 60 * np.sin(x / 9 + t / 5),
        128 + 60 * np.cos(y / 7 - t / 4),
        128 + 60 * np.sin((x + y) / 11 + t / 3),
    ]
    clip = np.stack(waves, -1).astype(np.uint8)
    return np.stack([peers().stamp(frame, NAMES.index(name), i) for i, frame in enumerate(clip)])


@usual_priority()
def encode(path: Path, clip: np.ndarray, codec: str, pixels: str, options: dict[str, str]) -> None:
    flags = {"movflags": "+faststart"} if "truncated" in path.name and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=flags) as output:
        stream: Any = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, pixels
        stream.codec_context.thread_count = 1  # the same bytes every time
        for i, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = (
                (i + i // 3 + 5 * (i // 20)) if "variable" in path.name else i,
                Fraction(1, 25),
            )
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    if "between packets" in path.name:
        # with the B-frames before it in time gone, the last frame would take the number of one of them
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
        last = next(i for i in range(60, LENGTH) if (packets[i + 1].pts or 0) < (packets[i].pts or 0))
        os.truncate(path, (packets[last].pos or 0) + packets[last].size)
    elif "truncated" in path.name:
        os.truncate(path, int(CUT * path.stat().st_size))


@pytest.fixture(scope="module")
def sources(bench_folder: None, tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """One source of each name, in the order of NAMES, as the index has it."""
    root = tmp_path_factory.mktemp("stamped")
    for name in CODECS:
        encode(root / name, stamped(name, LENGTH), *CODECS[name])
    short = stamped(SHORT, 48)
    encode(root / SHORT, short, *CODECS["vp9.mp4"])
    write_clip(root / "lossless vp9.mp4", stamped("lossless vp9.mp4", 64), 25, "vp9-lossless")
    np.save(root / "raw.npy", stamped("raw.npy", LENGTH))
    (root / "folder").mkdir()
    for i, frame in enumerate(stamped("folder", 40)):
        write_image(root / "folder" / f"{i}.png", frame)
    found = {source.path.name: source for source in index_folder(root, frames=T)}
    return [found[name] for name in NAMES]


def test_the_index_numbers_every_source(sources: list[Source]) -> None:
    lengths = dict.fromkeys(CODECS, LENGTH) | dict(zip(OTHERS, (48, 64, LENGTH, 40), strict=True))
    for source in sources:
        name = source.path.name
        if "truncated" in name:
            assert T < source.num_frames < LENGTH, source
            assert source.status == "truncated" or source.path.suffix == ".webm", source  # which holds no count to miss
        else:
            assert (source.status, source.num_frames) == ("ok", lengths[name]), source
    assert not readers.has_dali() or {s.path.name for s in sources if s.dali} >= {SHORT, "lossless vp9.mp4", "vp9.mp4"}


def wrong(clip: np.ndarray, source: Source, start: int, num: int) -> list[int]:
    """The frames of a clip that are not frames start .. start+num of the source; [-1] for a wrong shape."""
    if clip.shape != (num, SIDE, SIDE, 3) or clip.dtype != np.uint8:
        return [-1]
    asked = NAMES.index(source.path.name) * 1024 + start + np.arange(num)
    return [int(i) for i in np.flatnonzero(peers().read_stamps(clip) != asked)]


def test_random_reads_give_the_frames_asked_for(sources: list[Source]) -> None:
    reader, rng, faults = FrameReader(), np.random.default_rng(1), list[tuple[str, int, list[int]]]()
    for draw in range(DRAWS):
        source = sources[draw % len(sources)]
        num = int(rng.integers(1, T + 1))
        start = int(rng.integers(source.num_frames - num + 1))
        if bad := wrong(reader.read(source, start, num), source, start, num):
            faults.append((source.path.name, start, bad))
    assert not faults


@pytest.mark.parametrize(("backend", "cache_mib", "threads"), [("auto", 0, 1), ("auto", 64, 3), ("dali", 0, 1)])
def test_the_loader_gives_the_frames_it_drew(sources: list[Source], backend: Any, cache_mib: int, threads: int) -> None:
    if backend == "dali" and not readers.has_dali():
        pytest.skip("DALI is not made for this platform")
    dataset = Dataset(sources[0].path.parent, {"x": sources, "y": [], "z": [], "s": []}, [], "")
    loader = Loader(
        dataset, batch={"x": 5}, frames=T, size=SIDE, seed=2, augment="none", threads=threads, backend=backend,
        cache_mib=cache_mib,
    )  # fmt: skip
    faults, seen = [], set()
    for _ in range(DRAWS // 5):
        draws = loader.draws("x", loader.step)
        batch = next(loader).x
        assert batch is not None
        for draw, clip in zip(draws, batch.numpy(), strict=True):
            seen.add(draw.source.path.name)
            if bad := wrong(clip, draw.source, draw.start, T):
                faults.append((draw.source.path.name, draw.start, bad))
    loader.close()
    assert not faults and len(seen) > len(NAMES) // 2


def test_a_wrong_frame_would_be_seen(sources: list[Source]) -> None:
    for source in sources:
        clip = FrameReader().read(source, 3, 4)
        assert wrong(clip, source, 3, 4) == []
        assert wrong(clip, source, 2, 4) == wrong(clip, source, 4, 4) == [0, 1, 2, 3]
        assert wrong(clip[[0, 1, 1, 3]], source, 3, 4) == [2]
        assert wrong(clip, sources[sources.index(source) - 1], 3, 4) == [0, 1, 2, 3]
