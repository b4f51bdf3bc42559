"""The choice of a run's best checkpoint, without a truth.

At every checkpoint the samples are translated at training size, measured beside the run's target set, and ranked by
`rlv2v.metrics.criterion`. `RUN/selection.jsonl` has a line for each checkpoint:

    {"step", "seconds", "criterion", "metrics", "identity", "truth", "identity_truth"}

`metrics` and `identity` (the source, copied) are the rows that the criterion is computed from. `truth` and
`identity_truth` are what the hidden truth says of the same frames, null where none is known: they are written down for
`bench/criterion.py` and for people, and never used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch

from rlv2v.config import Config
from rlv2v.files import write_atomically
from rlv2v.method.samples import Sample, grid_rows, pick_samples, translate_samples
from rlv2v.metrics import METRICS, Row, mean_metrics, scenes
from rlv2v.metrics.base import ClipMeter, Need, Scene, Values, reduce_values
from rlv2v.metrics.criterion import criterion
from rlv2v.metrics.evaluation import open_references
from rlv2v.model import Generator
from rlv2v.runtime.log import read_metrics

DIGITS = 6  # of the criterion: sums differ by rounding
WITH_TRUTH: frozenset[Need] = frozenset({"truth", "synthetic", "lpips"})


class Selection:
    """Measure the checkpoints of a run, and know the best one.

    Args:
        config: of the run, whose folder exists.
        step: where the run starts; lines of later steps, left by a run killed after its last checkpoint, are dropped.
        best: step and criterion of the best checkpoint that the run still has, for a run whose lines are lost.
    """

    def __init__(self, config: Config, step: int = 0, best: tuple[int, float] | None = None) -> None:
        self.config, self.path = config, config.out / "selection.jsonl"
        self.lines: list[dict[str, Any]] = [line for line in read_metrics(self.path) if line["step"] <= step]
        if not self.lines and best is not None:
            self.lines = [{"step": best[0], "seconds": 0.0, "criterion": best[1]}]
        self._write()
        self.samples = pick_samples(config)
        split = "val" if any((config.data.folder / f"val{letter}").is_dir() for letter in "XA") else "train"
        self.references = open_references(config.data.folder, split)  # type: ignore[arg-type]
        with opencv_threads():
            self.scenes = [list(remembered(sample)) for sample in self.samples]
            self.identity, self.identity_truth = self.rows([sample.source for sample in self.samples])

    def measure(self, step: int, seconds: float, g: Generator) -> list[np.ndarray]:
        """Translate the samples, write the checkpoint's line, and return the rows of a grid of samples."""
        translated = translate_samples(g, self.config, self.samples)
        with opencv_threads():
            own, truth = self.rows(translated)
        line: dict[str, Any] = {"step": step, "seconds": round(seconds, 3)}
        line |= {"criterion": round(criterion(own, self.identity), DIGITS)}
        line |= {"metrics": own, "identity": self.identity}
        line |= {"truth": truth, "identity_truth": self.identity_truth}
        self.lines = [other for other in self.lines if other["step"] < step] + [line]
        self._write()
        return grid_rows(self.samples, translated)

    @property
    def best(self) -> dict[str, Any]:
        """The line of the least criterion, the earliest of equals."""
        return min(self.lines, key=lambda line: line["criterion"])

    @property
    def is_best(self) -> bool:
        """Whether the newest checkpoint is the best one."""
        return self.best is self.lines[-1]

    @property
    def num_since_best(self) -> int:
        """Number of checkpoints since the best one."""
        return len(self.lines) - 1 - self.lines.index(self.best) if self.lines else 0

    def say_stale(self) -> str:
        """Return the line that says why a run ended early, and how to go on with it."""
        best = self.best
        return (
            f"stopped by --patience {self.config.checkpoint.patience} at step {self.lines[-1]['step']}: the best "
            f"checkpoint is that of step {best['step']}, criterion {best['criterion']:.4g}; to train on: --resume "
            f"--patience {2 * self.config.checkpoint.patience} --out {self.config.out}"
        )

    def values(self) -> dict[str, float]:
        """Return what a log shows of the newest checkpoint: its criterion, the least so far, and what a truth says."""
        newest = self.lines[-1]
        values = {"criterion": newest["criterion"], "best_criterion": self.best["criterion"]}
        rows = {"selection": newest["metrics"], "truth": newest["truth"] or {}}
        return values | {f"{kind}/{k}": v for kind, row in rows.items() for k, v in row.items() if v is not None}

    def rows(self, outputs: Sequence[np.ndarray]) -> tuple[Row, Row | None]:
        """Return the metrics of translated samples that need no truth, and those that do, None where it is unknown.

        Distances to a set are taken over the samples together: a clip alone is not like the whole set.
        """
        rows, clips = [], list[Values]()
        for sample, output, scenes_of_clip in zip(self.samples, outputs, self.scenes, strict=True):
            known: set[Need] = {*self.references.kinds}
            known |= {"truth"} if sample.truth is not None else set()
            meter = ClipMeter(known)
            for frame, scene in zip(output, scenes_of_clip, strict=True):
                meter.add(frame, scene)
            clips.append(meter.values)
            rows.append(reduce_values(meter.values, {}))
        row, sets = mean_metrics(rows), self.references.values(self.config.data.size)
        for name, metric in METRICS.items():
            own = [values[name] for values in clips if len(values.get(name, ()))]
            other = sets.get(metric.reference, {}).get(name, np.empty(0)) if metric.reference else np.empty(0)
            if own and len(other):
                row[name] = metric.reduce(np.concatenate(own), other)
        with_truth = {name for name, metric in METRICS.items() if metric.needs & WITH_TRUTH}
        truth: Row = {name: value for name, value in row.items() if name in with_truth and value is not None}
        return {name: value for name, value in row.items() if name not in with_truth}, truth or None

    def _write(self) -> None:
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def remembered(sample: Sample) -> Iterator[Scene]:
    """Yield the scenes of a sample, with what they know of the frame before taken once for all checkpoints."""
    for scene in scenes(sample.source, sample.truth):
        _ = scene.warping_error, scene.true_change  # and with the first the flow
        yield scene


@contextmanager
def opencv_threads() -> Iterator[None]:
    """Hold OpenCV to torch's threads: it takes every core by itself."""
    usual = cv2.getNumThreads()
    cv2.setNumThreads(torch.get_num_threads())
    try:
        yield
    finally:
        cv2.setNumThreads(usual)
