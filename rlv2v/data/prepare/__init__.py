"""Prepare any videos for training: a dataset folder that loads fast.

Every source is decoded once to find what is usable and once to write it. An output is named after its source and the
hash of its bytes and of the settings, appears complete or not at all, and is never replaced: the same command goes on
after a kill. `prepared.json` in the output folder says what became of every source.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from rlv2v.data.index import file_key, source_paths
from rlv2v.data.inspect import excluded_source
from rlv2v.data.prepare.convert import MAX_FPS, PARTIAL, Format, Item, Store, convert_source, survey_source
from rlv2v.data.prepare.report import REPORT, Report
from rlv2v.data.workers import cores, run_all
from rlv2v.errors import UserError, one_line
from rlv2v.files import lock_folder

SET_NAME = re.compile(r"(train|val|test)(X|Y|Z|S|Truth|A|B)")
MAX_RAW_SHARE = 0.5
"""`--store auto` takes raw up to this share of the free disk."""
PROGRESS: dict[str, Any] = {"unit": "file", "delay": 1, "disable": None}


def prepare_dataset(
    src: Path,
    out: Path,
    *,
    size: int,
    store: Literal["auto", "raw", "video"],
    fps: float | None,
    frames: int,
    into: str,
    jobs: int,
    yes: bool,
) -> None:
    """Find, read, plan, ask, write and report; the arguments are the command's (`rlv2v.prepare.Args`).

    Raises:
        UserError: bad arguments, nothing usable in `src`, another run at work in `out`, or a disk that is too small.
        OSError: the disk fails.
    """
    for name, value, low, high in (("size", size, 1, 4096), ("frames", frames, 1, 10**9), ("jobs", jobs, 0, 1024)):
        if not low <= value <= high:
            raise UserError(f"--{name}: expected {low} to {high}, got {value}")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UserError(f"--fps: expected more than 0 and up to {MAX_FPS}, got {fps:g}")
    if not SET_NAME.fullmatch(into) or into != set_name(into):
        raise UserError(f"--into: expected trainX, trainY, trainZ, trainS, valX, testX ..., got {into}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder")
    if out.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{out}: lies in the source folder; choose a folder outside of it")
    jobs = jobs or cores()
    sources = find_sources(src, into)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        remove_partial(out)
        report = Report(out, size=size, fps=fps, store=store)
        try:
            items = survey_all(sources, fps, frames, report, jobs)
            free = shutil.disk_usage(out).free
            chosen, why = choose_store(store, items, size, report, free)
            output_format = Format(size, chosen, fps)
            items = name_outputs(items, output_format)
            report.start(src, items, output_format, why)
            if not any(item.usable for item in items):
                reasons = "; ".join(f"{i.source.path.name}: {i.source.reason}" for i in items) or "it is empty"
                raise UserError(f"{src}: nothing usable: {reasons}")
            todo = select_missing(items, out, output_format, report)
            needed = sum(map(output_format.estimate_bytes, todo))
            if not yes:
                confirm_disk(out, needed, free)
            print(one_line(f"{out}: {chosen} ({why}), {len(todo)} to make, about {gib(needed)}"))
            convert = partial(convert_source, out=out, output_format=output_format)
            for item, result in tqdm(run_all(convert, todo, jobs), "write", len(todo), **PROGRESS):
                report.finish(item, result)
            report.print_summary(src, items, {item.output for item in todo})
        except KeyboardInterrupt:
            print(f"\n{one_line(out)}: stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            remove_partial(out)
            report.save()


def remove_partial(out: Path) -> None:
    """Remove half-written outputs and reports, this run's or those of one that was killed."""
    for path in [*out.glob(f"*/.*{PARTIAL[1:]}*"), *out.glob(f".{REPORT}.*")]:
        path.unlink(missing_ok=True)


def find_sources(src: Path, into: str) -> list[tuple[str, Path]]:
    """Return (set, path) of all sources of `src` in natural order; those of a flat folder go into the set `into`."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; expected a dataset folder or a folder of videos")
    sets = {p: set_name(p.name) for p in sorted(src.iterdir()) if SET_NAME.fullmatch(p.name) and p.is_dir()}
    if len(set(sets.values())) < len(sets):
        names = ", ".join(p.name for p in sets)
        raise UserError(f"{src}: holds {names}, of which two mean the same set; rename one")
    folders = sets or {src: into}
    return [(name, p) for folder, name in folders.items() for p in source_paths(folder, stills=name.endswith("S"))]


def set_name(folder: str) -> str:
    """Return the name that a set gets: CycleGAN's A and B become X and Y."""
    return {"A": f"{folder[:-1]}X", "B": f"{folder[:-1]}Y"}.get(folder[-1], folder)


def survey_all(
    sources: list[tuple[str, Path]], fps: float | None, min_frames: int, report: Report, jobs: int
) -> list[Item]:
    """Return an item for every source: from the report where it is unchanged, else by decoding it.

    What would have fewer frames than `min_frames` is excluded; stills have one.
    """
    known = {path: item for _, path in sources if (item := report.known_item(path))}
    keys = {path: file_key(path) for _, path in sources if path not in known}
    survey = partial(survey_source, fps=fps)
    for path, result in tqdm(run_all(survey, list(keys), jobs), "read", len(keys), **PROGRESS):
        known[path] = Item(excluded_source(path, str(result))) if isinstance(result, UserError) else result
        report.add_item(keys[path], known[path])
    items = []
    for name, path in sources:
        item = replace(known[path], set=name)
        if item.usable and item.source.kind != "image" and item.frames < min_frames:
            cause = f" ({item.source.reason})" if item.source.reason else ""
            item = item.exclude(f"{item.frames} frames, fewer than --frames {min_frames}{cause}")
        items.append(item)
    return items


def choose_store(
    store: Literal["auto", "raw", "video"], items: list[Item], size: int, report: Report, free: int
) -> tuple[Store, str]:
    """Return the store and why; `auto` stays with what an earlier run into the same folder chose."""
    if store != "auto":
        return store, "as asked"
    if report.settings["store"]:
        return report.settings["store"], report.settings["why"]
    raw = sum(Format(size, "raw", None).estimate_bytes(item) for item in items if item.usable)
    fits = raw <= MAX_RAW_SHARE * free
    comparison = "at most" if fits else "more than"
    why = f"raw needs {gib(raw)}, {comparison} {MAX_RAW_SHARE:.0%} of the free {gib(free)}"
    return "raw" if fits else "video", why


def name_outputs(items: list[Item], output_format: Format) -> list[Item]:
    """Give each usable item its output's name; the second of two equal files with one name is excluded.

    A clip of testX and its truth in testTruth share a name, as they did in SRC, made from the hashes of both.
    """
    pairs: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        pairs[pair_key(item)].append(item)
    taken: dict[str, str] = {}
    named = []
    for item in items:
        path, sha256 = item.source.path, item.source.hash
        pair = sorted(pairs[pair_key(item)], key=lambda i: i.set.endswith("Truth"))
        if [i.set.endswith("Truth") for i in pair] == [False, True]:
            path = pair[0].source.path
            sha256 = hashlib.sha256("".join(sorted(i.source.hash for i in pair)).encode()).hexdigest()
        output = f"{item.set}/{output_format.output_name(path, item.source, sha256)}"
        if item.usable and output in taken:
            item = item.exclude(f"the same bytes as {taken[output]}")
        elif item.usable:
            taken[output] = item.source.path.name
            item = replace(item, output=output)
        named.append(item)
    return named


def pair_key(item: Item) -> tuple[str, str]:
    """Return what a source and its truth share: the split, and the name without suffix ("" for a folder of images)."""
    path = item.source.path
    return re.sub("(X|Truth)$", "", item.set), "" if SET_NAME.fullmatch(path.name) else path.stem


def select_missing(items: list[Item], out: Path, output_format: Format, report: Report) -> list[Item]:
    """Return the items that are still to be made, and report the others; a damaged output is named and left alone."""
    missing = []
    for item in items:
        path = out / item.output
        if item.usable and not path.exists():
            missing.append(item)
        elif item.usable and output_format.is_complete(path, item):
            report.finish(item, path.stat().st_size)
        elif item.usable:
            report.finish(item, UserError(f"{path} is there but damaged; remove it and start again"))
    return missing


def confirm_disk(out: Path, needed: int, free: int) -> None:
    """Ask before more disk is used than is free. Raises `UserError` on no, or where nobody can be asked."""
    if needed <= free:
        return
    problem = f"{out}: about {gib(needed)} are needed, {gib(free)} are free"
    if not sys.stdin.isatty():
        raise UserError(f"{problem}; free space, use --store video or a smaller --size, or give --yes")
    if input(one_line(f"{problem}. Go on? [y/N] ")).strip().lower() not in ("y", "yes"):
        raise UserError(f"{problem}; nothing was written")


def gib(num_bytes: int) -> str:
    """Return a number of bytes in GiB, for people."""
    return f"{num_bytes / 2**30:.2f} GiB"
