"""Translate one source into one output, frame by frame; `python -m rlv2v.translate` is the command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from rlv2v.config import Config
from rlv2v.data.clock import DEFAULT_FPS, MAX_FPS
from rlv2v.data.containers import CODECS, choose_codec
from rlv2v.data.damage import Faults
from rlv2v.data.decoding import Deinterlace, TimedFrame
from rlv2v.data.live import is_pipe, open_live
from rlv2v.data.sequence import SequenceWriter, check_sequence, is_sequence
from rlv2v.data.tracks import Tracks
from rlv2v.data.video import Probe, kind_of, probe, resampled, timed_frames
from rlv2v.data.writer import VideoWriter, check_folder
from rlv2v.data.y4m import Y4mWriter, check_stdout, is_stdout
from rlv2v.errors import UserError, get_logger, one_line
from rlv2v.files import output_lock
from rlv2v.method.translation import Stream
from rlv2v.model import Generator
from rlv2v.runtime.overlap import read_ahead, write_behind
from rlv2v.translate_resume import PIECE, Work, is_stopped, is_there, kept_work, made_of, reason_against

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Say how a video is read, shown to the model and written."""

    side_by_side: bool = False
    """Show the source on the left of the translation."""
    size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Short side in pixels that the model sees; default: that of its training crops; 0: the video's own."""
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
    """Replace OUT if it exists; drop what a stopped translation to it has done."""
    resume: bool = False
    """Go on with a translation that was stopped, by the same command. What is there already is skipped."""
    input_format: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """FFmpeg's name of a device, v4l2 with IN /dev/video0 (a camera) or x11grab with IN :0 (a screen), or of the format
    of stdin if its content does not show it."""

    def is_live(self, source: Path) -> bool:
        """Return whether a source is stdin, a pipe or a device, which can be read once only."""
        return is_pipe(source) or self.input_format is not None


def choose_encoding(settings: Settings, out: Path) -> str:
    """Return the codec's key for an output, "" for images and stdout; raise UserError for settings that do not fit."""
    if is_stdout(out):
        for name, value in (("--codec", settings.codec), ("--crf", settings.crf), ("--lossless", settings.lossless)):
            if value not in (None, False):
                raise UserError(f"{name}: y4m, which stdout gets, is not encoded; leave it out")
        codec = ""
    else:
        codec = "" if is_sequence(out) else choose_codec(out, settings.codec, lossless=settings.lossless)
    if settings.size is not None and settings.size != 0 and settings.size < 8:
        raise UserError(f"--size: expected 0 (the video's own) or at least 8 pixels, got {settings.size}")
    if settings.fps is not None and not 0 < settings.fps <= MAX_FPS:
        raise UserError(f"--fps: expected more than 0 and up to {MAX_FPS}, got {settings.fps:g}")
    if settings.crf is not None:
        most = 51 if codec in ("h264", "hevc") else 63
        if not codec or "crf" not in CODECS[codec].options:
            raise UserError(f"--crf: {codec or 'images'} have no such quality")
        if not 0 <= settings.crf <= most:
            raise UserError(f"--crf: expected 0 to {most} for {codec}, got {settings.crf}")
    return codec


def check_paths(source: Path, out: Path, settings: Settings) -> None:
    """Raise UserError for a source that is not there, and an output that cannot be written or would lose a file."""
    live = settings.is_live(source)
    if not live and not source.exists():
        raise UserError(f"{source}: no such video file or folder of frames")
    reason = reason_against(source, out, settings.input_format)
    if settings.resume and reason:
        raise UserError(f"--resume: {reason}; leave it out")
    if is_stdout(out):
        check_stdout()
        return
    if is_stopped(out) and not (settings.resume or settings.overwrite):
        raise UserError(f"{out}: a translation to it was stopped; --resume goes on, --overwrite starts over")
    overwrite = settings.overwrite or (settings.resume and not is_there(out))
    if is_sequence(out):
        check_sequence(out, overwrite=overwrite)
        if not live and out.parent.exists() and out.parent.samefile(source):
            raise UserError(f"{out}: output and input are the same folder; choose another one")
    else:
        check_folder(out)
    if not live and out.exists() and out.samefile(source):
        raise UserError(f"{out}: output and input are the same file; choose another output name")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; choose another name, or give --overwrite")


def side_by_side(source: np.ndarray, translated: np.ndarray) -> np.ndarray:
    """Return both frames in one, source left; an odd height gains a row, so that every player shows it (yuv420p)."""
    both = np.concatenate([source, translated], axis=1)
    return np.pad(both, ((0, len(both) % 2), (0, 0), (0, 0)), mode="edge")


def open_writer(
    source: Path, out: Path, settings: Settings, video: Probe, codec: str, fps: Fraction | None, work: Work | None
) -> VideoWriter | SequenceWriter | Y4mWriter:
    """Return the writer of the output, which carries along what a video file holds besides its pictures."""
    keep, position = (work.folder, work.position) if work else (None, None)
    if is_stdout(out):
        return Y4mWriter(fps or video.fps, even=not settings.exact_size, aspect=video.pixel_aspect)
    if is_sequence(out):
        return SequenceWriter(out, fps or video.fps, keep=keep, position=position)
    tracks = None
    if kind_of(source) == "video" and not settings.is_live(source):
        tracks = Tracks(source, video.start, audio=settings.audio)
    return VideoWriter(
        out,
        fps or video.fps,
        codec,
        options={} if settings.crf is None else {"crf": str(settings.crf)},
        even=not settings.exact_size,
        tick=None if fps else video.tick,
        aspect=video.pixel_aspect,
        tracks=tracks,
        keep=keep,
        position=position,
    )


def open_source(
    source: Path, settings: Settings, fps: Fraction | None, faults: Faults
) -> tuple[Probe, Iterator[TimedFrame]]:
    """Return what a source declares, and its frames; fps: frames a second of what has no clock."""
    if settings.is_live(source):
        video, frames = open_live(source, settings.input_format, deinterlace=settings.deinterlace, faults=faults)
        if video.has_audio and settings.audio:
            log.warning("%s: the sound of a stream is left out", source)
        return video, frames
    video = probe(source)
    size = video.width, video.height
    rate = fps or DEFAULT_FPS
    return video, timed_frames(source, size=size, fps=rate, deinterlace=settings.deinterlace, faults=faults)


def translate_file(
    g: Generator,
    config: Config,
    source: Path,
    out: Path,
    settings: Settings,
    codec: str,
    is_stopping: Callable[[], bool] = lambda: False,
) -> str:
    """Translate a source to an output that appears when it is complete, and return a line that describes it.

    Reading and writing have a thread each, so that they overlap with the network.
    g, config: as `load_translator` returns them.  codec: as `choose_encoding` returns it.
    is_stopping: asked after each frame; once it is true the output is completed.
    After an error or a signal what was done can go on, see `rlv2v.translate_resume`.
    Raises `UserError` for a source or an output that cannot be read or written, or that another process is writing.
    """
    lock = output_lock(out.parent.resolve() if is_sequence(out) else out)
    with nullcontext() if is_stdout(out) else lock:
        check_paths(source, out, settings)  # another run may have written it since the first check
        started, faults = time.perf_counter(), Faults(settings.strict)
        fps = None if settings.fps is None else Fraction(settings.fps).limit_denominator(60060)
        video, frames = open_source(source, settings, fps, faults)
        if video.hdr:
            log.warning("%s: HDR (%s); tone-mapped to BT.709", source, video.hdr)
        if is_stdout(out) and video.tick is not None:
            fps = fps or video.fps  # y4m has one rate
        if fps:
            frames = resampled(frames, fps)
        stream = Stream(g, config, settings.size, video.pixel_aspect)
        with (
            keeping(g, config, source, out, settings, codec) as work,
            tqdm(total=None if fps else video.num_frames, unit="frame", desc=one_line(source.name)) as bar,
            open_writer(source, out, settings, video, codec, fps, work) as writer,
            writing(writer, work) as write,
            read_ahead(frames) as ahead,
        ):
            first = work.start if work else 0
            if first:
                log.warning("%s: going on after %d frames", out, first)
            for number, frame in enumerate(ahead):
                if work and first and number == 0:
                    work.restore(stream, frame.rgb)
                bar.update()
                if number < first:
                    continue
                snapshot = stream.snapshot() if work and number > first and number % PIECE == 0 else None
                translated = stream(frame.rgb)
                shown = side_by_side(frame.rgb, translated) if settings.side_by_side else translated
                write((TimedFrame(shown, frame.time, frame.duration), snapshot))
                if is_stopping():
                    break
        for line in faults.lines():
            log.warning("%s: %s", source, line)
        rate = (writer.count - first) / (time.perf_counter() - started)
        shape = f"{video.width}x{video.height}" + (" twice" if settings.side_by_side else "")
        return f"{out}: {writer.count} frames, {shape}, {float(writer.fps):g} fps; translated {rate:.1f} frames/s"


def keeping(
    g: Generator, config: Config, source: Path, out: Path, settings: Settings, codec: str
) -> AbstractContextManager[Work | None]:
    """Return a context in which the work for an output is kept; None where it could not go on after a stop."""
    if reason_against(source, out, settings.input_format):
        return nullcontext()
    of_no_frame = {"overwrite", "resume", "strict"}
    flags = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.name not in of_no_frame}
    parts = made_of(g, config, source, out, flags | {"codec": codec})
    return kept_work(out, parts, resume=settings.resume)


@contextmanager
def writing(
    writer: VideoWriter | SequenceWriter | Y4mWriter, work: Work | None
) -> Iterator[Callable[[tuple[TimedFrame, list[Any] | None]], None]]:
    """Yield a function that writes a frame, in another thread except to a pipe.

    With a snapshot of the model before it, the work up to there is saved first.
    A write to a pipe may wait for ever, and a signal ends that in the main thread only.
    """

    def write(item: tuple[TimedFrame, list[Any] | None]) -> None:
        frame, snapshot = item
        if snapshot is not None and work is not None and not isinstance(writer, Y4mWriter):
            work.save(snapshot, writer.cut(frame.time))
        writer.write(*frame)

    if isinstance(writer, Y4mWriter):
        yield write
    else:
        with write_behind(write) as put:
            yield put
