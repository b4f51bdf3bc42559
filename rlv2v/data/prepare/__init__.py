"""Prepare any videos for training: a dataset folder that loads fast.

Every source is decoded once to find what is usable and once to write it. An output is named after its source and the
hash of its bytes and of the settings, appears complete or not at all, and is never replaced: the same command goes on
after a kill. `prepared.json` in the output folder says what became of every source.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from rlv2v.crop_size import CropSize
from rlv2v.data.index import is_unchanged, name_in, source_paths
from rlv2v.data.inspect import Source, excluded_source
from rlv2v.data.prepare.convert import MAX_FPS, Format, Item, Store, convert_source, survey_source
from rlv2v.data.workers import cores, run_all
from rlv2v.errors import UserError, one_line
from rlv2v.files import PARTIAL, lock_folder, write_atomically
from rlv2v.runtime.interrupt import Stop, raised

Choice = Literal["auto", "raw", "video"]
REPORT = "prepared.json"
SET_NAME = re.compile(r"(train|val|test)(X|Y|Z|S|Truth|A|B)")
MAX_RAW_SHARE = 0.5
"""`--store auto` takes raw up to this share of the free disk."""
PROGRESS: dict[str, Any] = {"unit": "file", "delay": 1, "disable": None}


class Report:
    """Hold and save the settings, a row for every source, and the surveys by the source's absolute path."""

    def __init__(self, out: Path, *, size: CropSize, fps: float | None, store: Choice) -> None:
        """Load the report in `out`, if any. Raises `UserError` if its outputs were made with other settings."""
        self.path, self._next_save = out / REPORT, time.monotonic() + 2
        asked: dict[str, Any] = {"size": size.plain, "fps": fps}
        self.settings: dict[str, Any] = {**asked, "store": None, "why": ""}
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.surveys: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            old = json.loads(self.path.read_text())
            settings, surveys = old["settings"], dict(old["surveys"])
            rows = {(row["set"], row["source"]): row for row in old["sources"]}
            made = any(row["status"] == "made" for row in rows.values())
            same = {name: settings[name] for name in asked} == asked and store in ("auto", settings["store"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: cannot be read as this command's report ({error}); "
                "choose another folder, or remove the file: complete outputs stay"
            ) from None
        if same:
            self.settings, self.rows, self.surveys = settings, rows, surveys
        elif made:
            flags = " ".join(f"--{name} {settings[name]}" for name in ("size", "fps", "store") if settings[name])
            raise UserError(f"{out}: was prepared with {flags}; give the same, or choose another folder")

    def known_item(self, path: Path) -> Item | None:
        """Return an earlier run's survey of a source that has not changed since; None: read the source."""
        known = self.surveys.get(str(path.absolute()))
        if known is None or not is_unchanged(path, known["key"]):
            return None
        return Item(**{**known["survey"], "source": Source.from_row(path, known["survey"]["source"])})

    def add_item(self, item: Item, key: list[int]) -> None:
        """Store a survey for the next run; a source that could not be used is tried again then."""
        if item.usable:
            survey = {"source": item.source.to_row(), "frames": item.frames, "fps": item.fps}
            self.surveys[str(item.source.path.absolute())] = {"key": key, "survey": survey}
        self.save(now=False)

    def start(self, src: Path, items: list[Item], output_format: Format, why: str) -> None:
        """Enter the plan: a row for every item of `src`, in place of the rows of earlier runs over it."""
        self.settings["store"], self.settings["why"] = output_format.store, why
        root = src.absolute()
        self.rows = {key: row for key, row in self.rows.items() if not Path(key[1]).is_relative_to(root)}
        for item in items:
            source, path = item.source, str(item.source.path.absolute())
            width, height = output_format.target_size(source) if item.usable else (0, 0)
            self.rows[item.set, path] = {
                "set": item.set,
                "source": path,
                "sha256": source.hash,
                "status": "planned" if item.usable else "excluded",
                "reason": source.reason,
                "output": item.output,
                "frames": item.frames if item.usable else 0,
                "fps": item.fps if item.usable else 0.0,
                "width": width,
                "height": height,
                "bytes": 0,
                "source_frames": source.num_frames,
                "source_codec": source.codec,
            }
        self.save()

    def row(self, item: Item) -> dict[str, Any]:
        """Return the row of an item."""
        return self.rows[item.set, str(item.source.path.absolute())]

    def finish(self, item: Item, result: int | UserError) -> None:
        """Enter what became of an item: the bytes of its output, or why there is none."""
        if isinstance(result, UserError):
            self.row(item).update(status="failed", reason=str(result))
        else:
            self.row(item).update(status="made", bytes=result)
        self.save(now=False)

    def save(self, *, now: bool = True) -> None:
        """Write the file; without `now` only every two seconds, or less often if that takes long."""
        started = time.monotonic()
        if not now and started < self._next_save:
            return
        content = {"settings": self.settings, "sources": list(self.rows.values()), "surveys": self.surveys}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())
        ended = time.monotonic()
        self._next_save = ended + max(2, 20 * (ended - started))

    def print_summary(self, src: Path, items: list[Item], new_outputs: set[str]) -> None:
        """Print what was done, and every source that is left out or used in part, with its reason.

        Raises:
            UserError: nothing was prepared.
        """
        out, rows = self.path.parent, [self.row(item) for item in items]
        made = [row for row in rows if row["status"] == "made"]
        left_out = [row for row in rows if row["status"] != "made"]
        num_new = sum(row["output"] in new_outputs for row in made)
        lines = [f"{out}: {num_new} made, {len(made) - num_new} already there, {len(left_out)} left out"]
        lines += [f"left out: {row['source']}: {row['reason']}" for row in left_out]
        lines += [
            f"in part: {row['source']}: {row['reason']}; its first {row['source_frames']} frames are used"
            for row in made
            if row["reason"]
        ]
        outputs = {row["output"] for row in self.rows.values()}
        for name in sorted({item.set for item in items}):
            for path in sorted((out / name).glob("[!.]*")):
                if f"{name}/{path.name}" not in outputs:
                    lines.append(f"not from these sources: {path}; training would use it: remove it if it is old")
        print("\n".join(map(one_line, lines)))
        if not made:
            reasons = "; ".join(f"{Path(row['source']).name}: {row['reason']}" for row in left_out)
            raise UserError(f"{src}: nothing was prepared: {reasons}")


def prepare_dataset(
    src: Path,
    out: Path,
    *,
    size: CropSize | int | str,
    store: Choice,
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
        SystemExit: a signal asked to stop.
    """
    size = CropSize.of(size)
    if not 1 <= size.short_side <= max(size.height, size.width) <= 4096:
        raise UserError(f"--size: expected 1 to 4096, got {size}")
    for name, value, low, high in (("frames", frames, 1, 10**9), ("jobs", jobs, 0, 1024)):
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
    with raised(), lock_folder(out):
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
        except Stop as stop:
            print(f"\n{one_line(out)}: stopped by {stop}; the same command goes on from here", file=sys.stderr)
            raise SystemExit(stop.exit_code) from None
        finally:
            remove_partial(out)
            report.save()


def remove_partial(out: Path) -> None:
    """Remove half-written outputs and reports, this run's or those of one that was killed."""
    for path in [*out.glob(f"{PARTIAL}*"), *out.glob(f"*/{PARTIAL}*")]:
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

    What would have fewer frames than `min_frames` is excluded, but for the stills of a set S.
    """
    known = {path: item for _, path in sources if (item := report.known_item(path))}
    unknown = [path for _, path in sources if path not in known]
    survey = partial(survey_source, fps=fps)
    for path, result in tqdm(run_all(survey, unknown, jobs), "read", len(unknown), **PROGRESS):
        if isinstance(result, UserError):
            known[path] = Item(excluded_source(path, str(result)))
        else:
            known[path], key = result
            report.add_item(known[path], key)
    items = []
    for name, path in sources:
        item = replace(known[path], set=name)
        if item.usable and not name.endswith("S") and item.frames < min_frames:
            cause = f" ({item.source.reason})" if item.source.reason else ""
            item = item.exclude(f"{item.frames} frames, fewer than --frames {min_frames}{cause}")
        items.append(item)
    return items


def choose_store(store: Choice, items: list[Item], size: CropSize, report: Report, free: int) -> tuple[Store, str]:
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
    """Return what a source and its truth share: the split, and the path in its set without suffix ("" for the set)."""
    path = item.source.path
    root = next((p for p in (path, *path.parents) if SET_NAME.fullmatch(p.name)), path.parent)
    return re.sub("(X|Truth)$", "", item.set), name_in(root, path)


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
