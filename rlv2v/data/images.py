"""Read and write images: uint8 RGB (H,W,3), upright, on black where they are transparent."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from rlv2v.data.heic import read_heic
from rlv2v.data.scaling import on_black
from rlv2v.errors import UserError

HEIC_SUFFIXES = {".heic", ".heif"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"} | HEIC_SUFFIXES


def read_image(path: Path) -> np.ndarray:
    """Read one image as uint8 RGB (H,W,3), upright by its EXIF tag, on black where it is transparent.

    Raises `UserError` for what cannot be read, and for an animation.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected an image file, got a folder, pipe or device")
        if path.suffix.lower() in HEIC_SUFFIXES:
            return read_heic(path)
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size and not is_cut_png(encoded) else None
        transparent = image is not None and may_be_transparent(encoded)
        whole = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if transparent else None
    except (OSError, cv2.error) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error
    if is_animated(encoded):
        raise UserError(f"{path}: an animated image; expected a still one: convert it to a video or to a folder")
    if image is None:
        raise UserError(f"{path}: cannot be read as an image; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    if whole is not None and whole.ndim == 3 and whole.shape[2] == 4:
        image = on_black(whole)
        image = image if image.dtype == np.uint8 else (image // 256).astype(np.uint8)
    rgb: np.ndarray = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def is_cut_png(encoded: np.ndarray) -> bool:
    """Return whether a PNG, uint8 (N,), ends within a chunk, for which OpenCV takes as much memory as it declares."""
    place = 8
    while encoded[:4].tobytes() == b"\x89PNG" and place + 8 <= encoded.size:
        length = int.from_bytes(encoded[place : place + 4].tobytes(), "big")
        if encoded[place + 4 : place + 8].tobytes() == b"IEND":
            return False
        place += 12 + length
    return place > encoded.size


def is_animated(encoded: np.ndarray) -> bool:
    """Return whether a PNG or WebP, uint8 (N,), says that it is an animation."""
    start = encoded[:4096].tobytes()
    if start.startswith(b"\x89PNG"):
        return b"acTL" in start.split(b"IDAT")[0]
    return is_extended_webp(start) and bool(start[20] & 0x02)


def may_be_transparent(encoded: np.ndarray) -> bool:
    """Return whether an encoded image, uint8 (N,), can be transparent, as far as its first bytes tell."""
    start = encoded[:4096].tobytes()
    if start.startswith(b"\x89PNG"):
        return start[25] in (4, 6) or b"tRNS" in start.split(b"IDAT")[0]
    if is_extended_webp(start):
        return bool(start[20] & 0x10)
    return start[:2] not in (b"\xff\xd8", b"P6") and start[8:16] != b"WEBPVP8 "  # JPEG, PPM, lossy WebP


def is_extended_webp(start: bytes) -> bool:
    """Return whether a file starts as a WebP with the header whose byte 20 holds flags."""
    return start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and len(start) > 20


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 RGB (H,W,3) in the format of the suffix, in place; lossless for `.png` and `.webp`."""
    best = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 101]}.get(path.suffix.lower(), [])
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), best)
    if not done:
        raise ValueError(f"write_image: {path.suffix} cannot be encoded")
    path.write_bytes(encoded.tobytes())
