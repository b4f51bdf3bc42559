"""Clips whose frames carry their numbers, encoders for every codec, and datasets made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from priority import usual_priority

from rlv2v.data.dali import has_dali
from rlv2v.data.images import write_image
from rlv2v.data.index import MANIFEST, Dataset, Source
from rlv2v.data.loader import Loader

needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
BACKENDS = ["auto", pytest.param("dali", marks=needs_dali)]
WIDTH, HEIGHT = 96, 64
"""Below 64 pixels x265 writes outside its memory."""
VP9_FAST = {"lag-in-frames": "0", "auto-alt-ref": "0", "deadline": "realtime", "cpu-used": "8"}


def stamped(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return RGB (H,W,3) that carries `number` < 256 as 4x2 black and white blocks, which any codec leaves readable.

    A frame smaller than 32x16 carries a number below 10 as a level of grey.
    """
    if width < 32 or height < 16:
        return np.full((height, width, 3), 25 * number, np.uint8)
    bits = (number >> np.arange(8)) & 1
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 4 // width
    return np.repeat((bits.reshape(2, 4)[np.ix_(rows, columns)] * 255).astype(np.uint8)[..., None], 3, 2)


def stamped_clip(numbers: Iterable[int], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return (T,H,W,3) with one stamped frame for each number."""
    return np.stack([stamped(number, width, height) for number in numbers])


def number_of(frame: np.ndarray) -> int:
    """Return the number that a frame (H,W,3) carries: the middle half of each block decides."""
    height, width = frame.shape[:2]
    if width < 32 or height < 16:
        return round(float(frame.mean()) / 25)
    grey, number = frame.mean(2), 0
    for bit in range(8):
        (top, left), (h, w) = divmod(bit, 4), (height / 2, width / 4)
        block = grey[round((top + 0.25) * h) : round((top + 0.75) * h), round((left + 0.25) * w) :][:, : round(w / 2)]
        number += int(block.mean() > 127) << bit
    return number


def numbers_of(clip: Iterable[np.ndarray]) -> list[int]:
    """Return the number of each frame."""
    return [number_of(frame) for frame in clip]


def smooth(frames: int, height: int, width: int, phase: float = 0) -> np.ndarray:
    """Return moving waves (T,H,W,3) without sharp edges, different in each frame."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    waves = [
        128 + 100 * np.sin(x / width * 3 + t + phase),
        128 + 80 * np.cos(y / height * 4 + t / 2),
        60 + 140 * x / width,
    ]
    return np.stack(waves, -1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio, dB."""
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


@usual_priority()
def encode(
    path: Path,
    clip: Iterable[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    times: Sequence[int] | None = None,
    rate: int = 10,
    ticks: int = 0,
    rotation: int = 0,
    faststart: bool = False,
    **options: str,
) -> None:
    """Write frames (H,W,3) on one thread, frame t shown at `times[t]` (None: t) in units of 1 / (ticks or rate) s."""
    frames = list(clip)
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.thread_count = 1
        if ticks:
            stream.codec_context.time_base = Fraction(1, ticks)
        if rotation:
            stream.set_display_rotation(rotation)
        for t, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = times[t] if times else t, Fraction(1, ticks or rate)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


def trim(path: Path, num: int) -> None:
    """Cut `num` frames off the start of an MP4 of 10 frames a second by its edit list alone, as phones do."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        step = int(1 / container.streams.video[0].time_base) // 10
    place = data.index(b"elst") + 16  # after version, flags, number of entries and the length of the first
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + num * step).to_bytes(4, "big")
    path.write_bytes(data)


def write_frames(folder: Path, clip: Iterable[np.ndarray]) -> None:
    """Write a folder of numbered PNGs, 10.png after 9.png."""
    folder.mkdir(parents=True)
    for t, frame in enumerate(clip):
        write_image(folder / f"{t}.png", frame)


def only_x(sources: list[Source]) -> Dataset:
    """Return a dataset with these sources as X and no other set."""
    return Dataset(sources[0].path.parent, {"x": sources, "y": [], "z": [], "s": []}, [], "")


def open_loader(data: Dataset, **options: Any) -> Loader:
    """Return a loader of clips of 4 frames, 16x16."""
    return Loader(data, **{"batch": {"x": 3, "y": 2, "z": 1, "s": 2}, "frames": 4, "size": 16, "seed": 0, **options})


def by_name(sources: list[Source]) -> dict[str, Source]:
    """Return the sources by the names of their files."""
    return {source.path.name: source for source in sources}


def prepared_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of prepared.json by the names of their sources."""
    return {Path(row["source"]).name: row for row in json.loads((out / "prepared.json").read_text())["sources"]}


def prepared_files(out: Path) -> dict[str, tuple[str, int, int]]:
    """Return SHA-256, inode and time of every prepared file."""
    files = [p for p in out.glob("*/*") if p.is_file() and p.name != MANIFEST]
    return {
        str(p.relative_to(out)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_ino, p.stat().st_mtime_ns)
        for p in files
    }


def prepared_hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every prepared file."""
    return {name: sha256 for name, (sha256, _, _) in prepared_files(out).items()}
