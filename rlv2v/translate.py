"""`python -m rlv2v.translate RUN IN OUT.mp4`: translate a video of any length with a trained run, in constant memory.

The generator runs frame by frame with its recurrent state carried along, so that chunks give what one pass would. A
frame is scaled so that its short side is the size that the model was trained at, padded by replication to what the
network needs, cropped and scaled back. The output has the frame count, rate, size and audio of the input.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import Device, RunFolder, run_command
from rlv2v.data.video import probe, read_frames
from rlv2v.data.writer import VideoWriter, check_output
from rlv2v.errors import UserError
from rlv2v.method.translation import Stream
from rlv2v.runtime.device import pick_device

MAX_FPS = 1000


@dataclass(frozen=True)
class Args:
    """Translate a video (or a folder of frames) with a trained run, whose model is read from its folder."""

    run: RunFolder
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """Video file that PyAV reads, or a folder of numbered images."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Video to write (.mp4, .mov or .mkv; H.264), in a folder that exists. It appears when all frames are done."""
    direction: Literal["x2y", "y2x"] = "x2y"
    """x2y: source domain to target domain; y2x: back."""
    newest: bool = False
    """Use the newest checkpoint's model instead of the best one by the criterion."""
    side_by_side: bool = False
    """Show the source on the left of the translation."""
    size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Short side in pixels that the model sees; default: what it was trained at; 0: the video's own."""
    device: Device = "auto"


def check_paths(source: Path, out: Path) -> None:
    """Raise UserError, before any work, for an output that cannot be written or that is the input."""
    if not source.exists():
        raise UserError(f"{source}: no such video file or folder of frames")
    check_output(out)
    if out.exists() and out.samefile(source):
        raise UserError(f"{out}: output and input are the same file; choose another output name")


def side_by_side(source: np.ndarray, translated: np.ndarray) -> np.ndarray:
    """Return both frames in one, source left; an odd height gains a row, so that every player shows it (yuv420p)."""
    both = np.concatenate([source, translated], axis=1)
    return np.pad(both, ((0, len(both) % 2), (0, 0), (0, 0)), mode="edge")


def main(args: Args) -> None:
    """Check everything, then translate frame by frame."""
    check_paths(args.source, args.out)
    if args.size is not None and args.size != 0 and args.size < 8:
        raise UserError(f"--size: expected 0 (the video's own) or at least 8 pixels, got {args.size}")
    video = probe(args.source)
    if not 0 < video.fps <= MAX_FPS:
        raise UserError(f"{args.source}: expected a rate of up to {MAX_FPS} frames a second, got {video.fps}")
    g, config = load_translator(args.run, args.direction, device=pick_device(args.device), newest=args.newest)

    started = time.perf_counter()
    stream = Stream(g, config, args.size)
    with VideoWriter(args.out, video.fps, audio_from=args.source) as writer:
        for source in tqdm(read_frames(args.source), total=video.num_frames, unit="frame", desc=args.source.name):
            translated = stream(source)
            writer.write(side_by_side(source, translated) if args.side_by_side else translated)
    rate = writer.count / (time.perf_counter() - started)
    shape = f"{video.width}x{video.height}" + (" twice" if args.side_by_side else "")
    print(f"{args.out}: {writer.count} frames, {shape}, {float(video.fps):g} fps; translated {rate:.1f} frames/s")


if __name__ == "__main__":
    run_command(main, Args)
