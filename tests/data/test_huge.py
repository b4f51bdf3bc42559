"""A header that says more than is there takes no memory: pictures of a gigapixel in a file of some bytes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from odd_files import two_sizes

from rlv2v.data.index import index_folder
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError

SIDE = 30_000


def png(width: int, height: int) -> bytes:
    """Return a PNG that is cut off after the start of its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))[:20])]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def peak() -> int:
    """Return the peak of this process's memory since it was last cleared, KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("name", ["still.png", "chunk.png", "movie.apng", "movie.y4m"])
def test_a_lie_about_the_size_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "movie.y4m":
        path.write_bytes(b"YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C420jpeg\nFRAME\n" % (SIDE, SIDE) + bytes(1000))
    else:
        path.write_bytes(png(64, 48) + b"\x7f\xff\xff\xffIDAT" if name == "chunk.png" else png(SIDE, SIDE))
    clear = Path("/proc/self/clear_refs")
    before = 0
    if clear.exists():
        clear.write_text("5")  # the peak counts from here on
        before = peak()
    (source,) = index_folder(tmp_path, frames=1, stills=True)
    assert source.status == "excluded"
    with pytest.raises(UserError, match=f"{name}: "):
        list(read_frames(path))
    if clear.exists():
        assert peak() - before < 300 * 1024, "KiB; the picture would take 2.7 GB"


def test_a_picture_that_grows_on_the_way_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder itself knows the limit: the header may say less than its pictures."""
    two_sizes(path := tmp_path / "sizes.ts")
    assert len(list(read_frames(path))) == 20
    monkeypatch.setattr("rlv2v.data.decoding.MAX_PIXELS", 64 * 48)
    with pytest.raises(UserError, match=r"sizes.ts: .*cannot be decoded"):
        list(read_frames(path))
    monkeypatch.setattr("rlv2v.data.decoding.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UserError, match=r"sizes.ts: pictures of 64x48; expected at most 3071 pixels"):
        list(read_frames(path))
