"""Index a dataset folder: every source is decoded once, to its end, before training.

A folder has `trainX trainY trainZ trainS` (CycleGAN's `trainA trainB` are read as X and Y; Z and S may be missing).
Each source of a set is a video file, a folder of numbered images, a raw `.npy`, or an image, at any depth; see
`source_paths`. The results (see `rlv2v.data.inspect`), faults included, are stored in
`.rlv2v-manifest.json` inside the set's folder: a file with the same name, size and time is not opened again, one with
another time but the same size and content is not decoded again. What could not be read (no permission, a dead link) is
tried again each time, and what was found damaged is tried again once PyAV has another version.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import av
from tqdm import tqdm

from rlv2v.data import video
from rlv2v.data.inspect import Source, Stopped, excluded_source, inspect
from rlv2v.data.workers import cores
from rlv2v.errors import UserError, get_logger, several
from rlv2v.files import write_atomically
from rlv2v.runtime.interrupt import held

__all__ = ["Dataset", "Source", "index_folder", "open_dataset", "source_paths"]
MANIFEST = ".rlv2v-manifest.json"
MANIFEST_VERSION = 5
LAYOUT = {"x": ("trainX", "trainA"), "y": ("trainY", "trainB"), "z": ("trainZ",), "s": ("trainS",)}
MAX_WORKERS = 8
"""Files decoded at a time, at most: each 4K decoder takes up to 400 MB."""
MAX_REASONS = 8
"""Files that a message names with a reason each."""
POLL = 0.1
"""Seconds between two looks for a signal that asks to stop."""
SAVE_EVERY = 10.0
"""Seconds between two savings of the manifest, of which a kill costs what came after the last."""
CHUNK = 2**20
"""Bytes that are hashed between two looks for the end."""
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
    """Keys x, y, z, s; z and s may be empty. y holds stills where there is no video of the target domain."""
    excluded: list[Source]
    fingerprint: str
    """SHA-256 over names, lengths and contents: equal fingerprints draw equal clips."""

    def contents(self) -> dict[str, str]:
        """Return what each file's clips depend on, by its path in the dataset."""
        sources = [source for sources in self.sets.values() for source in sources]
        return {s.path.relative_to(self.root).as_posix(): f"{s.num_frames} {s.hash}" for s in sources}


def source_paths(folder: Path, *, stills: bool = False) -> list[Path]:
    """Return a set's sources at any depth, in natural order.

    A folder whose images are numbered is a source, their video; `folder` itself may be one. Any other image is a source
    of one frame, as every image is if `stills`. Each other file is a source, and so is a folder with nothing in it.
    """
    return list(_sources(folder, stills, frozenset()))


def _sources(folder: Path, stills: bool, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yield the sources of a folder; `above` are the folders that it lies in, by device and inode."""
    status = folder.stat()
    above |= {(status.st_dev, status.st_ino)}
    paths = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=video.natural_key)
    images = [p for p in paths if not p.is_dir() and video.kind_of(p) == "image"]
    frames = set(images) if not stills and are_numbered(images) else set()
    if frames:
        yield folder
    for path in paths:
        if not path.is_dir():
            yield from () if path in frames else (path,)
        elif (path.stat().st_dev, path.stat().st_ino) not in above:  # a link that leads back up
            try:
                yield from list(_sources(path, stills, above)) or [path]
            except OSError:
                yield path  # why it cannot be listed is found where sources are read


def are_numbered(images: Sequence[Path]) -> bool:
    """Return whether images are frames of a video: two or more, named alike but for one number, as frame_1, frame_2."""
    names = [re.split("([0-9]+)", image.stem) for image in images]
    if len({len(pieces) for pieces in names}) != 1:
        return False
    differing = [place for place, pieces in enumerate(zip(*names, strict=True)) if len(set(pieces)) > 1]
    return len(differing) == 1 and differing[0] % 2 == 1


def name_in(folder: Path, source: Path) -> str:
    """Return a source's path in its set's folder without suffix, "" for the folder itself."""
    return "" if source == folder else source.relative_to(folder).with_suffix("").as_posix()


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


def content_hash(path: Path, stop: threading.Event) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it; of a folder, SHA-256 over those of its images in order.

    Raises:
        OSError: it cannot be read.
        Stopped: `stop` is set.
    """
    if path.is_dir():
        hashes = (content_hash(file, stop) for file in video.files_of(path))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    content, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(buffer):
            if stop.is_set():
                raise Stopped
            content.update(buffer[:num])
    return content.hexdigest()


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
        content = content_hash(path, stop)
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
    A signal that asks to end stops it within a second; what it has found by then is stored for the next start.

    Raises:
        UserError: the folder cannot be listed.
        Stopped: a signal has come, and its own handler let the program go on.
    """
    try:
        paths = source_paths(folder, stills=stills)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; expected a folder of videos") from error
    manifest = load_manifest(folder)
    names = {path: path.relative_to(folder).as_posix() for path in paths}  # "." for loose images
    entries = {n: manifest[n] for path, n in names.items() if n in manifest and is_unchanged(path, manifest[n].key)}
    changed = {name: path for path, name in names.items() if name not in entries}

    def save() -> None:
        if entries != manifest:
            save_manifest(folder, entries if len(entries) == len(paths) else manifest | entries)

    with held() as signals:
        try:
            save_at = time.monotonic() + SAVE_EVERY
            for name, entry in examine_all(changed, manifest, workers or min(MAX_WORKERS, cores()), signals):
                entries[name] = entry
                if time.monotonic() > save_at:
                    save()
                    save_at = time.monotonic() + SAVE_EVERY
        finally:
            save()
    if len(entries) < len(names):
        raise Stopped
    return [exclude_short(entries[name].source, frames) for name in names.values()]


def examine_all(
    paths: Mapping[str, Path], manifest: Mapping[str, Entry], workers: int, signals: Sequence[int]
) -> Iterator[tuple[str, Entry]]:
    """Yield the name and the entry of each source as it is examined, until there is a signal in the list."""
    stop, found = threading.Event(), SimpleQueue[tuple[str, Future[Entry]]]()

    def report(name: str, job: Future[Entry]) -> None:
        found.put((name, job))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="rlv2v-index")
    progress = tqdm(desc="index", total=len(paths), unit="file", delay=2, leave=False)
    try:
        for name, path in paths.items():
            job = pool.submit(examine, path, manifest.get(name), stop)
            job.add_done_callback(partial(report, name))
        num_left = len(paths)  # a bar that TQDM_DISABLE switches off does not count
        while num_left and not signals:
            with suppress(Empty):
                name, job = found.get(timeout=POLL)
                yield name, job.result()
                num_left -= 1
                progress.update()
        stop.set()
        pool.shutdown(cancel_futures=True)
        while not found.empty():  # what the threads have found meanwhile
            name, job = found.get()
            if not job.cancelled() and job.exception() is None:
                yield name, job.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        progress.close()


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

    Unusable sources are warned about by name and left out. Where Y has no video, its stills are its sources, or else
    those of S: a clip is then a crop that moves over one. Raises `UserError` when the folder, X or Y is missing or when
    X or Y holds nothing usable, with the reason for each file.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a dataset folder with trainX and trainY")
    places = {name: next((root / f for f in names if (root / f).is_dir()), None) for name, names in LAYOUT.items()}
    sets: dict[str, list[Source]] = {name: [] for name in LAYOUT}
    excluded: list[Source] = []
    for name in "xsyz":
        if not places[name] and (name == "x" or (name == "y" and not places["s"])):
            present = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            raise UserError(f"{root}: expected a folder {' or '.join(LAYOUT[name])}, found {present}")
        if folder := places[name]:
            sources = index_folder(folder, frames=1 if name == "s" else frames, stills=name == "s")
            stills = [replace(s, status="ok", reason="") for s in sources if s.is_still and s.status == "excluded"]
            if name == "y" and stills and all(s.status == "excluded" for s in sources):
                sets[name] = stills
                sources = [s for s in sources if not s.is_still]
            required = name == "x" or (name == "y" and not (sets["y"] or sets["s"]))
            sets[name] += usable_sources(sources, folder, f"clip of {frames} frames", required=required)
            excluded += [s for s in sources if s.status == "excluded"]
    used = places["y"] if sets["y"] else places["s"]
    sets["y"] = sets["y"] or [s for s in sets["s"] if s.is_still]
    if not sets["y"]:
        raise UserError(f"{root}: expected videos or stills of the target domain in trainY, or stills in trainS")
    if sets["y"][0].is_still:
        log.warning("%s: Y has no video; its clips are crops that move over %d stills", used, len(sets["y"]))
    return Dataset(root, {name: sets[name] for name in LAYOUT}, excluded, fingerprint_of(root, sets))


def usable_sources(sources: list[Source], folder: Path, wanted: str, *, required: bool) -> list[Source]:
    """Return the usable ones of a folder's sources, and warn about the others and those that are used in part.

    Raises:
        UserError: none is usable though at least one is `required`; the text says `wanted` and each reason.
    """
    usable = [s for s in sources if s.status != "excluded"]
    stills = [s for s in sources if s.status == "excluded" and s.kind == "image" and s.num_frames]
    others = [s for s in sources if s not in stills]
    still = f"{len(stills)} images are stills of one frame, since their names are not numbered as frame_1, frame_2"
    if required and not usable:
        reasons = [f"{s.path.name}: {s.reason}" for s in others] + ([still] if stills else [])
        raise UserError(f"{folder}: no usable {wanted}: {several(reasons, '; ', MAX_REASONS) or 'it is empty'}")
    if stills:
        log.warning("%s: %s; left out, as a %s needs more; stills serve in trainS", folder, still, wanted)
    for source in others:
        if source.status != "ok":
            outcome = "left out" if source.status == "excluded" else f"its first {source.num_frames} frames are used"
            log.warning("%s: %s; %s", source.path, source.reason, outcome)
    return usable


def describe_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which files changed, appeared or vanished between two `Dataset.contents`, a few by name."""
    kinds = {
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
        "appeared": [name for name in now if name not in before],
        "vanished": [name for name in before if name not in now],
    }
    texts = []
    for kind, names in kinds.items():
        if names:
            texts.append(f"{several(names)} {kind}")
    return "; ".join(texts) or "the names of its folders or the way its files are read changed"


def fingerprint_of(root: Path, sets: Mapping[str, list[Source]]) -> str:
    """Return the SHA-256 of what decides the draws, whatever the dataset's place and the files' times."""
    rows = [
        [name, s.path.relative_to(root).as_posix(), s.codec, s.num_frames, s.width, s.height, s.hash]
        for name, sources in sorted(sets.items())
        for s in sources
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
