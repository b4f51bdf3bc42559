"""Read what can be read once only: stdin, named pipes, and cameras and screens by libavdevice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av

from rlv2v.data.clock import DEFAULT_FPS, Clock, declared_rate
from rlv2v.data.damage import Faults
from rlv2v.data.decoding import Deinterlace, TimedFrame, deinterlaced, file_name, open_named, pictures, stream_of
from rlv2v.data.upright import Upright, pixel_aspect
from rlv2v.data.video import Probe, describe
from rlv2v.errors import UserError, nearest

STDIN = Path("-")


def is_stdin(source: Path) -> bool:
    """Return whether a source's name means stdin."""
    return source == STDIN


def is_pipe(source: Path) -> bool:
    """Return whether a source is stdin or a named pipe, such as `<(command)` in a shell."""
    return is_stdin(source) or source.is_fifo()


def open_live(
    source: Path, form: str | None = None, *, deinterlace: Deinterlace = "auto", faults: Faults | None = None
) -> tuple[Probe, Iterator[TimedFrame]]:
    """Open a stream and read its first frame; return what it declares, and all its frames.

    source: `-` for stdin, a named pipe, or what FFmpeg's input `form` calls it: `/dev/video0` for v4l2, `:0` for
    x11grab.
    form: FFmpeg's name of the format or device; None: found by the content.
    deinterlace, faults: as for `rlv2v.data.decoding.decode`.

    Raises:
        UserError: it cannot be opened, holds no picture, or is a terminal.
    """
    known = {name for names in av.formats_available for name in names.split(",")}
    if form is not None and form not in known:
        raise UserError(f"--input-format: this PyAV has no {form}{nearest(form, known)}")
    if is_stdin(source) and os.isatty(0):
        raise UserError("-: stdin is a terminal; expected a pipe or a file with a video")
    name = "pipe:0" if is_stdin(source) else file_name(source) if is_pipe(source) else str(source)
    container = open_named(name, source, form)
    stream = stream_of(container)
    frames = pictures(source, container, faults)
    first = next(frames, None)
    if first is None:
        container.close()
        raise UserError(f"{source}: no frame can be decoded")
    video = describe(container, first, declared_rate(stream) or DEFAULT_FPS)

    def timed() -> Iterator[TimedFrame]:
        with container:
            upright, clock = Upright((video.width, video.height), pixel_aspect(stream), source), Clock(stream)
            for frame in deinterlaced(chain([first], frames), deinterlace):
                yield TimedFrame(upright(frame), clock.time_of(frame), clock.duration_of(frame))

    return video, timed()
