"""Write the paper's synthetic dataset as real video files (RL-V2V-GAN section 6.1; our reading: docs/method.md).

X = a coloured rectangle moving over black; Y = a circle over a background that is blue (0,0,255) in the first half of
the clip and red (255,0,0) in the second; Z = rectangles on that background; S = still rectangles on blue or on red.
Hidden truth of an X clip: the same rectangle on Y's background. Every clip is one file of `frames` frames.
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

import numpy as np

from rlv2v.data.writer import write_clip, write_image
from rlv2v.errors import UserError
from rlv2v.files import PARTIAL

BLACK, BLUE, RED = (0, 0, 0), (0, 0, 255), (255, 0, 0)
MIN_COLOUR_DISTANCE = 0.45
FPS = 8
SETS = ("trainX", "trainY", "trainZ", "trainS", "valX", "testX")
"""Position in this tuple is the set's part of every draw's address: never reorder."""


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


def background(frames: int, size: int) -> np.ndarray:
    """Return Y's background, uint8 (T,H,W,3): blue for frames < T/2, red from there on."""
    clip = np.empty((frames, size, size, 3), np.uint8)
    clip[: frames // 2], clip[frames // 2 :] = BLUE, RED
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
    extent = np.resize(rng.integers(size // 4, size // 2 + 1, 2 if shape == "rectangle" else 1), 2)
    room = size - extent
    start, end = rng.uniform(0, room), rng.uniform(0, room)
    reach = size / 16 * max(frames - 1, 1)
    end = start + np.clip(end - start, -reach, reach)
    corner = np.rint(np.linspace(start, end, frames)).astype(int)[:, :, None, None]  # (T,2,1,1)
    offset = np.mgrid[:size, :size][None] - corner  # (T,2,H,W), from the object's upper left corner
    if shape == "rectangle":
        mask: np.ndarray = ((offset >= 0) & (offset < extent[:, None, None])).all(1)
    else:
        radius = extent[0] / 2
        mask = ((offset + 0.5 - radius) ** 2).sum(1) <= radius**2
    return mask


def clip_of(name: str, index: int, *, seed: int, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clip `index` of set `name` and its truth (the object on Y's background), uint8 (T,H,W,3) each.

    Addressed by (seed, set, index) alone, so sets never share a stream. In Y and Z a clip is its own truth; S has T=1.
    """
    rng = np.random.default_rng([seed, SETS.index(name), index])
    frames = 1 if name == "trainS" else frames
    mask = moving_mask(rng, "circle" if name == "trainY" else "rectangle", frames, size)
    colour = random_colour(rng)
    behind = background(2, size)[index % 2 :][:1] if name == "trainS" else background(frames, size)
    truth = np.where(mask[..., None], colour, behind)
    return (colour * mask[..., None] if name.endswith("X") else truth), truth


def write_dataset(out: Path, *, size: int = 32, frames: int = 8, seed: int = 0, counts: Counts | None = None) -> None:
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
                drawn = clip_of(name, index, seed=seed, frames=frames, size=size)
                for part, clip in zip(folders, drawn, strict=False):
                    if name == "trainS":
                        write_image(partial / part / f"{index:05d}.png", clip[0])
                    else:
                        write_clip(partial / part / f"{index:05d}.mp4", clip, FPS, "vp9-lossless")
        description = {"kind": "synthetic", "size": size, "frames": frames, "seed": seed, "counts": asdict(counts)}
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
