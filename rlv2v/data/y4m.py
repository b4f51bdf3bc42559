"""Write frames as they come to stdout, as YUV4MPEG2 (y4m), which most video programs read from a pipe."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import Colorspace

from rlv2v.data.upright import HD_LINES
from rlv2v.data.yuv import YuvConverter, made_even
from rlv2v.errors import UserError

STDOUT = Path("-")


def is_stdout(out: Path) -> bool:
    """Return whether an output's name means stdout."""
    return out == STDOUT


def check_stdout() -> None:
    """Raise UserError if stdout is a terminal."""
    if os.isatty(1):
        raise UserError("-: stdout is a terminal; expected a pipe to a program that reads y4m, or a file")


class Y4mWriter:
    """Write uint8 RGB (H,W,3) frames to stdout; meanwhile all else that is printed goes to stderr.

    Pictures are 4:2:0 in limited range, or 4:4:4 where a side is odd and not made `even`. The format has no tag for
    colours: they are BT.709 from 720 lines on, else BT.601, which is what readers assume. It has one rate, and no
    place for times and tracks.

    fps: frames a second.  aspect: how many times as wide as high the pixels are.
    """

    def __init__(self, fps: Fraction, *, even: bool = True, aspect: Fraction = Fraction(1)) -> None:
        self.fps, self.count = fps, 0
        self._even, self._aspect = even, aspect
        self._yuv: YuvConverter | None = None
        self._files = ExitStack()
        sys.stdout.flush()
        self._file = os.dup(1)
        self._files.callback(os.close, self._file)
        os.dup2(2, 1)
        self._files.callback(os.dup2, self._file, 1)
        self._files.callback(sys.stdout.flush)

    def write(self, frame: np.ndarray, time: Fraction | None = None, duration: Fraction | None = None) -> None:
        """Write one frame; the first one fixes the size. Raises `UserError` when the reader has closed the pipe."""
        if self._even:
            frame = made_even(frame)
        if self._yuv is None:
            self._yuv = self._start(*frame.shape[:2])
        self._send(b"FRAME\n" + self._yuv(frame).to_ndarray().tobytes())
        self.count += 1

    def _start(self, height: int, width: int) -> YuvConverter:
        """Write the header, and return what converts the frames."""
        odd = height % 2 or width % 2
        form, layout = ("yuv444p", "C444 XYSCSS=444") if odd else ("yuv420p", "C420mpeg2 XYSCSS=420MPEG2")
        matrix = Colorspace.ITU709 if height >= HD_LINES else Colorspace.ITU601
        rate, shape = (f"{value.numerator}:{value.denominator}" for value in (self.fps, self._aspect))
        self._send(f"YUV4MPEG2 W{width} H{height} F{rate} Ip A{shape} {layout} XCOLORRANGE=LIMITED\n".encode())
        return YuvConverter(form, matrix)

    def _send(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BrokenPipeError:
            raise UserError(f"-: the program that reads stdout has ended after {self.count} frames") from None

    def __enter__(self) -> Y4mWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        """Give stdout back."""
        self._files.close()
