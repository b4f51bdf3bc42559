"""Write the paper's synthetic dataset as real video files (RL-V2V-GAN section 6.1; our reading: docs/method.md).

X = a coloured rectangle moving over black; Y = a circle over a background that is blue (0,0,255) in the first half of
the clip and red (255,0,0) in the second; Z = rectangles on that background; S = still rectangles on blue or on red.
Hidden truth of an X clip: the same rectangle on Y's background. Every clip is one file of `frames` frames.

Two settings change that. Reading `paper` follows the words of section 6.1: Z = circles on black, S = still circles on
blue or on red. Switch `crossing` makes the background turn red when something happens in the content: at the first
frame in which the object's centre has left the half of the frame, left or right, that it started in. That frame is
drawn uniformly from the second to the last, and so is the direction. So neither the time nor the place gives the colour
away, only where the object has been; the rule survives a left-right flip, but no transpose.

Sides of rectangles and diameters of circles are uniform in [size/4, size/2]; an object moves in a straight line at
constant speed (at most size/16 pixels a frame on each axis) and stays inside. Colours keep a distance of 0.45 (RGB in
0..1) from black, blue and red. Files are lossless VP9 (planar RGB): they decode to exactly the pixels drawn, with PyAV
and with DALI's CPU decoder.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rlv2v.data.images import write_image
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.files import PARTIAL

BLACK, BLUE, RED = (0, 0, 0), (0, 0, 255), (255, 0, 0)
MIN_COLOUR_DISTANCE = 0.45
FPS = 8
SETS = ("trainX", "trainY", "trainZ", "trainS", "valX", "testX")
"""Position in this tuple is the set's part of every draw's address: never reorder."""
Reading = Literal["ours", "paper"]
Switch = Literal["half", "crossing"]


@dataclass(frozen=True)
class Counts:
    """Hold how much of each set is written; the defaults are the paper's."""

    x: int = 600
    """Frames of X."""
    y: int = 100
    """Frames of Y."""
    z: int = 100
    """Frames of Z; 0 leaves the set empty."""
    s: int = 100
    """Images of S; 0 leaves the set empty."""
    val: int = 32
    """Clips of valX, each with its hidden truth in valTruth."""
    test: int = 32
    """Clips of testX, each with its hidden truth in testTruth."""


def background(frames: int, size: int, red_from: int | None = None) -> np.ndarray:
    """Return Y's background, uint8 (T,H,W,3): blue for frames < `red_from` (None: T/2), red from there on."""
    clip = np.empty((frames, size, size, 3), np.uint8)
    red_from = frames // 2 if red_from is None else red_from
    clip[:red_from], clip[red_from:] = BLUE, RED
    return clip


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Return a uniform colour, uint8 (3,), redrawn until it is far enough from black, blue and red."""
    while True:
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        distances = np.linalg.norm((colour - np.array([BLACK, BLUE, RED], float)) / 255, axis=1)
        if distances.min() >= MIN_COLOUR_DISTANCE:
            return colour


def moving_mask(rng: np.random.Generator, shape: str, frames: int, size: int) -> np.ndarray:
    """Return where a random moving object is, bool (T,H,W). shape: `rectangle` or `circle`."""
    extent, start, end = random_line(rng, shape, frames, size)
    return drawn_mask(shape, extent, np.linspace(start, end, frames), size)


def crossing_mask(rng: np.random.Generator, shape: str, frames: int, size: int) -> tuple[np.ndarray, int]:
    """Return a moving object that crosses the vertical middle of the frame once, and the first frame after it.

    In y it moves as every object does. In x its centre is v * (t - t_c) from the middle at frame t, where the crossing
    t_c lies half a frame before the returned one, and v is at most size/16 and small enough to stay inside.
    """
    red_from = int(rng.integers(1, frames))
    while True:
        extent, start, end = random_line(rng, shape, frames, size)
        corner = np.linspace(start, end, frames)
        times = np.arange(frames) - (red_from - 0.5)
        speed = rng.uniform(0.5, 1) * min(size / 16, (size - extent[1]) / 2 / np.abs(times).max())
        corner[:, 1] = (size - extent[1]) / 2 + rng.choice((-1, 1)) * speed * times
        if crossed_at(2 * np.rint(corner[:, 1]) + extent[1] - size) == red_from:  # rounded to pixels, one may come late
            return drawn_mask(shape, extent, corner, size), red_from


def crossed_at(offset: np.ndarray) -> int | None:
    """Return the first index whose sign is not that of the first offset, (T,); None where none is, or it is 0 there."""
    left = np.sign(offset) != np.sign(offset[0])
    return int(left.argmax()) if offset[0] and left.any() else None


def random_line(
    rng: np.random.Generator, shape: str, frames: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a random object's extent, and its upper left corner in the first and the last frame, as (y, x)."""
    extent = np.resize(rng.integers(size // 4, size // 2 + 1, 2 if shape == "rectangle" else 1), 2)
    room = size - extent
    start, end = rng.uniform(0, room), rng.uniform(0, room)
    reach = size / 16 * max(frames - 1, 1)
    return extent, start, start + np.clip(end - start, -reach, reach)


def drawn_mask(shape: str, extent: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:
    """Return where an object is, bool (T,H,W), by its upper left corner in each frame, (T,2), rounded to pixels."""
    pixel = np.rint(corner).astype(int)[:, :, None, None]  # (T,2,1,1)
    offset = np.mgrid[:size, :size][None] - pixel  # (T,2,H,W), from the object's upper left corner
    if shape == "rectangle":
        mask: np.ndarray = ((offset >= 0) & (offset < extent[:, None, None])).all(1)
    else:
        radius = extent[0] / 2
        mask = ((offset + 0.5 - radius) ** 2).sum(1) <= radius**2
    return mask


def clip_of(
    name: str,
    index: int,
    *,
    seed: int,
    frames: int,
    size: int,
    reading: Reading = "ours",
    switch: Switch = "half",
) -> tuple[np.ndarray, np.ndarray]:
    """Return clip `index` of set `name` and its truth (the object on Y's background), uint8 (T,H,W,3) each.

    Addressed by (seed, set, index) alone, so sets never share a stream. In Y and Z a clip is its own truth, but for Z
    of reading `paper`; S has T=1.
    """
    rng = np.random.default_rng([seed, SETS.index(name), index])
    circles = ("trainY", "trainZ", "trainS") if reading == "paper" else ("trainY",)
    shape, still = "circle" if name in circles else "rectangle", name == "trainS"
    if switch == "crossing" and not still:
        mask, red_from = crossing_mask(rng, shape, frames, size)
    else:
        mask, red_from = moving_mask(rng, shape, 1 if still else frames, size), frames // 2
    colour = random_colour(rng)
    behind = background(2, size)[index % 2 :][:1] if still else background(frames, size, red_from)
    truth = np.where(mask[..., None], colour, behind)
    on_black = name.endswith("X") or (reading == "paper" and name == "trainZ")
    return (colour * mask[..., None] if on_black else truth), truth


def write_dataset(
    out: Path,
    *,
    size: int = 32,
    frames: int = 8,
    seed: int = 0,
    counts: Counts | None = None,
    reading: Reading = "ours",
    switch: Switch = "half",
) -> None:
    """Write the dataset into `out`, which must be new or empty; it appears at once, when all of it is written."""
    counts = counts or Counts()
    check(out, size, frames, seed, counts)
    out = out.resolve()
    clips = {"trainX": counts.x // frames, "trainY": counts.y // frames, "trainZ": counts.z // frames}
    clips |= {"trainS": counts.s, "valX": counts.val, "testX": counts.test}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{PARTIAL}{out.name}-") as folder:
        partial = Path(folder) / out.name
        for name, num in clips.items():
            folders = [name, name.replace("X", "Truth")] if name in ("valX", "testX") else [name]
            for part in folders:
                (partial / part).mkdir(parents=True)
            for index in range(num):
                drawn = clip_of(name, index, seed=seed, frames=frames, size=size, reading=reading, switch=switch)
                for part, clip in zip(folders, drawn, strict=False):
                    if name == "trainS":
                        write_image(partial / part / f"{index:05d}.png", clip[0])
                    else:
                        write_clip(partial / part / f"{index:05d}.mp4", clip, FPS, "vp9-lossless")
        description = {"kind": "synthetic", "size": size, "frames": frames, "seed": seed, "counts": asdict(counts)}
        description |= {"reading": reading, "switch": switch}
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        if out.exists():
            out.rmdir()
        partial.rename(out)


def check(out: Path, size: int, frames: int, seed: int, counts: Counts) -> None:
    """Refuse what cannot become a dataset, before anything is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose a new folder or remove it first")
    for name, value, low, unit in (("size", size, 16, "pixels"), ("frames", frames, 2, "frames a clip")):
        if not low <= value <= 4096:
            raise UserError(f"--{name}: expected {low} to 4096 {unit}, got {value}")
    for name, value in {"seed": seed, **{f"counts.{name}": num for name, num in asdict(counts).items()}}.items():
        if value < (low := frames if name in ("counts.x", "counts.y") else 0):
            raise UserError(f"--{name}: expected {low} or more, got {value}")
