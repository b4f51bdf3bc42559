"""Damage small videos of every common kind in thousands of ways, and see that no command crashes, hangs or lies still.

    python bench/fuzz_videos.py [--files 1000] [--first 0] [--jobs 1] [--json F [--more]]

A number decides a file and its damage (`data_damage.py`): bits, cuts, boxes, tags, sizes of 60000x60000, times of 2^62.
Other processes index each file, read clips of it, convert it as `prepare` does and copy it as `translate` does
(`data_survival.py`). A file may be whole, used in part, left out with a reason, or refused by a `UserError`. A crash, a
hang, another exception, and a memory that grows by more than a GiB are failures, printed with their number: `--first N
--files 1` repeats one. Exit code 1 if there is any. The last rows count what became of the files, by their suffix and
in all; they are stored after every hundred, and `--more` goes on from there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from data_damage import NAMES, make_original, name_of
from harness import Args as SharedArgs
from harness import Bench, Row

from rlv2v.cli import run_command
from rlv2v.errors import UserError

CHILD = Path(__file__).with_name("data_survival.py")
CHUNK = 100
"""Files after which the counts are stored."""
COUNTED = ("files", "ok", "truncated", "excluded", "refused", "failures")
"""What the index makes of them; `refused`: what `translate` does not take, most of which is excluded."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Args(SharedArgs):
    """Damage videos and read them."""

    files: int = 1000
    """Damaged files; with --quick at most 100."""
    first: int = 0
    """Number of the first one."""
    more: bool = False
    """Go on after the files that --json has already; it keeps them and counts on."""
    jobs: int = 1
    """Processes that read them."""
    limit: float = 600.0
    """Seconds for a file, after which it counts as a hang, as it does after a minute of processor time."""


def make_originals(folder: Path) -> None:
    """Write the intact files."""
    for name in NAMES:
        make_original(folder / name)


def examine_all(seeds: Sequence[int], originals: Path, scratch: Path, limit: float) -> Iterator[tuple[int, Result]]:
    """Yield each seed and what became of its file; a process that crashes or hangs is replaced."""
    left = list(seeds)
    while left:
        for seed, result in examine_some(tuple(left), originals, scratch, limit):
            left.remove(seed)
            yield seed, result


def examine_some(seeds: Sequence[int], originals: Path, scratch: Path, limit: float) -> Iterator[tuple[int, Result]]:
    """Yield seeds and their results by one process, up to the one that it does not survive."""
    process = subprocess.Popen(
        [sys.executable, str(CHILD), str(originals), str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        for seed in seeds:
            watch = threading.Timer(limit, process.kill)
            watch.start()
            try:
                print(seed, file=process.stdin, flush=True)
                begun, line = process.stdout.readline(), process.stdout.readline()
            except BrokenPipeError:
                begun = line = ""
            finally:
                hung = not watch.is_alive()
                watch.cancel()
            if not line:
                process.kill()
                code = process.wait()
                how = f"hang: no answer in {limit:g} s" if hung else f"crash: exit code {code}"
                if code == -signal.SIGXCPU:
                    how = "hang: it takes the processor without an end"
                yield seed, {"file": "", "failure": how if begun or hung else f"{how} before it began"}
                return
            yield seed, json.loads(line)
        process.stdin.close()


def container_of(seed: int) -> str:
    """Return the suffix of the file of a number."""
    return Path(name_of(seed)).suffix


def describe(seed: int, result: Result) -> Row:
    """Return the row of a failure."""
    row: Row = {"case": f"file {seed}", "backend": "rlv2v", "ours": True, "valid": False}
    return row | result | {"file": result.get("file") or name_of(seed)}


class Counts:
    """Count what became of files, by their container; begin with the rows of an earlier run."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.failures = [row for row in rows if "failure" in row]
        self._kinds = {row["case"]: Counter({key: row[key] for key in COUNTED}) for row in rows if "failures" in row}
        self._kinds.pop("all", None)

    def add(self, seed: int, result: Result) -> None:
        """Count one file."""
        kind = self._kinds.setdefault(container_of(seed), Counter())
        kind["files"] += 1
        kind[str(result.get("index", ""))] += 1
        kind["refused"] += result.get("translate", "ok") != "ok"
        if "failure" in result:
            kind["failures"] += 1
            self.failures.append(describe(seed, result))

    def rows(self) -> list[Row]:
        """Return the failures, then a row a container, then one for all."""
        kinds = [*sorted(self._kinds.items()), ("all", sum(self._kinds.values(), Counter[str]()))]
        head: Row = {"backend": "rlv2v", "ours": True}
        counted = [{"case": n, **head, "valid": not c["failures"], **{k: c[k] for k in COUNTED}} for n, c in kinds]
        return [*self.failures, *counted]


def main(args: Args) -> None:
    """Make, damage, read, count."""
    if args.files < 1 or args.jobs < 1 or args.limit <= 0:
        raise UserError("--files, --jobs, --limit: expected at least 1, 1 and more than 0")
    if args.more and (args.json is None or not args.json.is_file()):
        raise UserError("--more: expected a --json F that an earlier run wrote")
    earlier: Row = json.loads(args.json.read_text()) if args.more and args.json else {"first": args.first, "files": 0}
    counts, begun = Counts(earlier.get("rows", [])), earlier["first"] + earlier["files"]
    seeds = range(begun, begun + (min(args.files, CHUNK) if args.quick else args.files))
    with Bench("fuzz_videos", args, first=earlier["first"]) as bench, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "originals").mkdir()
        make_originals(root / "originals")

        def work(job: int, chunk: range) -> list[tuple[int, Result]]:
            return list(examine_all(chunk[job :: args.jobs], root / "originals", root / f"scratch{job}", args.limit))

        with ThreadPoolExecutor(args.jobs) as pool:
            for start in range(0, len(seeds), CHUNK):
                chunk, num = seeds[start : start + CHUNK], len(counts.failures)
                for results in pool.map(work, range(args.jobs), repeat(chunk)):
                    for seed, result in results:
                        counts.add(seed, result)
                for row in counts.failures[num:]:
                    print(json.dumps(row), flush=True)
                bench.rows = counts.rows()
                bench.add([], files=chunk.stop - earlier["first"])


if __name__ == "__main__":
    run_command(main, Args)
