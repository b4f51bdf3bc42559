"""Damage small videos of every common kind in thousands of ways, and see that no command crashes, hangs or lies still.

    python bench/fuzz_videos.py [--files 1000] [--first 0] [--jobs 1] [--json F]

A number decides a file and its damage (`data_damage.py`): bits, cuts, boxes, tags, sizes of 60000x60000, times of 2^62.
Other processes index each file, read clips of it, convert it as `prepare` does and copy it as `translate` does
(`data_survival.py`). A file may be whole, used in part, left out with a reason, or refused by a `UserError`. A crash, a
hang, another exception, and a memory that grows by more than a GiB are failures, printed with their number: `--first N
--files 1` repeats one. Exit code 1 if there is any.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_damage import NAMES, make_original
from harness import Args as SharedArgs
from harness import Bench, Row

from rlv2v.cli import run_command
from rlv2v.errors import UserError

CHILD = Path(__file__).with_name("data_survival.py")
Result = dict[str, Any]


@dataclass(frozen=True)
class Args(SharedArgs):
    """Damage videos and read them."""

    files: int = 1000
    """Damaged files; with --quick at most 100."""
    first: int = 0
    """Number of the first one."""
    jobs: int = 1
    """Processes that read them."""
    limit: float = 60.0
    """Seconds for a file, after which it counts as a hang."""


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
                how = f"hang: no answer in {limit:g} s" if hung else f"crash: exit code {process.wait()}"
                yield seed, {"file": "", "failure": how if begun or hung else f"{how} before it began"}
                return
            yield seed, json.loads(line)
        process.stdin.close()


def describe(seed: int, result: Result) -> Row:
    """Return the row of a failure."""
    return {"case": f"file {seed}", "backend": "rlv2v", "ours": True, "valid": False, **result}


def main(args: Args) -> None:
    """Make, damage, read, count."""
    if args.files < 1 or args.jobs < 1 or args.limit <= 0:
        raise UserError("--files, --jobs, --limit: expected at least 1, 1 and more than 0")
    num = min(args.files, 100) if args.quick else args.files
    seeds = range(args.first, args.first + num)
    counts: Counter[str] = Counter()
    with Bench("fuzz_videos", args, files=num) as bench, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "originals").mkdir()
        make_originals(root / "originals")

        def work(job: int) -> None:
            scratch = root / f"scratch{job}"
            for seed, result in examine_all(seeds[job :: args.jobs], root / "originals", scratch, args.limit):
                with lock:
                    counts[str(result.get("index", "none"))] += 1
                    refused = result.get("translate", "ok") != "ok"
                    counts["refused"] += refused
                    if "failure" in result:
                        bench.add([describe(seed, result)])

        lock = threading.Lock()
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, range(args.jobs)))
        summary = dict(sorted(counts.items())) | {"failures": len(bench.rows)}
        bench.add([{"case": "all", "backend": "rlv2v", "ours": True, "valid": not bench.rows, **summary}])


if __name__ == "__main__":
    run_command(main, Args)
