"""Long videos in seconds: the packets of a short one, written again and again with later times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from data_clips import encode

PIECE, SIDE, RATE = 50, 32, 25
"""Of the short video: frames, of which the first is a key frame; side in pixels; frames a second."""


def write_long(path: Path, num: int, scratch: Path) -> None:
    """Write `num` frames, a multiple of `PIECE`, by the container that the suffix names; `scratch` is a folder."""
    short = scratch / f"piece{path.suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (PIECE, SIDE, SIDE, 3), np.uint8)
    encode(short, noise // 8, rate=RATE, g=str(PIECE), bf="0", crf="35", preset="ultrafast")
    with av.open(str(short)) as source, av.open(str(path), "w") as output:
        stream: Any = output.add_stream_from_template(source.streams.video[0])
        packets = [(bytes(p), p.pts, p.is_keyframe) for p in source.demux(video=0) if p.size]
        base = source.streams.video[0].time_base
        step = packets[1][1] - packets[0][1]
        for n in range(num):
            data, _, key = packets[n % PIECE]
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, base, key
            packet.pts = packet.dts = n * step
            packet.duration = step
            output.mux(packet)
