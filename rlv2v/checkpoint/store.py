"""The checkpoints of a run: written while training goes on, whole or not at all, and checked before they are used.

    RUN/checkpoints/00000300/state.pt           the state that all ranks share; the first rank writes it
    RUN/checkpoints/00000300/replica-00000.pt   the state of one replica: replay buffers, loader
    RUN/checkpoints/00000300/manifest.json      version, step, num_replicas, metric; bytes and checksum of each file
    RUN/checkpoints/.00000300.part/             while it is being written
All ranks write into one folder a checkpoint. Each file is flushed to the disk, the manifest last; then one rename makes
the checkpoint, so that a kill at any instant leaves the old set or the new one.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlv2v.checkpoint.export import VERSION
from rlv2v.checkpoint.state_files import Copier, parse_state, read_file, write_state
from rlv2v.errors import UserError, first_line
from rlv2v.files import PARTIAL, flush_folder, write_atomically

PATIENCE = 600.0  # seconds that the first rank waits for the replicas of the others
POLL = 0.02  # seconds between two looks for them
log = logging.getLogger(__name__)


def replica_name(replica: int) -> str:
    """Return the name by which `Checkpoints.load` finds the state of one replica."""
    return f"replica-{replica:05d}"


class Checkpoints:
    """Save the checkpoints of a run by a background thread, and read them by the caller's.

    All ranks have one, on the same folder. Each rank saves the same steps in the same order; the first one completes
    the checkpoint. No method talks to other ranks: what one of them found by `newest` it must tell the others.

    Args:
        run: the run's folder, on a file system that all ranks share.
        keep: number of newest checkpoints that stay; the one of the lowest metric stays besides.
        num_replicas: number of replicas in a checkpoint, over all ranks.
        first: whether this process is the first rank.
    """

    def __init__(self, run: Path, *, keep: int, num_replicas: int, first: bool = True) -> None:
        assert keep >= 1 and num_replicas >= 1, (keep, num_replicas)
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.num_replicas, self.first = keep, num_replicas, first
        self._copier = Copier()
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._last: int | None = None

    def tidy(self) -> None:
        """Remove what a kill left half-written; called by the first rank, under the run's lock, before any save."""
        assert self.first, "only the first rank may tidy the folder"
        for part in self.folder.glob(".*.part"):
            if part.is_dir():
                shutil.rmtree(part)
        for name in ("config.json", "model.safetensors", "best.safetensors"):
            for temporary in self.run.glob(f"{PARTIAL}*-{name}"):
                temporary.unlink()

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None,
        replicas: Mapping[int, Mapping[str, Any]],
        *,
        metric: float | None = None,
        run_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copy the contents of a checkpoint, and return while they are being written; see `check` and `wait`.

        It waits for the last write first. A step that has been saved is not saved again.

        Args:
            step: steps done.
            state: the state that all ranks share; None on all ranks but the first. Tensors are copied from their device
                in the order of its current stream: training may go on in place.
            replicas: the states of this rank's replicas by number. Their tensors on the CPU are not copied, since a
                replay's `state_dict()` is a copy already: nobody may change them any more.
            metric: the best checkpoint has the lowest; None: not measured.
            run_files: files of the run's folder, by name, that are written after the checkpoint.

        Raises:
            OSError, UserError: the last write failed; see `check`.
            ValueError: `load` could not return the same contents.
        """
        if self.first != (state is not None):
            raise ValueError("checkpoint: state must be given by the first rank and by it alone")
        if not all(0 <= replica < self.num_replicas for replica in replicas):
            raise ValueError(f"checkpoint: replicas must be in 0..{self.num_replicas - 1}, got {sorted(replicas)}")
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"checkpoint: metric must be finite, got {metric}")
        self.wait()
        if step == self._last:
            return
        contents = {} if state is None else {"state": self._copier.copy("state", state)}
        for replica, own in replicas.items():
            contents[replica_name(replica)] = self._copier.copy(replica_name(replica), own, taken=True)
        self._writer = threading.Thread(
            target=self._write, args=(step, contents, metric, run_files or {}), name="checkpoint"
        )
        self._writer.start()

    def check(self) -> None:
        """Raise the error of a background write, once: OSError naming the file, or UserError."""
        error = self._error
        if error is not None:  # the thread that has set it sets it no more
            self._error = None
            raise error

    def wait(self) -> None:
        """Wait until everything saved so far is on the disk. Raises as `check` does."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def newest(self) -> int | None:
        """Return the step of the newest whole checkpoint, every byte of it checked; None if there are no checkpoints.

        It skips a damaged one with a warning that names its file, the reason, and the step used instead.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        faults: list[str] = []
        for step in reversed(self._found()):
            fault = self._fault(step)
            if fault is None:
                for other in faults:
                    log.warning("%s; step %d is used instead", other, step)
                return step
            faults.append(fault)
        if faults:
            raise UserError(f"no whole checkpoint is left; the newest: {faults[0]}; start a new run")
        return None

    def load(self, step: int, name: str = "state", device: str | torch.device = "cpu") -> dict[Any, Any]:
        """Return a state of a checkpoint, "state" or `replica_name(number)`, its tensors on `device`; runs no code.

        Raises:
            UserError: it is missing, damaged, foreign, or holds more than tensors and plain values; names the file.
        """
        path, files = self._path(step) / f"{name}.pt", self._manifest(step)["files"]
        if path.name not in files:
            raise UserError(f"{path}: expected one of {', '.join(sorted(files))}, which the checkpoint is made of")
        return parse_state(read_file(path, files[path.name]), path, device)

    def replicas(self, step: int) -> int:
        """Return the number of replicas in a checkpoint. Raises UserError if its manifest is damaged."""
        return int(self._manifest(step)["num_replicas"])

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that have a manifest, oldest first."""
        return [step for step in self._found() if (self._path(step) / "manifest.json").is_file()]

    @property
    def best(self) -> tuple[int, float] | None:
        """The (step, metric) of the lowest metric among the checkpoints, the earliest of equals; None: no metrics."""
        measured = []
        for step in self.steps:
            try:
                metric = self._manifest(step)["metric"]
            except UserError:
                continue  # `newest` reports damage where it matters
            if metric is not None:
                measured.append((float(metric), step))
        return min(measured)[::-1] if measured else None

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _found(self) -> list[int]:
        """Return the steps of all folders named like a checkpoint, oldest first."""
        names = [path.name for path in self.folder.glob("*") if path.is_dir()]
        return sorted(int(n) for n in names if re.fullmatch(r"[0-9]{8,18}", n) and n == f"{int(n):08d}")

    def _manifest(self, step: int) -> dict[str, Any]:
        """Return a manifest, every entry of it checked. Raises UserError for anything else."""
        path = self._path(step) / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
            got = manifest["version"], manifest["step"]
            if got != (VERSION, step):
                raise ValueError(f"version {got[0]!r} of step {got[1]!r}")
            num, metric, files = manifest["num_replicas"], manifest["metric"], manifest["files"]
            names = {"state.pt", *(f"{replica_name(n)}.pt" for n in range(len(files) - 1))}
            if type(num) is not int or num != len(files) - 1 or num < 1 or files.keys() != names:
                raise ValueError(f"{num!r} replicas and files {', '.join(files)[:100]}")
            if metric is not None and not (type(metric) is float and math.isfinite(metric)):
                raise ValueError(f"metric {metric!r}")
            if not all(type(f["bytes"]) is int and type(f["sha256"]) is str and len(f) == 2 for f in files.values()):
                raise ValueError("files without their bytes and sha256")
        except OSError as error:
            raise UserError(f"{path}: expected the manifest of a checkpoint, got {error.strerror}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: expected the manifest of step {step}, version {VERSION}, got {first_line(error)}"
            ) from None
        return manifest

    def _fault(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, None if it is whole."""
        try:
            for name, expected in self._manifest(step)["files"].items():
                read_file(self._path(step) / name, expected)
        except UserError as error:
            return str(error)
        return None

    def _write(
        self, step: int, contents: dict[str, dict[Any, Any]], metric: float | None, run_files: Mapping[str, bytes]
    ) -> None:
        """Write this rank's files, and complete the checkpoint on the first rank; runs in the background thread."""
        final = self._path(step)
        part = final.with_name(f".{final.name}.part")
        try:
            if not final.is_dir() or self._fault(step) is not None:  # never touch a whole one
                part.mkdir(parents=True, exist_ok=True)
                files = {}
                for name, content in contents.items():
                    files[f"{name}.pt"] = write_state(part / f"{name}.pt", content)
                if self.first:
                    self._commit(step, part, files, metric)
                else:
                    for name, described in files.items():  # tells the first rank that the file is complete
                        write_atomically((part / name).with_suffix(".json"), json.dumps(described).encode())
            for name, packed in run_files.items():
                write_atomically(self.run / name, packed)
            self._last = step
        except Exception as error:
            if self.first:
                shutil.rmtree(part, ignore_errors=True)
            self._error = error

    def _commit(self, step: int, part: Path, files: dict[str, Any], metric: float | None) -> None:
        """Wait for the other ranks' files, write the manifest, rename the folder, and remove older checkpoints."""
        deadline = time.monotonic() + PATIENCE
        for path in (part / f"{replica_name(number)}.pt" for number in range(self.num_replicas)):
            if path.name not in files:
                sidecar = path.with_suffix(".json")
                while not sidecar.exists():
                    if time.monotonic() > deadline or not threading.main_thread().is_alive():
                        raise UserError(
                            f"{path}: expected the rank of this replica to write it within {PATIENCE:g} s, got nothing"
                        )
                    time.sleep(POLL)
                files[path.name] = json.loads(sidecar.read_bytes())
                sidecar.unlink()
        manifest = {
            "version": VERSION,
            "step": step,
            "num_replicas": self.num_replicas,
            "metric": None if metric is None else float(metric),
            "files": files,
        }
        write_atomically(part / "manifest.json", json.dumps(manifest, indent=2).encode())
        final = self._path(step)
        if final.exists():
            self._remove(final)  # damaged: the run went on from an older one and has reached this step again
        part.rename(final)
        flush_folder(self.folder)
        flush_folder(self.run)
        steps, best = self.steps, self.best
        # Later ones than this are damaged; they do not count until the run has reached their step again.
        for old in [other for other in steps if other <= step][: -self.keep]:
            if best is None or old != best[0]:
                self._remove(self._path(old))

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint, renamed first: a kill in between leaves no half of one under its name."""
        renamed = checkpoint.with_name(f".{checkpoint.name}.old.part")
        shutil.rmtree(renamed, ignore_errors=True)
        checkpoint.rename(renamed)
        shutil.rmtree(renamed)
