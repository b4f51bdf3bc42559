"""Prepare any videos for training: a dataset folder that loads fast.

Every source is decoded once to find what is usable and once to write it. An output is named after its source and the
hash of its bytes and of the settings, appears complete or not at all, and is never replaced: the same command goes on
after a kill. `prepared.json` in the output folder says what became of every source.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from rlv2v.data.prepare.convert import MAX_FPS, PARTIAL, Format, Job, convert_source
from rlv2v.data.prepare.plan import (
    SET_NAME,
    Item,
    choose_store,
    confirm_disk,
    find_sources,
    gib,
    name_outputs,
    set_name,
    survey_all,
)
from rlv2v.data.prepare.report import REPORT, Report
from rlv2v.data.workers import cores, run_all
from rlv2v.errors import UserError, one_line
from rlv2v.files import lock_folder


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
    check_arguments(src, out, size=size, fps=fps, frames=frames, into=into, jobs=jobs)
    jobs = jobs or cores()
    sources = find_sources(src, into)
    with locked(out):
        report = Report(out, size=size, fps=fps, store=store)
        try:
            items = survey_all(sources, fps, frames, report, jobs)
            free = shutil.disk_usage(out).free
            chosen, why = choose_store(store, items, size, report, free)
            output_format = Format(size, chosen, fps)
            items = name_outputs(items, output_format)
            report.start(src, items, output_format, why)
            usable = [item for item in items if item.usable]
            if not usable:
                reasons = "; ".join(f"{i.path.name}: {i.survey.source.reason}" for i in items) or "it is empty"
                raise UserError(f"{src}: nothing usable: {reasons}")
            todo = select_missing(usable, out, output_format, report)
            needed = sum(output_format.estimate_bytes(item.survey) for item in todo)
            if not yes:
                confirm_disk(out, needed, free)
            print(one_line(f"{out}: {chosen} ({why}), {len(todo)} to make, about {gib(needed)}"))
            convert_all(todo, out, output_format, report, jobs)
            report.print_summary(src, items, {item.output for item in todo})
        except KeyboardInterrupt:
            print(f"\n{one_line(out)}: stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            report.save()


def check_arguments(src: Path, out: Path, *, size: int, fps: float | None, frames: int, into: str, jobs: int) -> None:
    """Refuse what cannot be done, before anything is read or written."""
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


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder's lock; files that a killed run left half-written are removed on the way in and out."""
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        remove_partial(out)
        try:
            yield
        finally:
            remove_partial(out)


def remove_partial(out: Path) -> None:
    """Remove half-written outputs and reports."""
    for path in [*out.glob(f"*/.*{PARTIAL[1:]}*"), *out.glob(f".{REPORT}.*")]:
        path.unlink(missing_ok=True)


def select_missing(items: list[Item], out: Path, output_format: Format, report: Report) -> list[Item]:
    """Return the items that are still to be made, and report the others; a damaged output is named and left alone."""
    missing = []
    for item in items:
        path = out / item.output
        if not path.exists():
            missing.append(item)
        elif output_format.is_complete(path, item.survey):
            report.finish(item, "made", item.survey.source.reason, path.stat().st_size)
        else:
            report.finish(item, "failed", f"{path} is there but damaged; remove it and start again", 0)
    return missing


def convert_all(items: list[Item], out: Path, output_format: Format, report: Report, jobs: int) -> None:
    """Write every output; a fault of a source is reported, a fault of the disk is raised."""
    targets = {out / item.output: item for item in items}
    for target in targets:
        target.parent.mkdir(exist_ok=True)
    tasks = [Job(item.survey, target, output_format) for target, item in targets.items()]
    with tqdm(total=len(tasks), desc="write", unit="file", disable=None if tasks else True) as bar:
        for job, result in run_all(convert_source, tasks, jobs):
            item = targets[job.target]
            if isinstance(result, UserError):
                report.finish(item, "failed", str(result), 0)
            else:
                report.finish(item, "made", item.survey.source.reason, result)
            bar.update()
