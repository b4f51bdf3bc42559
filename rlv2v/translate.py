"""`python -m rlv2v.translate RUN IN OUT.mp4`: translate a video of any length with a trained run, in constant memory.

The generator runs frame by frame with its recurrent state carried along, so that chunks give what one pass would. A
frame is scaled so that its short side is the size that the model was trained at, padded by replication to what the
network needs, cropped and scaled back. The output has the frames, times, size, sound, subtitles, chapters and tags of
the input. See `rlv2v.data.containers` for what each kind of file holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import Device, RunFolder, run_command
from rlv2v.data.clock import DEFAULT_FPS, MAX_FPS
from rlv2v.data.containers import CODECS, choose_codec
from rlv2v.data.damage import Faults
from rlv2v.data.decoding import Deinterlace
from rlv2v.data.sequence import SequenceWriter, check_sequence, is_sequence
from rlv2v.data.tracks import Tracks
from rlv2v.data.video import Probe, kind_of, probe, resampled, timed_frames
from rlv2v.data.writer import VideoWriter, check_folder
from rlv2v.errors import UserError, get_logger
from rlv2v.method.translation import Stream
from rlv2v.runtime.device import pick_device

log = get_logger(__name__)


@dataclass(frozen=True)
class Args:
    """Translate a video (or a folder of frames) with a trained run, whose model is read from its folder."""

    run: RunFolder
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """Video file that PyAV reads, or a folder of numbered images."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Video to write (.mp4, .mov, .mkv, .webm, .gif), in a folder that exists, or images (NEW_FOLDER/%05d.png, .jpg,
    .webp). It appears when all frames are done."""
    direction: Literal["x2y", "y2x"] = "x2y"
    """x2y: source domain to target domain; y2x: back."""
    newest: bool = False
    """Use the newest checkpoint's model instead of the best one by the criterion."""
    side_by_side: bool = False
    """Show the source on the left of the translation."""
    size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Short side in pixels that the model sees; default: what it was trained at; 0: the video's own."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Constant rate to translate at: of a video the frame shown then; default: the video's own times, 25 for images."""
    audio: bool = True
    """Carry the sound along."""
    deinterlace: Deinterlace = "auto"
    """auto: frames that are flagged as interlaced; on: all; off: none."""
    strict: bool = False
    """Stop at the first damaged frame instead of showing the last good one."""
    exact_size: bool = False
    """Keep an odd width or height, which few players show, instead of repeating the last column or row."""
    codec: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """h264, hevc, vp9, av1 or ffv1, as far as the kind of file holds it; default: h264, for .webm vp9."""
    crf: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Quality of the codec, 0 (best) to 63; default: hardly any visible loss."""
    lossless: bool = False
    """Keep every value: the file is large, and few players show it."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    device: Device = "auto"


def check_args(args: Args) -> str:
    """Return the codec's key, before any work; raise UserError for what cannot be done or would lose a file."""
    if not args.source.exists():
        raise UserError(f"{args.source}: no such video file or folder of frames")
    codec = ""
    if is_sequence(args.out):
        check_sequence(args.out, overwrite=args.overwrite)
        if args.out.parent.exists() and args.out.parent.samefile(args.source):
            raise UserError(f"{args.out}: output and input are the same folder; choose another one")
    else:
        codec = choose_codec(args.out, args.codec, lossless=args.lossless)
        check_folder(args.out)
    if args.out.exists() and args.out.samefile(args.source):
        raise UserError(f"{args.out}: output and input are the same file; choose another output name")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out}: exists already; choose another name, or give --overwrite")
    if args.size is not None and args.size != 0 and args.size < 8:
        raise UserError(f"--size: expected 0 (the video's own) or at least 8 pixels, got {args.size}")
    if args.fps is not None and not 0 < args.fps <= MAX_FPS:
        raise UserError(f"--fps: expected more than 0 and up to {MAX_FPS}, got {args.fps:g}")
    if args.crf is not None:
        most = 51 if codec in ("h264", "hevc") else 63
        if not codec or "crf" not in CODECS[codec].options:
            raise UserError(f"--crf: {codec or 'images'} have no such quality")
        if not 0 <= args.crf <= most:
            raise UserError(f"--crf: expected 0 to {most} for {codec}, got {args.crf}")
    return codec


def side_by_side(source: np.ndarray, translated: np.ndarray) -> np.ndarray:
    """Return both frames in one, source left; an odd height gains a row, so that every player shows it (yuv420p)."""
    both = np.concatenate([source, translated], axis=1)
    return np.pad(both, ((0, len(both) % 2), (0, 0), (0, 0)), mode="edge")


def open_writer(args: Args, video: Probe, codec: str, fps: Fraction | None) -> VideoWriter | SequenceWriter:
    """Return the writer of the output, which carries along what a video file holds besides its pictures."""
    if is_sequence(args.out):
        return SequenceWriter(args.out, fps or video.fps)
    tracks = None
    if kind_of(args.source) == "video":
        tracks = Tracks(args.source, video.start, audio=args.audio)
    return VideoWriter(
        args.out,
        fps or video.fps,
        codec,
        options={} if args.crf is None else {"crf": str(args.crf)},
        even=not args.exact_size,
        tick=None if fps else video.tick,
        aspect=video.pixel_aspect,
        tracks=tracks,
    )


def main(args: Args) -> None:
    """Check everything, then translate frame by frame."""
    codec = check_args(args)
    video = probe(args.source)
    fps = None if args.fps is None else Fraction(args.fps).limit_denominator(60060)
    g, config = load_translator(args.run, args.direction, device=pick_device(args.device), newest=args.newest)

    if video.hdr:
        log.warning("%s: HDR (%s); tone-mapped to BT.709", args.source, video.hdr)
    started = time.perf_counter()
    stream, faults = Stream(g, config, args.size, video.pixel_aspect), Faults(args.strict)
    frames = timed_frames(
        args.source,
        size=(video.width, video.height),
        fps=fps or DEFAULT_FPS,
        deinterlace=args.deinterlace,
        faults=faults,
    )
    if fps:
        frames = resampled(frames, fps)
    with open_writer(args, video, codec, fps) as writer:
        for frame in tqdm(frames, total=None if fps else video.num_frames, unit="frame", desc=args.source.name):
            translated = stream(frame.rgb)
            shown = side_by_side(frame.rgb, translated) if args.side_by_side else translated
            writer.write(shown, frame.time, frame.duration)
    for line in faults.lines():
        log.warning("%s: %s", args.source, line)
    rate = writer.count / (time.perf_counter() - started)
    shape = f"{video.width}x{video.height}" + (" twice" if args.side_by_side else "")
    print(f"{args.out}: {writer.count} frames, {shape}, {float(writer.fps):g} fps; translated {rate:.1f} frames/s")


if __name__ == "__main__":
    run_command(main, Args)
