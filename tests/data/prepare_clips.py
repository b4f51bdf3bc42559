"""Clips whose frames tell their number, in every codec, and what the prepare command has made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from priority import usual_priority

from rlv2v.data.index import MANIFEST

N, HEIGHT, WIDTH, BITS = 24, 64, 96, 6


def stamped(num: int = N, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A clip whose frame t shows t in binary: BITS columns, dark for 0 and light for 1, upper half inverted."""
    bits = (np.arange(num)[:, None] >> np.arange(BITS)) & 1
    column = np.arange(width) * BITS // width
    lower = 40 + 176 * bits[:, column]  # (T,W)
    rows = np.arange(height)[None, :, None]
    grey = np.where(rows < height // 2, 256 - lower[:, None], lower[:, None])
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


def stamps(frames: np.ndarray) -> list[int]:
    """The number that each frame of (T,H,W,3) shows; -1 where the halves do not agree."""
    height, width = frames.shape[1:3]
    at = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    lower = frames[:, height * 3 // 4, at, 1] > 128
    upper = frames[:, height // 4, at, 1] < 128
    numbers = (lower << np.arange(BITS)).sum(1)
    return [int(n) if agree else -1 for n, agree in zip(numbers, (lower == upper).all(1), strict=True)]


@usual_priority()
def encode(
    path: Path,
    clip: np.ndarray,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    **options: str,
) -> None:
    """Encode at 10 frames a second, or frame t at `times[t]` tenths of a second."""
    faststart = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=faststart) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for t, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = t if times is None else times[t], Fraction(1, 10)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


VFR = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 25, 26, 27, 30, 33, 36, 39, 42, 43, 44, 45]
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}),
    "vp8.webm": (
        "libvpx",
        "yuv420p",
        {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"},
    ),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "ten bits.mp4": ("libx264", "yuv420p10le", {}),
    "full chroma.mkv": ("libx264", "yuv444p", {}),
    "anim.gif": ("gif", "rgb8", {}),
}


def rows_of(out: Path) -> dict[str, dict]:
    return {Path(row["source"]).name: row for row in json.loads((out / "prepared.json").read_text())["sources"]}


def state(out: Path) -> dict[str, tuple[str, int, int]]:
    """Hash, inode and time of every prepared file."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in ("prepared.json", MANIFEST)]
    return {
        str(p.relative_to(out)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_ino, p.stat().st_mtime_ns)
        for p in files
    }


def contents(out: Path) -> dict[str, str]:
    return {name: sha for name, (sha, _, _) in state(out).items()}
