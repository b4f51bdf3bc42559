"""Index a dataset folder: every source is decoded once, to its end, before training.

A folder has `trainX trainY trainZ trainS` (CycleGAN's `trainA trainB` are read as X and Y; Z and S may be missing).
Each source of a set is a video file, a folder of numbered images, or a raw `.npy`; loose images are one source
together, in `trainS` one each. The results (see `rlv2v.data.inspect`), faults included, are stored in
`.rlv2v-manifest.json` inside the set's folder: a file with the same name, size and time is not opened again, one with
another time but the same size and content is not decoded again. What could not be read (no permission, a dead link) is
tried again each time, and what was found damaged is tried again once PyAV has another version.
"""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import av
from tqdm import tqdm

from rlv2v.data import video
from rlv2v.data.inspect import Source, excluded_source, inspect
from rlv2v.data.workers import cores
from rlv2v.errors import UserError, get_logger, one_line
from rlv2v.files import write_atomically

__all__ = ["Dataset", "Source", "index_folder", "open_dataset", "source_paths"]
MANIFEST = ".rlv2v-manifest.json"
MANIFEST_VERSION = 5
LAYOUT = {"x": ("trainX", "trainA"), "y": ("trainY", "trainB"), "z": ("trainZ",), "s": ("trainS",)}
MAX_WORKERS = 8
"""Files decoded at a time, at most: each 4K decoder takes up to 400 MB."""
log = get_logger(__name__)


class Entry(NamedTuple):
    """Hold one source as the manifest stores it."""

    key: list[int]
    """See `file_key`; empty, which no file has, where the file cannot be read or changed while it was decoded."""
    source: Source


@dataclass(frozen=True)
class Dataset:
    """Hold the usable sources of each set, in natural order, and those that were left out."""

    root: Path
    sets: dict[str, list[Source]]
    """Keys x, y, z, s; z and s may be empty."""
    excluded: list[Source]
    fingerprint: str
    """SHA-256 over names, lengths and contents: equal fingerprints draw equal clips."""


def source_paths(folder: Path, *, stills: bool = False) -> list[Path]:
    """Return a set's sources in natural order; loose images are one, `folder` itself, or one each if `stills`."""
    paths = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=video.natural_key)
    if stills:
        return paths
    loose = {p for p in paths if not p.is_dir() and video.kind_of(p) == "image"}
    return ([folder] if loose else []) + [p for p in paths if p not in loose]


def file_key(path: Path) -> list[int]:
    """Return what tells a changed source from an unchanged one: [files, bytes, time], the time in ns.

    For a folder, the time is a checksum over name, size and time of each image.

    Raises:
        OSError: a file is missing or cannot be looked at.
        UserError: it is a pipe, socket or device.
    """
    files = video.files_of(path)
    stats = [p.stat() for p in files]
    for file, status in zip(files, stats, strict=True):
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{file}: neither a file nor a folder")
    size = sum(s.st_size for s in stats)
    if not path.is_dir():
        return [1, size, stats[0].st_mtime_ns]
    rows = json.dumps([(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)])
    return [len(stats), size, int(hashlib.sha256(rows.encode()).hexdigest()[:12], 16)]


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it; of a folder, SHA-256 over those of its images in order.

    Raises `OSError` for what cannot be read.
    """
    if path.is_dir():
        return hashlib.sha256("".join(map(content_hash, video.files_of(path))).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_unchanged(path: Path, key: list[int]) -> bool:
    """Return whether a source still has this key."""
    try:
        return bool(key) and key == file_key(path)
    except (OSError, UserError):
        return False


def examine(path: Path, entry: Entry | None, stop: threading.Event) -> Entry:
    """Return a source as it is now: by its old `entry` where the content is the same, else decoded to its end."""
    try:
        key = file_key(path)
        content = content_hash(path)
        if entry and entry.key[:2] == key[:2] and entry.source.hash == content:
            return Entry(key, entry.source)
        if key[1] == 0 and not path.is_dir():
            raise UserError("the file is empty (0 bytes)")
        source = replace(inspect(path, stop), num_bytes=key[1], hash=content)
        return Entry(key if file_key(path) == key else [], source)
    except (OSError, UserError) as error:
        return Entry([], excluded_source(path, getattr(error, "strerror", None) or str(error)))


def index_folder(folder: Path, *, frames: int, stills: bool = False, workers: int | None = None) -> list[Source]:
    """Return all sources of one set's folder with their status; sources shorter than `frames` are excluded.

    `stills` makes each loose image a source (style images). `workers` files are decoded at a time (None: one a core).
    An interrupted index stores what it has found. Raises `UserError` if the folder cannot be listed.
    """
    try:
        paths = source_paths(folder, stills=stills)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; expected a folder of videos") from error
    manifest = load_manifest(folder)
    names = {path: path.relative_to(folder).as_posix() for path in paths}  # "." for loose images
    entries = {n: manifest[n] for path, n in names.items() if n in manifest and is_unchanged(path, manifest[n].key)}
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers or min(MAX_WORKERS, cores()), thread_name_prefix="rlv2v-index")
    try:
        changed = [(path, name) for path, name in names.items() if name not in entries]
        jobs = {pool.submit(examine, path, manifest.get(name), stop): name for path, name in changed}
        title = f"index {one_line(folder.name)}"
        for job in tqdm(as_completed(jobs), title, len(jobs), unit="file", delay=2, leave=False):
            entries[jobs[job]] = job.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        if entries != manifest:
            save_manifest(folder, entries if len(entries) == len(paths) else manifest | entries)
    return [exclude_short(entries[name].source, frames) for name in names.values()]


def exclude_short(source: Source, frames: int) -> Source:
    """Return the source, excluded if it has fewer frames than a clip."""
    if source.status == "excluded" or source.num_frames >= frames:
        return source
    reason = f"{source.num_frames} frames, shorter than the clip length {frames}"
    return replace(source, status="excluded", reason=f"{reason} ({source.reason})" if source.reason else reason)


def load_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries of the folder's manifest that still hold, by file name; none if another version wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        rows = manifest["entries"] if manifest["version"] == MANIFEST_VERSION else {}
        entries = {name: Entry(row["key"], Source.from_row(folder / name, row["source"])) for name, row in rows.items()}
        same_decoder = manifest.get("pyav") == av.__version__
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: entry for name, entry in entries.items() if same_decoder or entry.source.status == "ok"}


def save_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the folder's manifest; a folder that cannot be written to goes without."""
    rows = {name: {"key": entry.key, "source": entry.source.to_row()} for name, entry in sorted(entries.items())}
    manifest = {"version": MANIFEST_VERSION, "pyav": av.__version__, "entries": rows}
    try:
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        log.info("%s: no manifest stored, the next start reads every file again: %s", folder, error.strerror)


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
        sets[name] = []
        folder = next((root / f for f in folders if (root / f).is_dir()), None)
        if folder:
            sources = index_folder(folder, frames=1 if name == "s" else frames, stills=name == "s")
            sets[name] = usable_sources(sources, folder, f"clip of {frames} frames", required=name in "xy")
            excluded += [s for s in sources if s.status == "excluded"]
        elif name in "xy":
            present = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            raise UserError(f"{root}: expected a folder {' or '.join(folders)}, found {present}")
    return Dataset(root, sets, excluded, fingerprint_of(root, sets))


def usable_sources(sources: list[Source], folder: Path, wanted: str, *, required: bool) -> list[Source]:
    """Return the usable ones of a folder's sources, and warn about the others and those that are used in part.

    Raises:
        UserError: none is usable though at least one is `required`; the text says `wanted` and each reason.
    """
    usable = [s for s in sources if s.status != "excluded"]
    if required and not usable:
        reasons = "; ".join(f"{s.path.name}: {s.reason}" for s in sources) or "it is empty"
        raise UserError(f"{folder}: no usable {wanted}: {reasons}")
    for source in sources:
        if source.status != "ok":
            outcome = "left out" if source.status == "excluded" else f"its first {source.num_frames} frames are used"
            log.warning("%s: %s; %s", source.path, source.reason, outcome)
    return usable


def fingerprint_of(root: Path, sets: Mapping[str, list[Source]]) -> str:
    """Return the SHA-256 of what decides the draws, whatever the dataset's place and the files' times."""
    rows = [
        [name, s.path.relative_to(root).as_posix(), s.codec, s.num_frames, s.width, s.height, s.hash]
        for name, sources in sorted(sets.items())
        for s in sources
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
