"""The page of `rlv2v.report`: curves and videos as text that stands in the page itself, and the template's values."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from rlv2v.checkpoint.export import load_translator
from rlv2v.config import FLAGS, Config
from rlv2v.data.video import probe
from rlv2v.data.writer import write_clip
from rlv2v.flags import as_typed
from rlv2v.metrics import METRICS
from rlv2v.metrics.evaluation import ROWS, Split, evaluate_run, open_split, translated_clips
from rlv2v.runtime.device import pick_device
from rlv2v.runtime.log import read_metrics

MIN_PANEL = 192  # pixels: smaller videos are enlarged by whole pixels
MIN_SAMPLE_GRID = 640  # pixels
GAP = 8  # pixels of grey between panels
MAX_SHOWN_FRAMES = 64
MAX_POINTS = 400  # of a curve
INK = "#010203"  # stands for the page's text colour, in light and in dark


def render_page(run: Path, config: Config, data: Path | None, split: Split, *, num_videos: int, device: str) -> str:
    """Return the report of a run as HTML that needs no other file.

    Args:
        data: dataset whose `split` is translated and measured; None leaves videos and metrics out.
        num_videos: how many videos to show at most.

    Raises:
        UserError: the run has no model, or the dataset cannot be evaluated.
    """
    entries = read_metrics(run / "metrics.jsonl")
    result = evaluate_run(run, data, split, device=device) if data else None
    rows = result["rows"] if result else {}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlv2v"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        run=run.resolve().name,
        data=data,
        split=split,
        last=entries[-1] if entries else None,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        videos=videos(run, data, split, num=num_videos, device=device) if data else [],
        sample=sample_uri(run),
        rows=rows,
        row_notes=ROWS,
        metrics=[metric for name, metric in METRICS.items() if any(row[name] is not None for row in rows.values())],
        curves=curves(entries),
        config={flag: as_typed(config.get(flag)) for flag in FLAGS},
    )


def curves(entries: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Return an inline SVG for each logged number, over the step."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "seconds") and is_number(value) and is_number(entry.get("step")):
                series.setdefault(name, []).append((entry["step"], value))
    return {name: curve(name, np.array(points)) for name, points in series.items() if len(points) > 1}


def is_number(value: object) -> bool:
    """Return whether a logged value can be drawn: neither a flag nor NaN or infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(name: str, points: np.ndarray) -> Markup:
    """Return a small chart of (N,2) steps and values: the values, thinned by their mean, and their running mean."""
    size = math.ceil(len(points) / MAX_POINTS)
    thinned = np.stack([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)])
    steps, values = thinned.T
    smooth = running_mean(values)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        chart = Figure(figsize=(3.3, 1.9), layout="constrained")
        chart.patch.set_alpha(0)
        axes = chart.add_subplot()
        axes.patch.set_alpha(0)
        axes.plot(steps, values, color="#3b82f6", alpha=0.35, linewidth=1)
        axes.plot(steps, smooth, color="#3b82f6", linewidth=1.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(INK)
        axes.tick_params(colors=INK, length=3)
        axes.locator_params(nbins=4)
        axes.set_xlabel("step", color=INK)
        axes.grid(alpha=0.2, linewidth=0.6)
        svg = io.StringIO()
        chart.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue().replace(INK, "currentColor")
    label = f"{name} over steps {steps[0]:g} to {steps[-1]:g}, last running mean {smooth[-1]:.4g}"
    return Markup(text[text.index("<svg") :].replace("<svg", '<svg role="img" aria-label="%s"', 1)) % label


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the neighbours within a fortieth of the series on each side, fewer at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def videos(run: Path, data: Path, split: Split, *, num: int, device: str) -> list[dict[str, Any]]:
    """Return the first clips of the split, as the template shows them: source, translation and truth, if known."""
    g, config = load_translator(run, "x2y", device=pick_device(device))
    num_clips = math.ceil(MAX_SHOWN_FRAMES / config.data.frames)
    shown = []
    for pair in open_split(data, split)[:num]:
        names = ("source", "translated", "truth") if pair.truth else ("source", "translated")
        clips = islice(translated_clips(g, config, pair), num_clips)
        panels = [np.concatenate(sequence) for sequence in zip(*(clip[: len(names)] for clip in clips), strict=True)]
        picture, fps = side_by_side(panels), probe(pair.source.path).fps
        text = {"name": pair.source.path.name, "panels": names, "fps": f"{float(fps):g}", "uri": mp4_uri(picture, fps)}
        shown.append(text | dict(zip(("num_frames", "height", "width"), picture.shape[:3], strict=True)))
    return shown


def side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Return clips (T,H,W,3) in a row, enlarged by whole pixels to at least MIN_PANEL, with grey gaps; even sizes."""
    scale = math.ceil(MIN_PANEL / min(panels[0].shape[1:3]))
    large = [clip.repeat(scale, axis=1).repeat(scale, axis=2) for clip in panels]
    gap = np.full((*large[0].shape[:2], GAP, 3), 128, np.uint8)
    row = np.concatenate([piece for clip in large for piece in (clip, gap)][:-1], axis=2)
    return np.pad(row, ((0, 0), (0, row.shape[1] % 2), (0, row.shape[2] % 2), (0, 0)), mode="edge")


def mp4_uri(frames: np.ndarray, fps: Fraction) -> str:
    """Return frames of even size as the data URI of an H.264 video that every browser plays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, fps)
        return data_uri("video/mp4", path.read_bytes())


def sample_uri(run: Path) -> str | None:
    """Return the newest sample grid in RUN/samples, enlarged by whole pixels; None where there is none."""
    grids = sorted((run / "samples").glob("*.png"))
    image = cv2.imread(str(grids[-1])) if grids else None
    if image is None:
        return None
    scale = math.ceil(MIN_SAMPLE_GRID / image.shape[1])
    return data_uri("image/png", cv2.imencode(".png", image.repeat(scale, axis=0).repeat(scale, axis=1))[1].tobytes())


def data_uri(kind: str, content: bytes) -> str:
    """Return a file's content as a URI that holds it."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()
