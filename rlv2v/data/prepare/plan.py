"""Decide what `prepare` writes: which sources there are, what is usable of each, the store, and every output's name."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from rlv2v.data.index import file_key, source_paths
from rlv2v.data.prepare.convert import Format, Store, Survey, survey_source, unusable
from rlv2v.data.workers import run_all
from rlv2v.errors import UserError, one_line

if TYPE_CHECKING:
    from rlv2v.data.prepare.report import Report

SET_NAME = re.compile(r"(train|val|test)(X|Y|Z|S|Truth|A|B)")
MAX_RAW_SHARE = 0.5
"""`--store auto` takes raw up to this share of the free disk."""


@dataclass(frozen=True)
class Item:
    """Hold one source, the set that it goes into, its survey, and its output's name."""

    set: str
    path: Path
    survey: Survey
    output: str = ""
    """Relative to OUT; empty if excluded."""

    @property
    def usable(self) -> bool:
        """Return whether an output is planned for it."""
        return self.survey.source.status != "excluded"

    def exclude(self, reason: str) -> Item:
        """Return the item as excluded for `reason`."""
        source = replace(self.survey.source, status="excluded", reason=one_line(reason))
        return replace(self, survey=replace(self.survey, source=source), output="")


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
    """Return every source with its survey: from the report where it is unchanged, else by decoding it."""
    surveys = {path: known for _, path in sources if (known := report.known_survey(path)) is not None}
    keys = {path: file_key(path) for _, path in sources if path not in surveys}
    with tqdm(total=len(keys), desc="read", unit="file", disable=None if keys else True) as bar:
        for path, result in run_all(partial(survey_source, fps=fps), list(keys), jobs):
            surveys[path] = unusable(path, str(result)) if isinstance(result, UserError) else result
            report.add_survey(path, keys[path], surveys[path])
            bar.update()
    return [exclude_short(Item(name, path, surveys[path]), min_frames) for name, path in sources]


def exclude_short(item: Item, min_frames: int) -> Item:
    """Return the item, excluded if its output would have fewer frames than `min_frames`; stills have one."""
    num, source = item.survey.frames, item.survey.source
    if not item.usable or source.kind == "image" or num >= min_frames:
        return item
    cause = f" ({source.reason})" if source.reason else ""
    return item.exclude(f"{num} frames, fewer than --frames {min_frames}{cause}")


def choose_store(
    store: Literal["auto", "raw", "video"], items: list[Item], size: int, report: Report, free: int
) -> tuple[Store, str]:
    """Return the store and why; `auto` stays with what an earlier run into the same folder chose."""
    if store != "auto":
        return store, "as asked"
    if report.settings["store"]:
        return report.settings["store"], report.settings["why"]
    raw = sum(Format(size, "raw", None).estimate_bytes(item.survey) for item in items if item.usable)
    fits = raw <= MAX_RAW_SHARE * free
    comparison = "at most" if fits else "more than"
    why = f"raw needs {gib(raw)}, {comparison} {MAX_RAW_SHARE:.0%} of the free {gib(free)}"
    return "raw" if fits else "video", why


def name_outputs(items: list[Item], output_format: Format) -> list[Item]:
    """Give each usable item its output's name; the second of two equal files with one name is excluded.

    A clip of testX and its truth in testTruth share a name, as they did in SRC, made from the hashes of both.
    """
    pairs: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        pairs.setdefault(pair_key(item), []).append(item)
    taken: dict[str, str] = {}
    named = []
    for item in items:
        group = pairs[pair_key(item)]
        stem, sha256 = item.path, item.survey.source.hash
        if sorted(i.set.endswith("Truth") for i in group) == [False, True]:
            stem = next((i.path for i in group if i.set.endswith("X")), group[0].path)
            sha256 = hashlib.sha256("".join(sorted(i.survey.source.hash for i in group)).encode()).hexdigest()
        output = f"{item.set}/{output_format.output_name(stem, item.survey.source, sha256)}"
        if item.usable and output in taken:
            item = item.exclude(f"the same bytes as {taken[output]}")
        elif item.usable:
            taken[output] = item.path.name
            item = replace(item, output=output)
        named.append(item)
    return named


def pair_key(item: Item) -> tuple[str, str]:
    """Return what a source and its truth share: the split, and the name without suffix ("" for a folder of images)."""
    split = re.sub("(X|Truth)$", "", item.set)
    return split, "" if SET_NAME.fullmatch(item.path.name) else item.path.stem


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
