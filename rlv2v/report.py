"""`python -m rlv2v.report RUN`: one self-contained HTML page of curves, side-by-side videos, metrics and config."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
import tyro
from markupsafe import Markup
from matplotlib.figure import Figure

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import run_command
from rlv2v.data.video import probe
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.evaluate import Split, evaluate_run, figure, open_split, translated_clips, write_text
from rlv2v.metrics.with_truth import METRIC_KEYS
from rlv2v.runtime.device import pick_device
from rlv2v.runtime.log import read_metrics

MIN_PANEL = 192  # pixels: smaller videos are enlarged by whole pixels
GAP = 8  # pixels of grey between panels
MAX_SHOWN_FRAMES = 64
MAX_POINTS = 400  # of a curve
INK = "#010203"  # stands for the page's text colour, in light and in dark

MEANING = {
    "background_accuracy": ("higher", "share of frames whose background has the right colour"),
    "clip_accuracy": ("higher", "share of clips whose background is right in every frame"),
    "iou": ("higher", "overlap of the object with the true one; copying the source scores 1, so never read it alone"),
    "foreground_error": ("lower", "mean colour error on the object's pixels, 0 to 1"),
    "l1": ("lower", "mean absolute error of all pixels against the hidden truth, 0 to 1"),
    "psnr": ("higher", "peak signal-to-noise ratio against the hidden truth, dB; 100 for identical frames"),
    "ssim": ("higher", "structural similarity to the hidden truth, up to 1"),
    "flicker": ("lower", "mean error of the change from frame to frame, 0 to 1"),
}
ROW_NOTES = {
    "model": "this run",
    "identity": "the source, copied",
    "truth": "the truth against itself",
}


@dataclass(frozen=True)
class Args:
    """Write RUN/report/index.html: curves, side-by-side videos, the metric table and the config, in one file."""

    run: tyro.conf.Positional[Path]
    """Run folder that `python -m rlv2v.train` wrote."""
    data: Path | None = None
    """Dataset folder with held-out videos; default: the one that the run was trained on, if it still exists."""
    split: Split = "test"
    """Which of its sets to show and measure."""
    clips: int = 6
    """How many videos to show."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""


@dataclass(frozen=True)
class Video:
    """A side-by-side clip ready to embed."""

    name: str
    panels: list[str]
    frames: int
    fps: str
    width: int
    height: int
    uri: str


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run}: expected a run folder with config.json, found none") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def curves(entries: list[dict[str, Any]]) -> dict[str, Markup]:
    """An inline SVG for each logged number, over the step."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "seconds") and is_number(value) and is_number(entry.get("step")):
                series.setdefault(name, []).append((entry["step"], value))
    return {name: curve(name, np.array(points)) for name, points in series.items() if len(points) > 1}


def is_number(value: object) -> bool:
    """Whether a logged value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(name: str, points: np.ndarray) -> Markup:
    """One small chart of (N,2) step and value: values (thinned to 400 by their mean) and, bold, their running mean."""
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
    """Mean of the neighbours within a fortieth of the series on each side, fewer at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def side_by_side(panels: list[np.ndarray]) -> np.ndarray:
    """Clips (T,H,W,3) beside each other, enlarged to at least 192 pixels by whole pixels, grey between; even sizes."""
    scale = math.ceil(MIN_PANEL / min(panels[0].shape[1:3]))
    large = [clip.repeat(scale, axis=1).repeat(scale, axis=2) for clip in panels]
    gap = np.full((*large[0].shape[:2], GAP, 3), 128, np.uint8)
    row = np.concatenate([part for clip in large for part in (clip, gap)][:-1], axis=2)
    return np.pad(row, ((0, 0), (0, row.shape[1] % 2), (0, row.shape[2] % 2), (0, 0)), mode="edge")


def videos(run: Path, data: Path, split: Split, *, num: int, device: str) -> list[Video]:
    """The first clips of the split, translated: source, translation and, where there is one, the hidden truth."""
    g, config = load_translator(run, "x2y", device=pick_device(device))
    shown = []
    for pair in open_split(data, split)[:num]:
        wanted = math.ceil(MAX_SHOWN_FRAMES / config.data.frames)
        names = ["source", "translated"] + (["truth"] if pair.truth else [])
        clips = [
            [part for part in parts if part is not None] for parts in islice(translated_clips(g, config, pair), wanted)
        ]
        panels = [np.concatenate(parts) for parts in zip(*clips, strict=True)]
        fps = probe(pair.source.path).fps
        picture = side_by_side(panels)
        height, width = picture.shape[1:3]
        uri = mp4_uri(picture, fps)
        shown.append(Video(pair.source.path.name, names, len(picture), f"{float(fps):g}", width, height, uri))
    return shown


def mp4_uri(frames: np.ndarray, fps: Fraction) -> str:
    """Frames of even size as a data URI of an H.264 video that every browser plays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def sample_uri(run: Path) -> str | None:
    """The newest strip that training left in RUN/samples, enlarged by whole pixels to at least 640 wide."""
    strips = sorted((run / "samples").glob("*.png"))
    image = cv2.imread(str(strips[-1])) if strips else None
    if image is None:
        return None
    scale = math.ceil(640 / image.shape[1])
    png = cv2.imencode(".png", image.repeat(scale, axis=0).repeat(scale, axis=1))[1]
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted names, in order."""
    pairs: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return pairs


def held_out(args: Args, config: dict[str, Any]) -> Path | None:
    """The dataset to show: as named, else the run's own if it still has the split; None where there is none."""
    if args.data is not None:
        return args.data
    data = config.get("data")
    if not isinstance(data, str) or not data:
        return None
    return next((Path(data) for letter in "XA" if (Path(data) / f"{args.split}{letter}").is_dir()), None)


def main(args: Args) -> None:
    """Measure, translate, draw, and write the page beside and rename it."""
    config = read_config(args.run)
    if args.clips < 0:
        raise UserError(f"--clips: expected 0 or more, got {args.clips}")
    entries = read_metrics(args.run / "metrics.jsonl")
    data = held_out(args, config)
    result = evaluate_run(args.run, data, args.split, device=args.device) if data else None
    measured = [key for key in METRIC_KEYS if result and any(row[key] is not None for row in result["rows"].values())]

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlv2v"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        run=args.run.resolve().name,
        data=data,
        split=args.split,
        last=entries[-1] if entries else None,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        videos=videos(args.run, data, args.split, num=args.clips, device=args.device) if data else [],
        sample=sample_uri(args.run),
        result=result,
        measured=measured,
        meaning=MEANING,
        row_notes=ROW_NOTES,
        figure=figure,
        curves=curves(entries),
        config=flat(config),
    )
    folder = args.run / "report"
    folder.mkdir(exist_ok=True)
    write_text(folder / "index.html", page)
    print(f"{folder / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    run_command(main, Args)
