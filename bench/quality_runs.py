"""The trainings of bench/quality.py: each in a process of its own, with a journal that survives an interruption.

A run is a folder and, beside it, its journal `<name>.json`: the settings, their fingerprint, the budgets trained to and
the rows measured so far. The journal is written before the training starts, after it, and after each row. A run whose
journal has other settings is refused, a row that is in it is not measured again, and a training that did not end is
resumed from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from harness import Row, commit, machine

import rlv2v
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.errors import UserError, one_line
from rlv2v.files import write_atomically
from rlv2v.metrics.evaluation import ROWS, Split

STOPPED = "go on with --resume"
"""What a training says that was asked to end before its time."""


Unit = Literal["budget", "steps"]


def code_digest() -> str:
    """Return a hash of the package, as it is on the disk now: what trains and measures."""
    root = Path(rlv2v.__file__).parent
    files = {Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names}
    code = sorted(path for path in files if path.suffix in (".py", ".so", ".cu"))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in code)).hexdigest()[:16]


class Workers:
    """Run commands of this Python at the same time, each in a process group of its own, as a context manager.

    Ctrl-C or SIGTERM ends the block with KeyboardInterrupt; then each command is asked once to end, and waited for.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        self.threads, self._children = threads, set[subprocess.Popen[str]]()
        self._pool, self._stopped = ThreadPoolExecutor(jobs), False

    def __enter__(self) -> Workers:
        def stop(_number: int, _frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        self._old = signal.signal(signal.SIGTERM, stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None
        for child in list(self._children) if self._stopped else ():
            child.terminate()
        self._pool.shutdown(cancel_futures=self._stopped)
        signal.signal(signal.SIGTERM, self._old)

    def python(self, *arguments: object) -> None:
        """Run this Python with arguments. Raises RuntimeError if it fails or is asked to end, with what it said."""
        if self._stopped:
            raise RuntimeError("not started, as the bench was asked to end")
        command = [sys.executable, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=pipe, text=True, start_new_session=True
        )
        self._children.add(child)
        try:
            said = child.communicate()[1]
        finally:
            self._children.discard(child)
        if child.returncode or STOPPED in said:
            last = said.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise RuntimeError(" ".join(last))

    def each(self, function: Callable[[Run], list[Row]], runs: Iterable[Run]) -> Iterator[list[Row]]:
        """Yield the rows of each run, in the order in which they end."""
        for future in as_completed([self._pool.submit(function, run) for run in runs]):
            yield future.result()


@dataclass(frozen=True)
class Run:
    """Hold one training: its settings, what it is called, and where it is."""

    folder: Path
    data: Path
    """What it is trained on."""
    flags: tuple[str, ...]
    """Of `rlv2v.train`, but for the folder and the budget."""
    row: Mapping[str, Any]
    """What its rows begin with: case, method, seed, few, lr."""
    budgets: tuple[float, ...]
    threads: int
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the data and of the code."""
    unit: Unit = "budget"
    """Of the budgets: seconds, or steps."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what is trained."""
        settings = {**self.row, "flags": list(self.flags), "budgets": list(self.budgets), "threads": self.threads}
        settings |= {"unit": self.unit} if self.unit != "budget" else {}
        return {**settings, **self.digests}

    @property
    def fingerprint(self) -> str:
        """A hash of the settings, the data and the code."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def journal_path(self) -> Path:
        """The file of the journal."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def journal(self) -> dict[str, Any]:
        """Return what has been measured so far.

        Raises:
            UserError: the folder or the journal is of another run.
        """
        path = self.journal_path
        if not path.exists():
            if self.folder.exists():
                raise UserError(f"{one_line(self.folder)}: holds a run without a journal; choose another --out")
            return {
                "fingerprint": self.fingerprint,
                "settings": self.settings,
                "trained": {},
                "rows": [],
                "references": {},
            }
        try:
            journal: dict[str, Any] = json.loads(path.read_text())
            saved = journal["settings"]
            known = journal["fingerprint"] == self.fingerprint
            changed = [key for key in {**saved, **self.settings} if saved.get(key) != self.settings.get(key)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{one_line(path)}: expected the journal of a run, got something else; remove it") from None
        if not known:
            differing = ", ".join(changed) or "its fingerprint"
            raise UserError(
                f"{one_line(path)}: another run, which differs in {differing}; choose another --out, or remove both"
            )
        return journal

    def save(self, journal: Mapping[str, Any]) -> None:
        """Write the journal."""
        self.journal_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.journal_path, (json.dumps(journal, indent=1) + "\n").encode())


def train(run: Run, total: float, workers: Workers) -> Row:
    """Train a run up to a budget in its unit, on from its checkpoint if it has one; return its steps and seconds."""
    start = time.perf_counter()
    resumed = run.folder.exists() and bool(Checkpoints(run.folder, keep=1, num_replicas=1).steps)
    if not resumed and run.folder.exists():
        shutil.rmtree(run.folder)  # killed before its first checkpoint
    flags = ("--resume",) if resumed else run.flags
    common = ("--data", run.data, "--out", run.folder, f"--{run.unit}", f"{total:g}", "--threads", run.threads)
    workers.python("-m", "rlv2v.train", *common, *flags)
    log = run.folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []  # empty where the warm-up took the whole budget
    last = json.loads(lines[-1]) if lines else {"step": 0, "seconds": time.perf_counter() - start}
    return {"steps": last["step"], "seconds": round(last["seconds"], 1)}


def measure(run: Run, data: Path, split: Split, workers: Workers) -> dict[str, Any]:
    """Return what `rlv2v.evaluate` says of a run on a dataset: the rows and their spread over clips."""
    result = run.folder.with_name(f"{run.folder.name}-{split}.evaluation")
    try:
        common = ("--json", result, "--device", "cpu", "--threads", run.threads)
        workers.python("-m", "rlv2v.evaluate", run.folder, "--data", data, "--split", split, *common)
        measured: dict[str, Any] = json.loads(result.read_text())
    finally:
        result.unlink(missing_ok=True)
    return measured


def rows_of_run(run: Run, data: Path, split: Split, workers: Workers, *, search: bool = False) -> list[Row]:
    """Train and measure what is missing of a run; return a row for each budget, then the reference rows.

    A run that fails is a row with `valid: false`, which is not kept: it is tried again next time.
    """
    journal = run.journal()
    run.save(journal)
    rows = list[Row]()
    for total in run.budgets:
        wanted = {"budget_s": total if run.unit == "budget" else 0.0, "split": split}
        found = [row for row in journal["rows"] if wanted.items() <= row.items()]
        if not found:
            begun = {**run.row, **wanted, "ours": True, "fingerprint": run.fingerprint}
            begun |= {"commit": commit(), "cpu": machine()["cpu"]}
            try:
                if longer := [budget for budget in journal["trained"] if float(budget) > total]:
                    raise RuntimeError(f"trained up to --{run.unit} {longer[-1]} already; choose another --out")
                if f"{total:g}" not in journal["trained"]:
                    journal["trained"][f"{total:g}"] = train(run, total, workers)
                    run.save(journal)
                trained = journal["trained"][f"{total:g}"]
                measured = measure(run, data, split, workers)
                if code_digest() != run.digests.get("code", code_digest()):
                    raise RuntimeError("the code changed since the bench began; choose another --out")
            except RuntimeError as error:
                print(f"{run.folder.name}: {error}", file=sys.stderr)
                return [*rows, begun | {"valid": False, "steps": None, "seconds": None}]
            model = {**measured["rows"]["model"], "spread": measured["spread"]["model"]}
            found = [begun | trained | model]
            journal["rows"] += found
            journal["references"][split] = {
                name: {**measured["rows"][name], "spread": measured["spread"][name]}
                for name in ROWS
                if name != "model" and any(value is not None for value in measured["rows"].get(name, {}).values())
            }
            run.save(journal)
        rows += [row | ({"search": True} if search else {}) for row in found]
    head = {"case": run.row["case"], "seed": None, "split": split, "steps": 0, "seconds": 0.0, "budget_s": 0.0}
    head |= {"data_seed": run.row["seed"]}
    return rows + [{"method": name, **head, **row} for name, row in journal["references"].get(split, {}).items()]
