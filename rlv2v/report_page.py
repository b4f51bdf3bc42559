"""The page of `rlv2v.report`: what the template and the page's script show of runs, their log and their evaluation."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup

from rlv2v.config import FLAGS, Config
from rlv2v.errors import UserError
from rlv2v.flags import as_typed
from rlv2v.metrics import METRICS
from rlv2v.metrics.base import Metric
from rlv2v.metrics.evaluation import ROWS, ClipResult, Evaluation, Split, evaluate_run
from rlv2v.report_video import (
    MARGIN,
    MAX_FRAMES,
    MAX_LINES,
    SMALL,
    SOURCE,
    TRUTH,
    Recorder,
    Sheet,
    common_fps,
    make_sheet,
    source_fps,
    still_uri,
)
from rlv2v.runtime.log import read_metrics

CURVES = {
    "l1": "L1 to the truth",
    "warping_error": "warping error",
    "first_frame_jump": "change of frame",
    "sharpness": "sharpness",
    "edge_agreement": "edge agreement",
}
"""The metrics whose values by frame stand under a clip, and the headings of their charts."""
CURVE_ROWS = {"identity": SOURCE, "truth": TRUTH}
"""The reference rows that are drawn beside the runs, and the panels that they belong to."""
MIN_SAMPLE_GRID = 640  # pixels
MAX_POINTS = 400  # of a loss curve


@dataclass(frozen=True)
class Run:
    """Hold a run of the page: its folder, a name that no other run of the page has, its config and its log."""

    folder: Path
    label: str
    config: Config
    log: list[dict[str, Any]]


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs, each named by its folder, and by the folder's parents as far as names would be the same.

    Raises:
        UserError: a folder is no run, or comes twice.
    """
    resolved = [folder.resolve() for folder in folders]
    runs = []
    for number, (folder, path) in enumerate(zip(folders, resolved, strict=True)):
        config = folder / "config.json"
        if not config.is_file():
            raise UserError(f"{folder}: expected a run folder with config.json, found none")
        if path in resolved[:number]:
            raise UserError(f"{folder}: expected each run once, got it twice")
        others = [other.parts for other in resolved if other != path]
        depth = next(n for n in range(1, len(path.parts) + 1) if path.parts[-n:] not in {o[-n:] for o in others})
        label = "/".join(path.parts[-depth:])
        runs.append(Run(folder, label, Config.read(config), read_metrics(folder / "metrics.jsonl")))
    return runs


def render_page(runs: Sequence[Run], data: Path | None, split: Split, *, num_clips: int, device: str) -> str:
    """Return the report of runs as HTML that needs no other file.

    Args:
        data: dataset whose `split` is translated and measured; None leaves videos and metrics out.
        num_clips: how many clips to show at most; all are measured.

    Raises:
        UserError: a run has no model, or the dataset cannot be evaluated.
    """
    with tempfile.TemporaryDirectory(prefix="rlv2v-report-") as folder:
        recorder, results = Recorder(Path(folder), num_clips), []
        for number, run in enumerate(runs if data else []):
            assert data is not None
            with recorder.record(number) as record:
                results.append(evaluate_run(run.folder, data, split, device=device, record=record))
        sheets, rates = [], {}
        if data is not None and recorder.clips:
            sources = next(f for f in (data / f"{split}X", data / f"{split}A") if f.is_dir())
            rates = source_fps(sources, list(recorder.clips))
            sheets = [make_sheet(clip, common_fps(list(rates.values()))) for clip in recorder.clips.values()]
    measured = {clip.name: [clip] for clip in results[0].clips} if results else {}
    for result in results[1:]:
        for clip in result.clips:
            measured[clip.name].append(clip)
    clips = [clip_values(sheet, measured[sheet.clip.name], runs) for sheet in sheets]
    fps = float(common_fps(list(rates.values()))) if rates else 0.0
    script: dict[str, Any] = {
        "fps": fps,
        "clips": [clip["script"] for clip in clips],
        "losses": losses(runs),
        "colours": colours(runs),
    }
    templates = jinja2.PackageLoader("rlv2v")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        styles=Markup(templates.get_source(environment, "report.css")[0]),
        scripts=[Markup(templates.get_source(environment, name)[0]) for name in ("charts.js", "report.js")],
        script_data=as_script(script),
        runs=[run_facts(run) for run in runs],
        data=data,
        split=split,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        clips=clips,
        num_clips=len(results[0].clips) if results else 0,
        fps=f"{fps:g}",
        rates={name: f"{float(rate):g}" for name, rate in rates.items()},
        limits={"lines": MAX_LINES, "frames": MAX_FRAMES, "small": SMALL},
        table=metric_table(runs, results),
        losses=list(script["losses"]),
        config=settings(runs),
    )


def as_script(value: Any) -> Markup:
    """Return a value as JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def colours(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return the label and the CSS colour of each panel and line; of runs by their number."""
    numbered = {
        str(number): {"label": run.label, "colour": f"var(--run-{number % 6})"} for number, run in enumerate(runs)
    }
    references = {name: {"label": name, "colour": f"var(--{name})"} for name in (SOURCE, TRUTH)}
    return {**references, **numbered}


def run_facts(run: Run) -> dict[str, Any]:
    """Return what the head of the page says of a run."""
    last = run.log[-1] if run.log else {}
    seconds = last.get("seconds")
    return {
        "label": run.label,
        "method": run.config.method,
        "preset": run.config.preset,
        "size": f"{run.config.data.size.height}x{run.config.data.size.width}, {run.config.data.frames} frames",
        "seed": run.config.seed,
        "steps": last.get("step", "-"),
        "seconds": f"{seconds:.0f}" if is_number(seconds) else "-",
        "sample": sample_uri(run.folder),
    }


def clip_values(sheet: Sheet, results: Sequence[ClipResult], runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the template and the script show of a clip; results: of each run."""
    clip, names = sheet.clip, colours(runs)
    num_frames = min(results[0].num_frames, MAX_FRAMES)
    curves = {}
    for metric, heading in CURVES.items():
        lines = {panel: results[0].curves.get(row, {}).get(metric) for row, panel in CURVE_ROWS.items()}
        lines |= {str(number): result.curves["model"].get(metric) for number, result in enumerate(results)}
        known = {panel: [rounded(v) for v in line[:num_frames]] for panel, line in lines.items() if line}
        if metric == "l1":
            known.pop(TRUTH, None)  # 0 by definition
        if any(value is not None for line in known.values() for value in line):
            curves[heading] = known
    script = {
        "frames": num_frames,
        "width": clip.width if clip.small else sheet.tile_width,
        "height": clip.height if clip.small else sheet.tile_height,
        "tile": [sheet.tile_width, sheet.tile_height],
        "margin": MARGIN,
        "stride": sheet.stride,
        "columns": sheet.columns,
        "small": clip.small,
        "panels": clip.panels,
        "poster": sheet.poster,
        "curves": curves,
    }
    return {
        "name": clip.name,
        "width": clip.width,
        "height": clip.height,
        "num_frames": results[0].num_frames,
        "small": clip.small,
        "panels": [{"key": name, **names[name]} for name in clip.panels],
        "video": Markup(sheet.video),
        "script": script,
    }


def rounded(value: float | None) -> float | None:
    """Return a value with four digits, None for one that is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def metric_table(runs: Sequence[Run], results: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return the columns (runs, then reference rows) and the lines (metrics) of the table; None without results."""
    if not results:
        return None
    references = [name for name in results[0].rows if name != "model"]
    references = [name for name in references if any(v is not None for v in results[0].rows[name].values())]
    columns: list[dict[str, str | None]] = [
        {"label": run.label, "note": run.config.method, "colour": f"var(--run-{number % 6})"}
        for number, run in enumerate(runs)
    ]
    columns += [{"label": name, "note": ROWS[name], "colour": None} for name in references]
    lines = []
    for name, metric in METRICS.items():
        values = [result.rows["model"][name] for result in results]
        spreads = [result.spread["model"].get(name) for result in results]
        shown = values + [results[0].rows[row][name] for row in references]
        if all(value is None for value in shown):
            continue
        spreads += [None] * len(references)
        best = best_of(metric, values)
        cells = [
            {
                "text": metric.format(value),
                "spread": "" if spread is None else metric.format(spread),
                "best": number in best,
            }
            for number, (value, spread) in enumerate(zip(shown, spreads, strict=True))
        ]
        better = {"higher": "higher", "lower": "lower", "one": "nearer to 1"}[metric.better]
        lines.append({"name": name.replace("_", " "), "metric": metric, "better": better, "cells": cells})
    return {"columns": columns, "num_runs": len(runs), "lines": lines}


def best_of(metric: Metric, values: Sequence[float | None]) -> set[int]:
    """Return which of several runs are best by a metric, as the table shows them; none where all are equal."""
    badness = {metric.format(value): metric.badness(value) for value in values if value is not None}
    if len(badness) < 2:
        return set()
    winner = min(badness, key=badness.__getitem__)
    return {number for number, value in enumerate(values) if value is not None and metric.format(value) == winner}


def losses(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return of each logged number the curve of each run, by the run's number."""
    series: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number, run in enumerate(runs):
        points: dict[str, list[tuple[float, float, float]]] = {}
        for entry in run.log:
            step, seconds = entry.get("step"), entry.get("seconds")
            for name, value in entry.items():
                if name not in ("step", "seconds") and all(map(is_number, (step, seconds, value))):
                    points.setdefault(name, []).append((float(step), float(seconds), float(value)))  # type: ignore[arg-type]
        for name, values in points.items():
            if len(values) > 1:
                series.setdefault(name, {})[str(number)] = curve(np.array(values))
    return series


def is_number(value: object) -> bool:
    """Return whether a logged value can be drawn: neither a flag nor NaN or infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(points: np.ndarray) -> dict[str, list[float]]:
    """Return (N,3) steps, seconds and values, thinned by their mean to 400 points, with the values' running mean."""
    size = math.ceil(len(points) / MAX_POINTS)
    thinned = np.stack([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)])
    steps, seconds, values = thinned.T
    named = {"step": steps, "seconds": seconds, "raw": values, "smooth": running_mean(values)}
    return {name: [float(f"{value:.5g}") for value in column] for name, column in named.items()}


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the neighbours within a fortieth of the series on each side, fewer at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return every setting by its flag, as typed, of each run; those that differ come first."""
    lines = []
    for flag in FLAGS:
        values = [as_typed(run.config.get(flag)) for run in runs]
        lines.append({"flag": flag, "values": values, "differs": len(set(values)) > 1})
    return sorted(lines, key=lambda line: not line["differs"])


def sample_uri(run: Path) -> str | None:
    """Return the newest sample grid in RUN/samples, enlarged by whole pixels; None where there is none."""
    grids = sorted((run / "samples").glob("*.png"))
    image = cv2.imread(str(grids[-1])) if grids else None
    if image is None:
        return None
    scale = math.ceil(MIN_SAMPLE_GRID / image.shape[1])
    return still_uri(image[..., ::-1].repeat(scale, axis=0).repeat(scale, axis=1), lossless=True)
