"""`python -m rlv2v.prepare SRC OUT --size 64`: any videos in, a dataset folder that loads fast out.

SRC is a dataset folder (`trainX trainY trainZ trainS valX ...`; CycleGAN's `trainA trainB testA testB` become X and Y)
or one flat folder of videos, frame folders or numbered images, which goes into `--into`. Every source is decoded once
to find what is usable and once to write it. An output is named after its source and the hash of its bytes and of the
settings, appears whole or not at all, and is never replaced: the same command goes on after a kill. `prepared.json` in
OUT says of every source what became of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from rlv2v.cli import run_command
from rlv2v.data import prepare as work
from rlv2v.data.index import entries, file_key
from rlv2v.data.prepare import Job, Store
from rlv2v.data.prepared import Entry, Report
from rlv2v.data.workers import cores, run_all
from rlv2v.errors import UserError, one_line

SETS = re.compile(r"(train|val|test)(X|Y|Z|S|Truth|A|B)")
RAW_SHARE = 0.5
"""`--store auto` takes raw up to this share of the free disk."""


@dataclass(frozen=True)
class Args:
    """Prepare videos for training: resized, upright, at a constant rate, in a form that loads fast."""

    src: tyro.conf.Positional[Path]
    """Dataset folder (trainX, trainY ...; CycleGAN's trainA, trainB), or a folder of videos, frame folders, images."""
    out: tyro.conf.Positional[Path]
    """Folder for the prepared dataset; the same command again goes on where it was stopped."""
    size: int = 64
    """Short side in pixels, the aspect is kept; `video` uses at least 128, so that GPUs can decode it."""
    store: Literal["auto", "raw", "video"] = "auto"
    """raw: a .npy for each video, the fastest. video: VP9, far smaller. auto: raw if it fits in half the free disk."""
    fps: float | None = None
    """Frames a second of the output (nearest frame in time); default: each video's own, the average where it varies."""
    frames: int = 1
    """Leave out what is shorter than this many frames after preparation."""
    into: str = "trainX"
    """The set that a flat folder goes into: trainX, trainY, trainZ, trainS, valX, testX ..."""
    jobs: int = 0
    """Files at a time; 0: one for each core."""
    yes: bool = False
    """Do not ask when the disk seems too small."""


def discover(src: Path, into: str) -> list[tuple[str, Path]]:
    """(set, path) of all sources of SRC, in natural order. Raises `UserError` for a folder that cannot be read so."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; expected a dataset folder or a folder of videos")
    named = {p: ours(p.name) for p in sorted(src.iterdir()) if SETS.fullmatch(p.name) and p.is_dir()}
    if len(set(named.values())) < len(named):
        have = ", ".join(p.name for p in named)
        raise UserError(f"{src}: holds {have}, of which two mean the same set; rename one")
    folders = named or {src: into}
    return [(name, path) for folder, name in folders.items() for path in entries(folder, stills=name.endswith("S"))]


def ours(name: str) -> str:
    """A set's name here: CycleGAN's A and B are X and Y."""
    return {"A": f"{name[:-1]}X", "B": f"{name[:-1]}Y"}.get(name[-1], name)


def check(args: Args) -> None:
    """Refuse what cannot be done, before anything is read or written."""
    for name, value, low, high in (
        ("size", args.size, 1, 4096),
        ("frames", args.frames, 1, 10**9),
        ("jobs", args.jobs, 0, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name}: expected {low} to {high}, got {value}")
    if args.fps is not None and not 0 < args.fps <= work.MAX_FPS:
        raise UserError(f"--fps: expected more than 0 and up to {work.MAX_FPS}, got {args.fps:g}")
    if not SETS.fullmatch(args.into) or args.into != ours(args.into):
        raise UserError(f"--into: expected trainX, trainY, trainZ, trainS, valX, testX ..., got {args.into}")
    src, out = args.src.resolve(), args.out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{args.out}: is a file; expected a folder")
    if out == src or src in out.parents:
        raise UserError(f"{args.out}: lies in the source folder; choose a folder outside of it")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Nobody else prepares into `out` meanwhile; what a killed run left half-written is removed, before and after."""
    out.mkdir(parents=True, exist_ok=True)
    held = os.open(out, os.O_RDONLY)
    try:
        with suppress(ImportError):  # Windows has no such lock
            import fcntl

            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out}: another prepare is writing there; wait for it to end") from None
        clean(out)
        try:
            yield
        finally:
            clean(out)
    finally:
        os.close(held)


def clean(out: Path) -> None:
    """Remove half-written outputs: hidden, with a mark in the name."""
    for path in out.glob(f"*/.*{work.PARTIAL[1:]}*"):
        path.unlink(missing_ok=True)


def survey_all(found: list[tuple[str, Path]], args: Args, report: Report, jobs: int) -> list[Entry]:
    """Every source with its survey: from the report where it is unchanged, else by decoding it."""
    surveys = {path: kept for _, path in found if (kept := report.survey(path)) is not None}
    keys = {path: file_key(path) for _, path in found if path not in surveys}
    with tqdm(total=len(keys), desc="read", unit="file", disable=None if keys else True) as bar:
        for path, result in run_all(partial(work.survey, fps=args.fps), list(keys), jobs):
            surveys[path] = work.unusable(path, str(result)) if isinstance(result, UserError) else result
            report.keep(path, keys[path], surveys[path])
            bar.update()
    return [long_enough(Entry(name, path, surveys[path]), args.frames) for name, path in found]


def long_enough(entry: Entry, frames: int) -> Entry:
    """The entry, excluded if its output would have fewer than `frames` frames; stills have one."""
    num, source = entry.survey.frames, entry.survey.source
    if not entry.usable or source.kind == "image" or num >= frames:
        return entry
    return entry.without(f"{num} frames, fewer than --frames {frames}" + f" ({source.reason})" * bool(source.reason))


def name_outputs(found: list[Entry], args: Args, store: Store) -> list[Entry]:
    """Give each usable entry its output's name; the second of two equal files with one name is excluded.

    A clip of testX and its truth in testTruth have one name, as they had in SRC, from the hash of both.
    """
    pairs: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        pairs.setdefault(pair_key(entry), []).append(entry)
    taken: dict[str, str] = {}
    named = []
    for entry in found:
        pair = pairs[pair_key(entry)]
        first = min(pair, key=lambda e: not e.set.endswith("X")) if is_pair(pair) else entry
        shas = [e.survey.source.hash for e in pair] if is_pair(pair) else [entry.survey.source.hash]
        sha = shas[0] if len(shas) == 1 else hashlib.sha256("".join(sorted(shas)).encode()).hexdigest()
        name = f"{work.safe_stem(first.path)}-{work.short_hash(sha, args.size, store, args.fps)}"
        output = f"{entry.set}/{name}{work.suffix_of(entry.survey.source, store)}"
        if not entry.usable:
            named.append(entry)
        elif output in taken:
            named.append(entry.without(f"the same bytes as {taken[output]}"))
        else:
            taken[output] = one_line(entry.path.name)
            named.append(replace(entry, output=output))
    return named


def pair_key(entry: Entry) -> tuple[str, str]:
    """Equal for a source and its truth: the split, and the name without suffix (a folder of loose images: none)."""
    split = re.sub("(X|Truth)$", "", entry.set)
    return split, "" if SETS.fullmatch(entry.path.name) else entry.path.stem


def is_pair(group: list[Entry]) -> bool:
    return len(group) == 2 and sorted(e.set.endswith("Truth") for e in group) == [False, True]


def choose_store(args: Args, report: Report, found: list[Entry], free: int) -> tuple[Store, str]:
    """The store and why; `auto` stays with what an earlier run into the same folder chose."""
    if args.store != "auto":
        return args.store, "as asked"
    if report.settings["store"]:
        return report.settings["store"], report.settings["why"]
    raw = sum(work.estimate(e.survey, args.size, "raw") for e in found if e.usable)
    store: Store = "raw" if raw <= RAW_SHARE * free else "video"
    comparison = "at most" if store == "raw" else "more than"
    return store, f"raw needs {gib(raw)}, {comparison} {RAW_SHARE:.0%} of the free {gib(free)}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def confirm_disk(args: Args, needed: int, free: int) -> None:
    """Ask before more disk is used than is free; raises `UserError` on no, or where nobody can be asked."""
    if needed <= free or args.yes:
        return
    problem = f"{one_line(args.out)}: about {gib(needed)} are needed, {gib(free)} are free"
    if not sys.stdin.isatty():
        raise UserError(f"{problem}; free space, use --store video or a smaller --size, or give --yes")
    if input(f"{problem}. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"{problem}; nothing was written")


def make_all(todo: list[Entry], args: Args, store: Store, report: Report, jobs: int) -> None:
    """Write every output; what fails for the source's sake is reported, what fails for the disk's sake raises."""
    planned = {args.out / e.output: e for e in todo}
    tasks = [Job(e.survey, target, args.size, store, args.fps) for target, e in planned.items()]
    for target in planned:
        target.parent.mkdir(exist_ok=True)
    with tqdm(total=len(tasks), desc="write", unit="file", disable=None if tasks else True) as bar:
        for job, result in run_all(work.make, tasks, jobs):
            entry = planned[job.target]
            if isinstance(result, UserError):
                report.done(entry, "failed", one_line(result), 0)
            else:
                report.done(entry, "made", entry.survey.source.reason, result)
            bar.update()


def already_there(found: list[Entry], args: Args, store: Store, report: Report) -> list[Entry]:
    """Book what earlier runs made, and return what is still to be made. A damaged output is named and left alone."""
    todo = []
    for entry in found:
        path = args.out / entry.output
        if not path.exists():
            todo.append(entry)
        elif work.is_whole(path, entry.survey, args.size, store):
            report.done(entry, "made", entry.survey.source.reason, path.stat().st_size)
        else:
            report.done(entry, "failed", f"{one_line(path)} is there but damaged; remove it and start again", 0)
    return todo


def main(args: Args) -> None:
    """Find, read, plan, ask, write, report."""
    check(args)
    jobs = args.jobs or cores()
    found = discover(args.src, args.into)
    with alone_in(args.out):
        report = Report(args.out, size=args.size, fps=args.fps, store=args.store)
        try:
            prepare(args, found, report, jobs)
        except KeyboardInterrupt:
            print(f"\n{one_line(args.out)}: stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            report.save()


def prepare(args: Args, paths: list[tuple[str, Path]], report: Report, jobs: int) -> None:
    found = survey_all(paths, args, report, jobs)
    free = shutil.disk_usage(args.out).free
    store, why = choose_store(args, report, found, free)
    found = name_outputs(found, args, store)
    report.start(args.src, found, store, why)
    usable = [e for e in found if e.usable]
    if not usable:
        reasons = "; ".join(f"{one_line(e.path.name)}: {e.survey.source.reason}" for e in found) or "it is empty"
        raise UserError(f"{args.src}: nothing usable: {reasons}")
    todo = already_there(usable, args, store, report)
    needed = sum(work.estimate(e.survey, args.size, store) for e in todo)
    confirm_disk(args, needed, free)
    print(f"{one_line(args.out)}: {store} ({why}), {len(todo)} to make, about {gib(needed)}")
    make_all(todo, args, store, report, jobs)
    tell(args, found, todo, report)


def tell(args: Args, found: list[Entry], todo: list[Entry], report: Report) -> None:
    """What was done, and every source that is not there whole, with its reason. `UserError` if there is none."""
    rows = [report.rows[e.set, str(e.path.absolute())] for e in found]
    made = [row for row in rows if row["status"] == "made"]
    new = {e.output for e in todo}
    fresh = sum(row["output"] in new for row in made)
    left = [row for row in rows if row["status"] != "made"]
    parts = [row for row in made if row["reason"]]
    print(f"{one_line(args.out)}: {fresh} made, {len(made) - fresh} already there, {len(left)} left out")
    for row in left:
        print(f"left out: {one_line(row['source'])}: {row['reason']}")
    for row in parts:
        print(f"in part: {one_line(row['source'])}: {row['reason']}; its first {row['source_frames']} frames are used")
    known = {row["output"] for row in report.rows.values()}
    for name in sorted({e.set for e in found}):
        for path in sorted((args.out / name).glob("[!.]*")):
            if f"{name}/{path.name}" not in known:
                print(f"not from these sources: {one_line(path)}; training would use it: remove it if it is old")
    if not made:
        reasons = "; ".join(f"{one_line(Path(row['source']).name)}: {row['reason']}" for row in left)
        raise UserError(f"{args.src}: nothing was prepared: {reasons}")


if __name__ == "__main__":
    run_command(main, Args)
