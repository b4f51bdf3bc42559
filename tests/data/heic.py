"""Write a HEIC picture in tiles, as phones do, box by box: FFmpeg reads such files and writes none."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from priority import usual_priority

TILE = 64


def box(name: str, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I4s", len(data) + 8, name.encode()) + data


def full_box(name: str, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">I", version << 24 | flags), *content)


@usual_priority()
def coded(tile: np.ndarray, scratch: Path) -> tuple[bytes, bytes]:
    """Return the packet and the extradata (hvcC) of one picture in HEVC."""
    options = {"x265-params": "log-level=none:info=0:bframes=0:keyint=1", "crf": "4"}
    with av.open(str(scratch), "w") as output:
        stream: Any = output.add_stream("libx265", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = TILE, TILE, "yuv420p"
        stream.codec_context.thread_count = 1
        output.start_encoding()
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(tile), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        output.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(str(scratch)) as container:
        packet = next(container.demux(video=0))
        return bytes(packet), container.streams.video[0].codec_context.extradata or b""


def write_heic(path: Path, image: np.ndarray, scratch: Path, *, turns: int = 0, mirror: int | None = None) -> Path:
    """Write an image as a grid of tiles of 64x64; shown turned counter-clockwise, then mirrored (0: up-down)."""
    height, width = image.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    image = np.pad(image, ((0, rows * TILE - height), (0, columns * TILE - width), (0, 0)), mode="edge")
    tiles = [
        coded(image[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE], scratch)
        for r in range(rows)
        for c in range(columns)
    ]
    num, grid = len(tiles), len(tiles) + 1
    items = [full_box("infe", struct.pack(">HH4s", k, 0, b"hvc1"), b"\0", version=2, flags=1) for k in range(1, grid)]
    items.append(full_box("infe", struct.pack(">HH4s", grid, 0, b"grid"), b"\0", version=2))
    links = box("dimg", struct.pack(f">HH{num}H", grid, num, *range(1, grid)))
    sizes = [full_box("ispe", struct.pack(">II", *size)) for size in ((TILE, TILE), (width, height))]
    sizes.append(box("irot", bytes([turns])))
    sizes += [] if mirror is None else [box("imir", bytes([mirror]))]
    own = bytes(range(3, 3 + len(sizes) - 1))
    has = [struct.pack(">HBBB", k, 2, 0x81, 2) for k in range(1, grid)] + [struct.pack(">HB", grid, len(own)) + own]
    properties = box(
        "iprp",
        box("ipco", box("hvcC", tiles[0][1]), *sizes),
        full_box("ipma", struct.pack(">I", grid), *has),
    )
    shape = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)

    def meta(start: int) -> bytes:
        places, place = [], start
        for number, (packet, _) in enumerate(tiles, 1):
            places.append(struct.pack(">HHHHII", number, 0, 0, 1, place, len(packet)))
            place += len(packet)
        places.append(struct.pack(">HHHHII", grid, 1, 0, 1, 0, len(shape)))
        return full_box(
            "meta",
            full_box("hdlr", struct.pack(">I4s12x", 0, b"pict"), b"\0"),
            full_box("pitm", struct.pack(">H", grid)),
            full_box("iinf", struct.pack(">H", grid), *items),
            full_box("iref", links),
            properties,
            box("idat", shape),
            full_box("iloc", struct.pack(">HH", 0x4400, grid), *places, version=1),
        )

    start = box("ftyp", b"heic", struct.pack(">I", 0), b"mif1heic")
    content = b"".join(packet for packet, _ in tiles)
    path.write_bytes(start + meta(len(start) + len(meta(0)) + 8) + box("mdat", content))
    return path
