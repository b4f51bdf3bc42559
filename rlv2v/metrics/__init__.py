"""The registry of metrics, and the rows that are made of them.

To add a metric, write a function with the decorator `metric` in `with_truth`, or in a new module that is imported here.
The rows of `evaluate --json`, its table and the report follow the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlv2v.metrics import with_truth as with_truth  # enters its metrics in the registry
from rlv2v.metrics.base import METRICS, ClipTriple

__all__ = ["METRICS", "Row", "as_unit", "clip_metrics", "mean_metrics", "table"]
Row = dict[str, float | None]


def clip_metrics(output: np.ndarray, source: np.ndarray, truth: np.ndarray | None, *, synthetic: bool) -> Row:
    """Return every metric of one clip by name, None for what it lacks the truth or the synthetic set's palette for.

    output, source, truth: (T,H,W,3) uint8, or float in [0,1], of one shape.

    Raises:
        ValueError: another shape or type.
    """
    expected = source if truth is None else truth
    clips = {"output": output, "source": source, "truth": expected}
    for name, clip in clips.items():
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape != expected.shape:
            raise ValueError(f"metrics: {name} must be (T,H,W,3)={expected.shape}, got {clip.shape}")
    triple = ClipTriple(**{name: as_unit(clip) for name, clip in clips.items()})
    known = {"truth": truth is not None, "synthetic": synthetic}
    return {
        name: metric.compute(triple) if all(known[need] for need in metric.needs) else None
        for name, metric in METRICS.items()
    }


def mean_metrics(clips: Sequence[Row]) -> Row:
    """Return the mean of each metric over the clips that have it, else None: `clip_accuracy` becomes a share."""
    if not clips:
        raise ValueError("metrics: expected at least one clip to average, got none")
    means: Row = {}
    for name in METRICS:
        values = [value for clip in clips if (value := clip[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def as_unit(clip: np.ndarray) -> np.ndarray:
    """Return a uint8 clip as float32 in [0,1]; a float clip keeps its values."""
    if clip.dtype == np.uint8:
        return clip.astype(np.float32) / 255
    if not np.issubdtype(clip.dtype, np.floating):
        raise ValueError(f"metrics: a clip must be uint8 or float in [0,1], got {clip.dtype}")
    return clip.astype(np.float32)


def table(rows: Mapping[str, Row], *, title: str = "") -> str:
    """Return the rows as a Markdown table, `-` where a metric has no value."""
    lines = [f"| {title} | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(metric.format(row[key]) for key, metric in METRICS.items()) + " |")
    return "\n".join(lines)
