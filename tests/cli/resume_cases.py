"""Videos that are translated, stopped and gone on with, and how two outputs are compared."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from rlv2v.checkpoint.export import pack_translators
from rlv2v.config import Config
from rlv2v.data.video import timed_frames
from rlv2v.model.build import build_nets

PIECE = 12
"""Frames from cut to cut in tests."""
NUM = 45
"""Frames of a source, which are three whole pieces and a part."""


def strange_nets(config: Config) -> Any:
    """Return networks that change every picture, each as those before it say; untrained ones keep what they see."""
    torch.manual_seed(0)
    nets = build_nets(config, discriminators=False)
    with torch.no_grad():
        for weight in nets.g_y.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return nets


def write_strange_run(run: Path) -> Path:
    """Write a run folder with those networks, as training does."""
    run.mkdir()
    nets = strange_nets(config := Config.of("tiny", out=run))
    (run / "config.json").write_text(config.to_json())
    (run / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    return run


def wave_clip(num: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """Return smooth frames that differ."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack([128 + 100 * np.sin(x / 9 + k / 3), 128 + 80 * np.cos(y / 7 - k / 5), 2 * x + k], -1).astype(np.uint8)
        for k in range(num)
    ]


def write_source(path: Path, num: int = NUM, sound: str = "aac") -> Path:
    """Write a video of variable rate, 25 to 10 frames a second, with sound; its clock does not start at 0."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25, time_base=Fraction(1, 1000), options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        track: Any = output.add_stream(sound, rate=48000)
        output.metadata["title"] = "waves"
        packets, time = [], 2000
        for k, frame in enumerate(wave_clip(num)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            time += (40, 40, 100, 60)[k % 4]
            packets += stream.encode(picture)
        packets += stream.encode(None)
        samples = np.random.default_rng(0).normal(0, 0.1, (1, 48 * (time - 2000))).astype(np.float32)
        for start in range(0, samples.shape[1], 960):
            part = av.AudioFrame.from_ndarray(samples[:, start : start + 960], format="fltp", layout="mono")
            part.sample_rate, part.pts, part.time_base = 48000, 96_000 + start, Fraction(1, 48000)
            packets += track.encode(part)
        packets += track.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path


def packets_of(path: Path, kind: str) -> list[tuple[Any, ...]]:
    """Return the packets of one kind of track, with their times and a checksum of their bytes."""
    with av.open(str(path)) as container:
        tracks = [track for track in container.streams if track.type == kind]
        return [
            (p.stream_index, p.pts, p.dts, p.duration, p.is_keyframe, hashlib.sha256(bytes(p)).hexdigest())
            for p in (container.demux(*tracks) if tracks else ())
            if p.size
        ]


def assert_same(path: Path, whole: Path, *, lossless: bool, cuts: int) -> None:
    """Times, sound and tags are the same, and the frames, or the packets of those before the first cuts."""
    got, expected = list(timed_frames(path)), list(timed_frames(whole))
    assert [f.time for f in got] == [f.time for f in expected]
    assert [f.duration for f in got] == [f.duration for f in expected]
    if lossless:
        np.testing.assert_array_equal([f.rgb for f in got], [f.rgb for f in expected])
    else:
        assert np.abs(np.subtract([f.rgb for f in got], [f.rgb for f in expected], dtype=float)).mean() < 4
    if path.is_dir():
        assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
        return
    assert packets_of(path, "audio") == packets_of(whole, "audio")
    keys = [k for k, packet in enumerate(packets_of(path, "video")) if packet[4]]
    assert {PIECE * k for k in range(cuts + 1)} <= {*keys}, "each piece begins with a key frame"
    with av.open(str(path)) as one, av.open(str(whole)) as other:
        assert one.metadata.get("title") == other.metadata.get("title")
        assert [s.type for s in one.streams] == [s.type for s in other.streams]
        assert one.streams.video[0].codec_context.extradata == other.streams.video[0].codec_context.extradata


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
