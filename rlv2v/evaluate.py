"""`python -m rlv2v.evaluate RUN --data DIR --split test --json F`: measure a run against hidden truth.

Three rows: `model`; `identity`, the source copied (what doing nothing scores); `truth`, the truth against itself (the
best there is). A clip is `config.data.frames` consecutive frames, scaled and centre-cropped as in training; the
clips of one
video follow each other with the recurrent state carried along, which is what `rlv2v.translate` does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.index import Source, index_folder
from rlv2v.data.video import centre_crop, fit, read_frames
from rlv2v.errors import UserError, one_line
from rlv2v.files import write_atomically
from rlv2v.method.translation import translate_chunk
from rlv2v.metrics.with_truth import METRIC_KEYS, Metrics, clip_metrics, mean_metrics
from rlv2v.model import Translator
from rlv2v.runtime.device import pick_device

Split = Literal["val", "test", "train"]
ROWS = ("model", "identity", "truth")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    """Measure a trained run on a dataset's held-out clips, with doing nothing and the truth itself beside it."""

    run: tyro.conf.Positional[Path]
    """Run folder that `python -m rlv2v.train` wrote."""
    data: Path
    """Dataset folder; its <split>X (or <split>A) is translated, <split>Truth holds the truth by the same names."""
    split: Split = "test"
    """Choose settings on val, report on test."""
    json: Path | None = None
    """File for the result as JSON, in a folder that exists."""
    best: bool = False
    """Measure the best checkpoint's model instead of the newest."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""


@dataclass(frozen=True)
class Pair:
    """A source video and its hidden truth, None where there is none."""

    source: Source
    truth: Path | None


def evaluate_run(
    run: Path, data: Path, split: Split = "test", *, best: bool = False, device: str = "auto", progress: bool = True
) -> dict[str, Any]:
    """The result of `--json` (see DESIGN: `run, data, split, rows`) for a run folder on one split of a dataset."""
    pairs = open_split(data, split)
    synthetic = is_synthetic(data)
    g, config = load_translator(run, "x2y", device=pick_device(device), best=best)
    rows: dict[str, list[Metrics]] = {name: [] for name in ROWS}
    for pair in tqdm(pairs, desc=f"evaluate {split}", unit="video", disable=not progress):
        for source, output, truth in translated_clips(g, config, pair):
            candidates = {"model": output, "identity": source, "truth": source if truth is None else truth}
            for name, candidate in candidates.items():
                rows[name].append(clip_metrics(candidate, source, truth, synthetic=synthetic))
    means = {name: mean_metrics(clips) for name, clips in rows.items()}
    return {"run": str(run), "data": str(data), "split": split, "rows": means}


def translated_clips(
    g: Translator, config: Config, pair: Pair
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(source, output, truth) of each clip of a video, uint8 (T,size,size,3), T <= config.data.frames; state
    carried."""
    state = None
    sources = clips(pair.source.path, config, num=pair.source.num_frames)
    truths = clips(pair.truth, config, num=pair.source.num_frames) if pair.truth else None
    for source in sources:
        truth = next(truths, None) if truths else None
        if pair.truth is not None and (truth is None or truth.shape != source.shape):
            got = 0 if truth is None else len(truth)
            raise UserError(
                f"{pair.truth}: shorter than its source {pair.source.path} "
                f"({len(source)} frames expected, {got} left); the hidden truth must have every frame"
            )
        output, state = translate_chunk(g, config, source, state)
        yield source, output, truth


def clips(path: Path, config: Config, *, num: int) -> Iterator[np.ndarray]:
    """The first `num` frames of a video in clips of the config's length (the last may be shorter) and square size."""
    stream = read_frames(path, num=num)
    while chunk := list(islice(stream, config.data.frames)):
        yield centre_crop(fit(np.stack(chunk), config.data.size), config.data.size)


def open_split(data: Path, split: Split) -> list[Pair]:
    """The usable videos of <split>X (or CycleGAN's <split>A), each with its truth; bad ones are named and skipped."""
    folder = next((f for f in (data / f"{split}X", data / f"{split}A") if f.is_dir()), None)
    if folder is None:
        raise UserError(f"{data}: expected a folder {split}X (or {split}A) with source videos, found none")
    sources = index_folder(folder, frames=2)
    usable = [source for source in sources if source.status != "excluded"]
    excluded = "; ".join(f"{one_line(s.path.name)}: {s.reason}" for s in sources if s.status == "excluded")
    if not usable:
        raise UserError(f"{folder}: no usable video ({excluded or 'the folder is empty'})")
    if excluded:
        log.warning("%s: skipped %s", folder, excluded)
    truths = data / f"{split}Truth"
    if not truths.is_dir():
        return [Pair(source, None) for source in usable]
    return [Pair(source, truth_of(source.path, folder, truths)) for source in usable]


def truth_of(source: Path, folder: Path, truths: Path) -> Path:
    """The truth with the source's name, or its stem with another suffix; loose images in `folder` are one video."""
    if source == folder:
        return truths
    exact = truths / source.name
    found = [exact] if exact.exists() else sorted(p for p in truths.iterdir() if p.stem == source.stem)
    if not found:
        raise UserError(f"{truths}: no truth for {source.name}; expected one of that name")
    return found[0]


def is_synthetic(data: Path) -> bool:
    """Whether dataset.json says that this is the synthetic set, whose background and objects are known."""
    about = data / "dataset.json"
    if not about.is_file():
        return False
    try:
        return bool(json.loads(about.read_text(encoding="utf-8")).get("kind") == "synthetic")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{about}: expected a JSON object with a 'kind', got {error}") from error


def table(rows: dict[str, Metrics], *, first: str = "") -> str:
    """A markdown table, a line for each row; `-` where a metric cannot be computed."""
    lines = [f"| {first} | " + " | ".join(METRIC_KEYS) + " |", "|---|" + "---|" * len(METRIC_KEYS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(figure(row[key], key) for key in METRIC_KEYS) + " |")
    return "\n".join(lines)


def figure(value: float | None, key: str) -> str:
    """A metric for people: dB with two digits, all else with four."""
    return "-" if value is None else f"{value:.2f}" if key == "psnr" else f"{value:.4f}"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is never half there."""
    write_atomically(path, text.encode())


def main(args: Args) -> None:
    """Evaluate, print the table, write the JSON."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file name in a folder that exists")
    result = evaluate_run(args.run, args.data, args.split, best=args.best, device=args.device)
    print(table(result["rows"], first=args.split))
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_command(main, Args)
