"""Read a HEIC picture, as phones take them: in a piece or as a grid of tiles, each a picture of its own in HEVC.

FFmpeg decodes the tiles, and PyAV does not say how they lie. So the boxes of the file that do (ISO/IEC 23008-12) are
read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition

from rlv2v.data.upright import Upright
from rlv2v.errors import UserError


class Grid(NamedTuple):
    """Hold how the tiles of a picture lie, row by row, and how the whole of them is shown."""

    rows: int
    columns: int
    width: int
    height: int
    turns: int
    """Quarter turns, counter-clockwise."""
    upside_down: bool
    mirrored: bool


def read_heic(path: Path) -> np.ndarray:
    """Return the picture of a HEIC file, uint8 RGB (H,W,3), upright. Raises `UserError` naming the file."""
    try:
        with av.open(str(path.resolve()), metadata_errors="replace") as container:
            streams = list(container.streams.video)
            tiles = [s for s in streams if s.disposition & Disposition.dependent]
            if not tiles:
                largest = max(streams, key=lambda s: s.width * s.height)
                return Upright()(next(container.decode(largest)))
            frames: dict[int, Any] = {}
            for packet in container.demux(*tiles):
                for frame in packet.decode():
                    frames[packet.stream_index] = frame
            order = [tile.index for tile in tiles]
        grid, upright = read_grid(path.read_bytes()), Upright()
        return put_together(grid, [upright(frames[index]) for index in order[: grid.rows * grid.columns]])
    except (av.FFmpegError, OSError, ValueError, KeyError, StopIteration, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a HEIC picture: {reason}") from error


def put_together(grid: Grid, tiles: list[np.ndarray]) -> np.ndarray:
    """Return the picture of tiles (h,w,3), all of one size. Raises `ValueError` if some are missing."""
    if len(tiles) < grid.rows * grid.columns:
        raise ValueError(f"expected {grid.rows * grid.columns} tiles, got {len(tiles)}")
    rows = [np.concatenate(tiles[r * grid.columns : (r + 1) * grid.columns], 1) for r in range(grid.rows)]
    image = np.rot90(np.concatenate(rows)[: grid.height, : grid.width], grid.turns)
    return np.ascontiguousarray(image[:: -1 if grid.upside_down else 1, :: -1 if grid.mirrored else 1])


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the boxes that follow each other in `data`."""
    place = 0
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        start = 8
        if size == 1:
            (size,), start = struct.unpack_from(">Q", data, place + 8), 16
        end = len(data) if size == 0 else place + size
        if end < place + start:
            raise ValueError("its boxes are damaged")
        yield name.decode("latin-1"), data[place + start : end]
        place = end


def read_grid(data: bytes) -> Grid:
    """Return the grid of a HEIC file's main picture. Raises `ValueError` or `KeyError` where there is none."""
    meta = dict(boxes(dict(boxes(data))["meta"][4:]))
    wide = meta["pitm"][0] > 0
    (main,) = struct.unpack_from(">I" if wide else ">H", meta["pitm"], 4)
    where, place, length = item_place(meta["iloc"], main)
    shape = (meta["idat"] if where else data)[place : place + length]
    _, flags, rows, columns = struct.unpack_from(">BBBB", shape)
    width, height = struct.unpack_from(">II" if flags & 1 else ">HH", shape, 4)
    properties = dict(boxes(meta["iprp"]))
    listed = list(boxes(properties["ipco"]))
    own = dict(listed[k - 1] for k in item_properties(properties["ipma"], main))
    mirror = own["imir"][0] & 1 if "imir" in own else None
    turns = own["irot"][0] & 3 if "irot" in own else 0
    return Grid(rows + 1, columns + 1, width, height, turns, mirror == 0, mirror == 1)


def item_place(iloc: bytes, item: int) -> tuple[int, int, int]:
    """Return where an item's first extent is: 1 for the box idat or 0 for the file, its start and its length."""
    version, sizes, more = iloc[0], iloc[4], iloc[5]
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15
    place = 6

    def number(size: int) -> int:
        nonlocal place
        place += size
        return int.from_bytes(iloc[place - size : place], "big")

    for _ in range(number(4 if version == 2 else 2)):
        name = number(4 if version == 2 else 2)
        where = number(2) & 15 if version else 0
        number(2)
        base = number(base_size)
        extents = []
        for _ in range(number(2)):
            number(index_size if version else 0)
            extents.append((base + number(offset_size), number(length_size)))
        if name == item:
            return (where, *extents[0])
    raise ValueError("its main picture is missing")


def item_properties(ipma: bytes, item: int) -> list[int]:
    """Return the numbers of an item's properties, from 1 on."""
    version, wide = ipma[0], ipma[3] & 1
    (count,), place = struct.unpack_from(">I", ipma, 4), 8
    for _ in range(count):
        name, num = struct.unpack_from(">IB" if version else ">HB", ipma, place)
        place += 5 if version else 3
        numbers = struct.unpack_from(f">{num}{'H' if wide else 'B'}", ipma, place)
        place += num * (2 if wide else 1)
        if name == item:
            return [n & (0x7FFF if wide else 0x7F) for n in numbers]
    return []
