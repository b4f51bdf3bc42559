"""The few-shot curve of bench/quality.py: a metric by the number of target clips, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from harness import Row
from matplotlib.figure import Figure

from rlv2v.metrics import METRICS

Curve = dict[int, list[float]]
"""Of each number of target clips, a value a seed."""


def curves(rows: Iterable[Row], metric: str) -> dict[str, Curve]:
    """Return the curve of each method; rows without a number of clips, or without the metric, are left out."""
    found: dict[str, Curve] = {}
    for row in rows:
        if row.get("few") is not None and row.get(metric) is not None and not row.get("search"):
            found.setdefault(row["method"], {}).setdefault(row["few"], []).append(row[metric])
    return {method: dict(sorted(curve.items())) for method, curve in found.items()}


def table(found: dict[str, Curve], metric: str) -> str:
    """Return the curves as a Markdown table: the median over seeds, and its range where there are several."""
    digits = METRICS[metric].digits
    counts = sorted({count for curve in found.values() for count in curve})

    def cell(values: list[float]) -> str:
        text = f"{statistics.median(values):.{digits}f}" if values else ""
        return text if len(values) < 2 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    lines = [[f"{metric}, target clips", *map(str, counts)], ["---"] * (1 + len(counts))]
    lines += [[method, *(cell(curve.get(count, [])) for count in counts)] for method, curve in found.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found: dict[str, Curve], metric: str, title: str, path: Path) -> None:
    """Write the curves as a picture: medians over seeds, with the range from the worst to the best shaded."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for method, curve in found.items():
        counts = list(curve)
        (line,) = axes.plot(counts, [statistics.median(curve[n]) for n in counts], marker="o", label=method)
        lows, highs = ([f(curve[n]) for n in counts] for f in (min, max))
        axes.fill_between(counts, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    ticks = sorted({count for curve in found.values() for count in curve})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("clips of the target domain")
    axes.set_ylabel(
        f"{metric} ({'1 is best' if METRICS[metric].better == 'one' else METRICS[metric].better + ' is better'})"
    )
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
