"""What a dataset folder holds and what of it is usable: every source is decoded once, to the end, before training.

A folder has `trainX trainY trainZ trainS` (CycleGAN's `trainA trainB` are read as X and Y; Z and S may be missing).
Each entry of a set is one source: a video file, a folder of numbered images, a raw `.npy`; loose images are one source
together, in `trainS` one each. A damaged video counts up to the frame that its decoder reports, less one, in which the
damage may begin unseen: most codecs carry no checksum, and a few wrong bits can pass for picture. What was found usable
is kept in `.rlv2v-manifest.json` inside the set's folder: unchanged files (name, size, time) are not decoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
from av.video.reformatter import ColorRange
from tqdm import tqdm

from rlv2v.data import video
from rlv2v.data.video import Kind, one_line
from rlv2v.errors import UserError

MANIFEST = ".rlv2v-manifest.json"
MANIFEST_VERSION = 1
LAYOUT = {"x": ("trainX", "trainA"), "y": ("trainY", "trainB"), "z": ("trainZ",), "s": ("trainS",)}
BT601 = {2, 5, 6}
"""AVColorSpace numbers that mean BT.601 or, untagged, are read as it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One video (or still image) of a set, as the one full decode found it."""

    path: Path
    kind: Kind
    codec: str
    num_frames: int
    """Frames that decode without damage, from the first on."""
    fps: float
    width: int
    """Of the upright frame, pixels."""
    height: int
    num_bytes: int
    dali: bool
    """Whether DALI's CPU decoder gives the same frames: VP9, upright, constant size, BT.601 limited range or RGB."""
    status: Literal["ok", "truncated", "excluded"]
    reason: str
    """Why it is truncated or excluded; empty when ok."""


@dataclass(frozen=True)
class Dataset:
    """The usable sources of each set, in natural order, and what was left out."""

    root: Path
    sets: dict[str, list[Source]]
    """Keys x, y, z, s; z and s may be empty."""
    excluded: list[Source]
    fingerprint: str
    """SHA-256 over names, sizes and lengths: equal fingerprints draw equal clips."""


def entries(folder: Path, *, stills: bool = False) -> list[Path]:
    """The sources of a set's folder in natural order; loose images are `folder` itself, or one each if `stills`."""
    found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=video.natural_key)
    if stills:
        return found
    loose = [p for p in found if not p.is_dir() and video.kind_of(p) == "image"]
    return ([folder] if loose else []) + [p for p in found if p not in loose]


def decode_all(path: Path) -> tuple[Source, str]:
    """Decode a video file to the end; return what is usable of it and why it ends early (empty: it does not)."""
    count = packets = 0
    sizes, turned, damage = set(), False, ""
    with video.open_video(path) as container:
        stream = container.streams.video[0]
        declared, codec = stream.frames, stream.codec_context.codec.canonical_name
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        pixels = stream.codec_context.pix_fmt
        first = None
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise UserError(f"frame {count} is damaged")
                    first = first or frame
                    sizes.add((frame.width, frame.height))
                    turned |= frame.rotation != 0
                    count += 1
            if packets < declared:
                damage = f"the file ends after {packets} of {declared} frames"
        except (av.FFmpegError, OSError, UserError) as error:
            damage = f"decoding stops after frame {count}: {one_line(getattr(error, 'strerror', None) or error)}"
            count = max(count - 1, 0)
        if first is None or count == 0:
            raise UserError(f"{one_line(path)}: no frame can be decoded{': ' + damage if damage else ''}")
        height, width = video.upright(first, first.width, first.height).shape[:2]
        limited_601 = first.colorspace in BT601 and first.color_range != ColorRange.JPEG
        same_colour = pixels == "gbrp" or (pixels in ("yuv420p", "yuv444p") and limited_601)
        dali = codec == "vp9" and same_colour and not turned and len(sizes) == 1
    return Source(path, "video", codec, count, fps, width, height, 0, dali and not damage, "ok", ""), damage


def inspect(path: Path) -> Source:
    """Decode a source of any kind to its end; never raises for what is wrong with the file, but says so in `status`."""
    kind, damage = video.kind_of(path), ""
    blank = Source(path, kind, "", 0, 0.0, 0, 0, 0, False, "excluded", "")
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            return replace(blank, reason="neither a file nor a folder")
        if kind == "video":
            source, damage = decode_all(path)
        else:
            about = video.probe(path)
            frames = video.open_raw(path) if kind == "raw" else None
            count, damage = (len(frames), "") if frames is not None else count_images(path)
            source = Source(
                path, kind, about.codec, count, float(about.fps), about.width, about.height, 0, False, "ok", ""
            )
    except (UserError, OSError) as error:
        return replace(blank, reason=one_line(error).removeprefix(f"{one_line(path)}: "))
    return replace(source, num_bytes=file_key(path)[1], status="truncated" if damage else "ok", reason=damage)


def count_images(path: Path) -> tuple[int, str]:
    """How many images of a frame folder (or 1) can be read from the first on, and why no more."""
    count = 0
    try:
        for _ in video.all_frames(path):
            count += 1
    except UserError as error:
        return count, f"reading stops after frame {count}: {error}"
    return count, ""


def file_key(path: Path) -> list[int]:
    """What tells a changed source from an unchanged one: [files, bytes, newest change in ns]; zeros if unreadable."""
    try:
        stats = [p.stat() for p in (video.images_in(path) if path.is_dir() else [path])]
    except OSError:
        return [0, 0, 0]
    return [len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def index_folder(folder: Path, *, frames: int, stills: bool = False) -> list[Source]:
    """All sources of one set's folder with their status; sources shorter than `frames` are excluded.

    `stills` makes each loose image a source (style images). Raises `UserError` if the folder cannot be listed.
    """
    try:
        paths = entries(folder, stills=stills)
    except OSError as error:
        raise UserError(
            f"{one_line(folder)}: cannot be listed: {error.strerror}; expected a folder of videos"
        ) from error
    known, usable, found = load_manifest(folder), {}, []
    for path in tqdm(paths, desc=f"index {folder.name}", unit="file", delay=2, leave=False):
        entry = known.get(path.name)
        if entry is None or entry["key"] != file_key(path):
            source = inspect(path)
            entry = {"key": file_key(path), "source": {k: v for k, v in asdict(source).items() if k != "path"}}
        source = Source(path=path, **entry["source"])
        found.append(source)
        if source.status != "excluded":
            usable[path.name] = entry
    if usable != known:
        save_manifest(folder, usable)
    return [too_short(s, frames) if s.status != "excluded" and s.num_frames < frames else s for s in found]


def too_short(source: Source, frames: int) -> Source:
    """The source as excluded for its length."""
    reason = f"{source.num_frames} frames, shorter than the clip length {frames}"
    return replace(source, status="excluded", reason=f"{reason} ({source.reason})" if source.reason else reason)


def load_manifest(folder: Path) -> dict[str, Any]:
    """The entries of the folder's manifest by file name; empty when there is none that this version wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return dict(manifest["entries"]) if manifest["version"] == MANIFEST_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save_manifest(folder: Path, found: dict[str, Any]) -> None:
    """Write the manifest beside and rename it into place; a folder that cannot be written to goes without."""
    partial = folder / f"{MANIFEST}.{os.getpid()}"
    try:
        partial.write_text(json.dumps({"version": MANIFEST_VERSION, "entries": found}, indent=1))
        partial.replace(folder / MANIFEST)
    except OSError as error:
        log.info("%s: no manifest kept: %s", folder, error.strerror)


def open_dataset(root: Path, *, frames: int) -> Dataset:
    """Index the sets of a dataset folder for clips of `frames` frames.

    Unusable sources are warned about by name and left out. Raises `UserError` when the folder, X or Y is missing or
    when X or Y holds nothing usable, with the reason for each file.
    """
    if not root.is_dir():
        raise UserError(f"{one_line(root)}: no such folder; expected a dataset folder with trainX and trainY")
    sets: dict[str, list[Source]] = {}
    excluded: list[Source] = []
    for name, folders in LAYOUT.items():
        folder = next((root / f for f in folders if (root / f).is_dir()), None)
        if folder is None and name in "xy":
            have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            raise UserError(f"{one_line(root)}: expected a folder {' or '.join(folders)}, found {one_line(have)}")
        found = index_folder(folder, frames=1 if name == "s" else frames, stills=name == "s") if folder else []
        bad = [s for s in found if s.status == "excluded"]
        sets[name] = [s for s in found if s.status != "excluded"]
        if folder and name in "xy" and not sets[name]:
            why = "; ".join(f"{one_line(s.path.name)}: {s.reason}" for s in bad) or "it is empty"
            raise UserError(f"{one_line(folder)}: no usable clip of {frames} frames: {why}")
        for source in found:
            if source.status != "ok":
                done = "left out" if source.status == "excluded" else f"its first {source.num_frames} frames are used"
                log.warning("%s: %s; %s", one_line(source.path), source.reason, done)
        excluded += bad
    return Dataset(root, sets, excluded, fingerprint_of(root, sets))


def fingerprint_of(root: Path, sets: dict[str, list[Source]]) -> str:
    """SHA-256 of what decides the draws; independent of where the dataset lies and of file times."""

    def rows() -> Iterator[list[Any]]:
        for name, sources in sorted(sets.items()):
            for s in sources:
                yield [name, s.path.relative_to(root).as_posix(), s.codec, s.num_frames, s.width, s.height, s.num_bytes]

    return hashlib.sha256(json.dumps(list(rows())).encode()).hexdigest()
