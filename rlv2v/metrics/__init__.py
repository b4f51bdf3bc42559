"""The registry of metrics, and the rows that are made of them.

To add a metric, write a function with the decorator `metric` in one of the modules below, or in a new one that is
imported here. The rows of `evaluate --json`, its table and the report follow the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Importing them enters their metrics in the registry, in this order.
from rlv2v.metrics import synthetic as synthetic  # isort: skip
from rlv2v.metrics import with_truth as with_truth  # isort: skip
from rlv2v.metrics import without_truth as without_truth  # isort: skip
from rlv2v.metrics import sets as sets  # isort: skip
from rlv2v.metrics import learned as learned  # isort: skip
from rlv2v.metrics.base import METRICS, ClipMeter, Kind, Need, Scene, Values, reduce_values
from rlv2v.metrics.images import References

__all__ = ["METRICS", "Row", "clip_metrics", "mean_metrics", "pooled_metrics", "scenes", "spread_metrics", "table"]
Row = dict[str, float | None]


def scenes(sources: Iterable[np.ndarray], truths: Iterable[np.ndarray] | None = None) -> Iterable[Scene]:
    """Yield the scene of each frame of a clip, with one earlier frame in memory."""
    previous = None
    others = iter(truths) if truths is not None else None
    for source in sources:
        scene = Scene(source, next(others) if others is not None else None, previous)
        yield scene
        scene.previous, previous = None, scene


def clip_metrics(
    output: np.ndarray,
    source: np.ndarray,
    truth: np.ndarray | None = None,
    *,
    synthetic: bool = False,
    references: References | None = None,
) -> Row:
    """Return every metric of one clip by name, None for what the clip lacks something for.

    Args:
        output, source, truth: uint8 (T,H,W,3) of one shape.
        synthetic: the clip is of the synthetic set, whose background and objects are known.
        references: the images that it is compared with.

    Raises:
        ValueError: another shape or type.
    """
    for name, clip in {"output": output, "source": source, "truth": source if truth is None else truth}.items():
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape != source.shape or clip.dtype != np.uint8:
            raise ValueError(f"metrics: {name} must be uint8 (T,H,W,3)={source.shape}, got {clip.dtype} {clip.shape}")
    has = {"truth": truth is not None, "synthetic": synthetic}
    known: set[Need] = {need for need, there in has.items() if there} | (references.kinds if references else set())  # type: ignore
    meter = ClipMeter(known)
    for image, scene in zip(output, scenes(source, truth), strict=True):
        meter.add(image, scene)
    sets = references.values(min(source.shape[1:3])) if references else {}
    return reduce_values(meter.values, sets)


def pooled_metrics(clips: Sequence[Values], references: Mapping[Kind, Values]) -> Row:
    """Return the metrics that all clips together give one number of; clips: what `ClipMeter` measured of each."""
    row: Row = {}
    for name, metric in METRICS.items():
        own = [values[name] for values in clips if len(values.get(name, ()))]
        other = references.get(metric.reference, {}).get(name, np.empty(0)) if metric.reference else np.empty(0)
        if metric.pooled:
            row[name] = metric.reduce(np.concatenate(own), other) if own and len(other) else None
    return row


def over_clips(clips: Sequence[Row], function: Callable[[list[float]], Any]) -> Row:
    """Return a function of each metric's values over the clips that have it, else None."""
    if not clips:
        raise ValueError("metrics: expected at least one clip to average, got none")
    row: Row = {}
    for name in METRICS:
        values = [value for clip in clips if (value := clip[name]) is not None]
        row[name] = float(function(values)) if values else None
    return row


def mean_metrics(clips: Sequence[Row]) -> Row:
    """Return the mean of each metric over the clips that have it, else None: `clip_accuracy` becomes a share."""
    return over_clips(clips, np.mean)


def spread_metrics(clips: Sequence[Row]) -> Row:
    """Return the standard deviation of each metric over the clips that have it, else None."""
    return over_clips(clips, np.std)


def table(rows: Mapping[str, Row], *, title: str = "") -> str:
    """Return the rows as a Markdown table, a metric a line, `-` where a row has no value; without the unknown ones."""
    shown = [metric for name, metric in METRICS.items() if any(row[name] is not None for row in rows.values())]
    lines = [f"| {title} | better | " + " | ".join(rows) + " |", "|---|---|" + "---|" * len(rows)]
    for metric in shown:
        values = " | ".join(metric.format(row[metric.name]) for row in rows.values())
        lines.append(f"| {metric.name} | {'1' if metric.better == 'one' else metric.better} | {values} |")
    return "\n".join(lines)
