"""Write a sequence of numbered images, `out/%05d.png`, into a folder that appears when it is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from rlv2v.data.clock import DEFAULT_FPS
from rlv2v.data.images import write_image
from rlv2v.errors import UserError
from rlv2v.files import PARTIAL, flush_folder

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

    keep: a folder in which the images stay after an error, for another writer to go on from.
    position: what `cut` of that one returned.
    Raises `UserError` for kept images that are not all there.
    """

    def __init__(
        self,
        path: Path,
        fps: Fraction = DEFAULT_FPS,
        *,
        keep: Path | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.fps, self.count = path, fps, 0
        self._folder, self._keep = path.parent.resolve(), keep
        self._num_flushed = self._num_bytes = 0
        partial = self._folder.with_name(f"{PARTIAL}{os.getpid()}-{self._folder.name}")
        self._partial = keep / "images" if keep else partial
        self._partial.mkdir(exist_ok=keep is not None)
        if position is not None:
            self._go_on(position)

    def _image(self, number: int) -> Path:
        return self._partial / (self.path.name % number)

    def _go_on(self, position: Mapping[str, Any]) -> None:
        """Count the images up to a position, and remove what was written after it."""
        self.count = self._num_flushed = position["count"]
        images = [self._image(number) for number in range(self.count)]
        self._num_bytes = sum(image.stat().st_size for image in images if image.is_file())
        if self._num_bytes != position["bytes"]:
            raise UserError(f"{self._partial}: images done so far are missing or cut; --overwrite starts over")
        for image in {*self._partial.iterdir()} - {*images}:
            image.unlink()

    def write(self, frame: np.ndarray, time: Fraction | None = None, duration: Fraction | None = None) -> None:
        """Append one frame."""
        write_image(self._image(self.count), frame)
        self.count += 1

    def cut(self, time: Fraction) -> dict[str, Any]:
        """Bring the images so far to the disk, and return the `position` after them."""
        for number in range(self._num_flushed, self.count):
            with self._image(number).open("rb") as image:
                os.fsync(image.fileno())
                self._num_bytes += os.fstat(image.fileno()).st_size
        flush_folder(self._partial)
        self._num_flushed = self.count
        return {"count": self.count, "bytes": self._num_bytes}

    def __enter__(self) -> SequenceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Move the images into the folder; after an error, drop them unless they are kept."""
        try:
            if kind is None and self.count:
                self._publish()
        finally:
            if not self._keep:
                with suppress(OSError):
                    shutil.rmtree(self._partial)

    def _publish(self) -> None:
        if not self._folder.exists():
            os.rename(self._partial, self._folder)
            return
        for image in sorted(self._partial.iterdir()):
            os.replace(image, self._folder / image.name)
