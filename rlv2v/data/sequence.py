"""Write a sequence of numbered images, `out/%05d.png`, into a folder that appears when it is complete."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from rlv2v.data.clock import DEFAULT_FPS
from rlv2v.data.images import write_image
from rlv2v.errors import UserError
from rlv2v.files import PARTIAL

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUMBER = re.compile(r"%(0[1-9])?d")


def is_sequence(path: Path) -> bool:
    """Return whether `path` is the name of a sequence: one number, as C's printf writes it, and an image's suffix."""
    return path.suffix.lower() in SUFFIXES and len(NUMBER.findall(path.name)) == path.name.count("%") == 1


def check_sequence(path: Path, *, overwrite: bool) -> None:
    """Raise UserError for a sequence that cannot be written, or whose folder holds something and is to stay."""
    folder = path.parent
    if not folder.parent.is_dir():
        raise UserError(f"{path}: folder {folder.parent} does not exist; create it first")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the images")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder}: is not empty; choose another folder, or give --overwrite to replace images in it")


class SequenceWriter:
    """Write uint8 RGB (H,W,3) frames as images, numbered from 0; times and tracks have no place there.

    The images come into the folder when this context manager ends without an error. PNG and WebP keep every value.
    """

    def __init__(self, path: Path, fps: Fraction = DEFAULT_FPS) -> None:
        self.path, self.fps, self.count = path, fps, 0
        folder = path.parent.resolve()
        self._partial = folder.with_name(f"{PARTIAL}{os.getpid()}-{folder.name}")
        self._partial.mkdir()

    def write(self, frame: np.ndarray, time: Fraction | None = None, duration: Fraction | None = None) -> None:
        """Append one frame."""
        write_image(self._partial / (self.path.name % self.count), frame)
        self.count += 1

    def __enter__(self) -> SequenceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Move the images into the folder; after an error, drop them."""
        try:
            if kind is None and self.count:
                self.path.parent.mkdir(exist_ok=True)
                for image in sorted(self._partial.iterdir()):
                    os.replace(image, self.path.parent / image.name)
        finally:
            with suppress(OSError):
                shutil.rmtree(self._partial)
