"""What a dataset folder holds and what of it is usable: every source is decoded once, to the end, before training.

A folder has `trainX trainY trainZ trainS` (CycleGAN's `trainA trainB` are read as X and Y; Z and S may be missing).
Each entry of a set is one source: a video file, a folder of numbered images, a raw `.npy`; loose images are one source
together, in `trainS` one each. What was found (see `rlv2v.data.inspect`), also what is wrong with a file, is kept in
`.rlv2v-manifest.json` inside the set's folder: a file with the same name, size and time is not opened again, one with
another time but the same size and content is not decoded again. What could not be read (no permission, a dead link) is
tried again each time, and what was found damaged is once PyAV has another version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
from tqdm import tqdm

from rlv2v.data import video
from rlv2v.data.inspect import Source, excluded, inspect
from rlv2v.data.workers import cores
from rlv2v.errors import UserError, one_line

__all__ = ["Dataset", "Source", "entries", "index_folder", "open_dataset"]
MANIFEST = ".rlv2v-manifest.json"
MANIFEST_VERSION = 3
LAYOUT = {"x": ("trainX", "trainA"), "y": ("trainY", "trainB"), "z": ("trainZ",), "s": ("trainS",)}
CHUNK = 2**20
"""Bytes that are hashed at a time."""
MAX_WORKERS = 8
"""Files decoded at a time, at most: each 4K decoder takes up to 400 MB."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What the manifest keeps of a source."""

    key: list[int]
    """See `file_key`; empty where it cannot be read or changed meanwhile: no key that a file has."""
    source: Source


@dataclass(frozen=True)
class Dataset:
    """The usable sources of each set, in natural order, and what was left out."""

    root: Path
    sets: dict[str, list[Source]]
    """Keys x, y, z, s; z and s may be empty."""
    excluded: list[Source]
    fingerprint: str
    """SHA-256 over names, lengths and contents: equal fingerprints draw equal clips."""


def entries(folder: Path, *, stills: bool = False) -> list[Path]:
    """The sources of a set's folder in natural order; loose images are `folder` itself, or one each if `stills`."""
    found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=video.natural_key)
    if stills:
        return found
    loose = [p for p in found if not p.is_dir() and video.kind_of(p) == "image"]
    return ([folder] if loose else []) + [p for p in found if p not in loose]


def file_key(path: Path) -> list[int]:
    """What tells a changed source from an unchanged one: [files, bytes, time], the time in ns.

    Of a folder, the time is a checksum over name, size and time of each image. Raises `OSError` where a file is missing
    or cannot be looked at, `UserError` for a pipe, socket or device.
    """
    files = video.files_of(path)
    stats = [p.stat() for p in files]
    for file, found in zip(files, stats, strict=True):
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file}: neither a file nor a folder")
    size = sum(s.st_size for s in stats)
    if not path.is_dir():
        return [1, size, stats[0].st_mtime_ns]
    rows = json.dumps([(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)])
    return [len(stats), size, int(hashlib.sha256(rows.encode()).hexdigest()[:12], 16)]


def content_hash(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it; of a folder, SHA-256 of those of its images in order.

    Raises `OSError` for what cannot be read.
    """
    digests = [file_hash(file) for file in video.files_of(path)]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if path.is_dir() else digests[0]


def file_hash(path: Path) -> str:
    """SHA-256 of all bytes of a file."""
    digest, block = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(block):
            digest.update(memoryview(block)[:num])
    return digest.hexdigest()


def unchanged(path: Path, known: Entry | None) -> bool:
    """Whether a source has the key by which it is known."""
    try:
        return known is not None and known.key == file_key(path)
    except (OSError, UserError):
        return False


def examine(path: Path, known: Entry | None, stop: threading.Event) -> Entry:
    """A source as it is now: as `known` where its content is still the same, else decoded to its end."""
    try:
        key = file_key(path)
        content = content_hash(path)
        if known and known.key[:2] == key[:2] and known.source.hash == content:
            return Entry(key, known.source)
        if key[1] == 0 and not path.is_dir():
            raise UserError("the file is empty (0 bytes)")
        source = replace(inspect(path, stop), num_bytes=key[1])
        return Entry(key if file_key(path) == key else [], replace(source, hash=content))
    except (OSError, UserError) as error:
        return Entry([], excluded(path, getattr(error, "strerror", None) or str(error)))


def index_folder(folder: Path, *, frames: int, stills: bool = False, workers: int | None = None) -> list[Source]:
    """All sources of one set's folder with their status; sources shorter than `frames` are excluded.

    `stills` makes each loose image a source (style images). `workers` files are decoded at a time (None: one a core).
    An interrupted index keeps what it has found. Raises `UserError` if the folder cannot be listed.
    """
    try:
        paths = entries(folder, stills=stills)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; expected a folder of videos") from error
    known = load_manifest(folder)
    names = {path: name_in(folder, path) for path in paths}
    found = {name: known[name] for path, name in names.items() if unchanged(path, known.get(name))}
    try:
        changed = {path: known.get(name) for path, name in names.items() if name not in found}
        for path, entry in examine_all(changed, folder, workers):
            found[names[path]] = entry
    finally:
        if found != known:
            save_manifest(folder, found if len(found) == len(paths) else known | found)
    sources = [found[name].source for name in names.values()]
    return [too_short(s, frames) if s.status != "excluded" and s.num_frames < frames else s for s in sources]


def name_in(folder: Path, path: Path) -> str:
    """The name of a source in its folder's manifest; "." is the folder itself, as one clip of loose images."""
    return path.relative_to(folder).as_posix()


def examine_all(
    changed: Mapping[Path, Entry | None], folder: Path, workers: int | None
) -> Iterator[tuple[Path, Entry]]:
    """Each source with what it is now, in the order in which they are done. changed: what was known of each."""
    if not changed:
        return
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers or min(MAX_WORKERS, cores()), thread_name_prefix="rlv2v-index")
    try:
        jobs = {pool.submit(examine, path, known, stop): path for path, known in changed.items()}
        progress = tqdm(
            as_completed(jobs), f"index {one_line(folder.name)}", len(jobs), unit="file", delay=2, leave=False
        )
        yield from ((jobs[job], job.result()) for job in progress)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def too_short(source: Source, frames: int) -> Source:
    """The source as excluded for its length."""
    reason = f"{source.num_frames} frames, shorter than the clip length {frames}"
    return replace(source, status="excluded", reason=f"{reason} ({source.reason})" if source.reason else reason)


def load_manifest(folder: Path) -> dict[str, Entry]:
    """What the folder's manifest still says, by file name; empty when there is none that this version wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        rows = manifest["entries"] if manifest["version"] == MANIFEST_VERSION else {}
        found = {name: Entry(row["key"], Source(path=folder / name, **row["source"])) for name, row in rows.items()}
        same_decoder = manifest.get("pyav") == av.__version__
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: entry for name, entry in found.items() if same_decoder or entry.source.status == "ok"}


def save_manifest(folder: Path, found: Mapping[str, Entry]) -> None:
    """Write the manifest beside and rename it into place; a folder that cannot be written to goes without."""
    partial = folder / f"{MANIFEST}.{os.getpid()}"
    rows = {
        name: {"key": entry.key, "source": {k: v for k, v in asdict(entry.source).items() if k != "path"}}
        for name, entry in sorted(found.items())
    }
    try:
        partial.write_text(json.dumps({"version": MANIFEST_VERSION, "pyav": av.__version__, "entries": rows}, indent=1))
        partial.replace(folder / MANIFEST)
    except OSError as error:
        log.info("%s: no manifest kept, the next start reads every file again: %s", one_line(folder), error.strerror)


def open_dataset(root: Path, *, frames: int) -> Dataset:
    """Index the sets of a dataset folder for clips of `frames` frames.

    Unusable sources are warned about by name and left out. Raises `UserError` when the folder, X or Y is missing or
    when X or Y holds nothing usable, with the reason for each file.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a dataset folder with trainX and trainY")
    sets: dict[str, list[Source]] = {}
    excluded: list[Source] = []
    for name, folders in LAYOUT.items():
        folder = next((root / f for f in folders if (root / f).is_dir()), None)
        if folder is None and name in "xy":
            have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            raise UserError(f"{root}: expected a folder {' or '.join(folders)}, found {have}")
        found = index_folder(folder, frames=1 if name == "s" else frames, stills=name == "s") if folder else []
        bad = [s for s in found if s.status == "excluded"]
        sets[name] = [s for s in found if s.status != "excluded"]
        if folder and name in "xy" and not sets[name]:
            why = "; ".join(f"{one_line(s.path.name)}: {s.reason}" for s in bad) or "it is empty"
            raise UserError(f"{folder}: no usable clip of {frames} frames: {why}")
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
                yield [name, s.path.relative_to(root).as_posix(), s.codec, s.num_frames, s.width, s.height, s.hash]

    return hashlib.sha256(json.dumps(list(rows())).encode()).hexdigest()
