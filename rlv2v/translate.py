"""`python -m rlv2v.translate RUN IN OUT.mp4`: translate a video of any length with a trained run, in constant memory.

The generator runs frame by frame with its recurrent state carried along, so a chunked run equals the whole one. Frames
are scaled so that the short side is the size that the model was trained at, padded by replication to what the network
needs, cropped and scaled back: the output has the frame count, rate, size and audio of the input.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from torch.nn.functional import pad
from tqdm import tqdm

from rlv2v.checkpoint import load_translator
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.data.video import fit, one_line, probe, read_frames
from rlv2v.data.writer import VideoWriter
from rlv2v.device import pick_device
from rlv2v.errors import UserError
from rlv2v.model import Translator
from rlv2v.model.layers import State, limit_memory

Direction = Literal["x2y", "y2x"]
SUFFIXES = (".mp4", ".mov", ".mkv")
MAX_FPS = 1000


@dataclass(frozen=True)
class Args:
    """Translate a video (or a folder of frames) with a trained run; the model's architecture is read from the run."""

    run: tyro.conf.Positional[Path]
    """Run folder that `python -m rlv2v.train` wrote."""
    source: tyro.conf.Positional[Path]
    """Video file that PyAV reads, or a folder of numbered images."""
    out: tyro.conf.Positional[Path]
    """Video to write (.mp4, .mov or .mkv; H.264), in a folder that exists. It appears when all frames are done."""
    direction: Direction = "x2y"
    """x2y: source domain to target domain; y2x: back."""
    best: bool = False
    """Use the best checkpoint's model instead of the newest."""
    side_by_side: bool = False
    """Show the source on the left of the translation."""
    size: int | None = None
    """Short side in pixels that the model sees; default: what it was trained at; 0: the video's own."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""


@torch.inference_mode()
def translate_chunk(g: Translator, config: Config, frames: np.ndarray, state: State = None) -> tuple[np.ndarray, State]:
    """The next T frames of a video, uint8 (T,H,W,3) of any size, after those that `state` has seen (None: the start).

    Returns frames of the same shape and the state after them. Beyond the first `config.frames` frames the normalisation
    forgets (`limit_memory`), frame by frame, so that it is the same however a video is cut into chunks. A `per_frame`
    model (the CycleGAN baseline) starts anew on every frame, and its state stays None.
    """
    height, width = frames.shape[1:3]
    device = next(g.parameters()).device
    x = to_model(torch.from_numpy(np.ascontiguousarray(frames)).to(device))  # (T,3,H,W)
    x = pad(x, (0, -width % g.multiple, 0, -height % g.multiple), mode="replicate")
    if config.per_frame:
        y = g(x[:, None])[0][:, 0]
    else:
        first = config.frames if state is None else 1
        parts = []
        for chunk in (x[:first], *x[first:, None]):
            part, state = g(chunk[None], state)
            state = limit_memory(state, config.frames)
            parts.append(part[0])
        y = torch.cat(parts)
    if not torch.isfinite(y).all():
        raise UserError("translate: the model's output is not finite; its weights are damaged or its training diverged")
    return to_uint8(y[..., :height, :width]).cpu().numpy(), state


def translate_clip(g: Translator, config: Config, frames: np.ndarray) -> np.ndarray:
    """A whole clip from its start, uint8 (T,H,W,3) -> the same shape; see `translate_chunk`."""
    return translate_chunk(g, config, frames)[0]


def translate_stream(
    g: Translator, config: Config, frames: Iterable[np.ndarray], *, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(source, translation) of each frame, uint8 (H,W,3); one in memory. size: short side the model sees, 0: own."""
    state = None
    for frame in frames:
        height, width = frame.shape[:2]
        clip = fit(frame[None], size or min(height, width))
        translated, state = translate_chunk(g, config, clip, state)
        if clip.shape[1:3] == (height, width):
            yield frame, translated[0]
        else:
            shrinks = clip.shape[1] > height
            method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            yield frame, cv2.resize(translated[0], (width, height), interpolation=method)


def check_paths(source: Path, out: Path) -> None:
    """Refuse, before any work, an output that cannot be written or that is the input."""
    if not source.exists():
        raise UserError(f"{one_line(source)}: no such video file or folder of frames")
    if out.suffix.lower() not in SUFFIXES:
        got = one_line(out.suffix) or "none"
        raise UserError(f"{one_line(out)}: expected the suffix {', '.join(SUFFIXES)}, got {got}")
    if not out.parent.is_dir():
        raise UserError(f"{one_line(out)}: folder {one_line(out.parent)} does not exist; create it first")
    if out.is_dir():
        raise UserError(f"{one_line(out)}: is a folder; expected the name of a video file")
    if out.exists() and out.samefile(source):
        raise UserError(f"{one_line(out)}: output and input are the same file; choose another output name")


def beside(source: np.ndarray, translated: np.ndarray) -> np.ndarray:
    """Both frames in one, source left; an odd height gains a row, so that every player shows it (yuv420p)."""
    both = np.concatenate([source, translated], axis=1)
    return np.pad(both, ((0, len(both) % 2), (0, 0), (0, 0)), mode="edge")


def main(args: Args) -> None:
    """Check everything, then stream."""
    check_paths(args.source, args.out)
    if args.size is not None and args.size != 0 and args.size < 8:
        raise UserError(f"--size: expected 0 (the video's own) or at least 8 pixels, got {args.size}")
    about = probe(args.source)
    if not 0 < about.fps <= MAX_FPS:
        raise UserError(f"{one_line(args.source)}: expected a rate of up to {MAX_FPS} frames a second, got {about.fps}")
    g, config = load_translator(args.run, args.direction, device=pick_device(args.device), best=args.best)
    size = config.size if args.size is None else args.size

    started = time.perf_counter()
    stream = translate_stream(g, config, read_frames(args.source), size=size)
    with VideoWriter(args.out, about.fps, audio_from=args.source) as writer:
        for source, translated in tqdm(stream, total=about.num_frames, unit="frame", desc=args.source.name):
            writer.write(beside(source, translated) if args.side_by_side else translated)
    rate = writer.count / (time.perf_counter() - started)
    shape = f"{about.width}x{about.height}" + (" twice" if args.side_by_side else "")
    print(f"{args.out}: {writer.count} frames, {shape}, {float(about.fps):g} fps; translated {rate:.1f} frames/s")


if __name__ == "__main__":
    run_command(main, Args)
