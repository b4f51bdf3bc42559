"""Evaluation of a run on one split of a dataset.

A clip is `config.data.frames` consecutive frames, scaled and centre-cropped as in training. The clips of one video
follow each other with the recurrent state carried along, which is what `rlv2v.translate` does.
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
from tqdm import tqdm

from rlv2v.checkpoint.export import load_translator
from rlv2v.config import Config
from rlv2v.data.index import Source, index_folder
from rlv2v.data.video import centre_crop, fit, read_frames
from rlv2v.errors import UserError, one_line
from rlv2v.method.translation import translate_chunk
from rlv2v.metrics import Row, clip_metrics, mean_metrics
from rlv2v.model import Translator
from rlv2v.runtime.device import pick_device

Split = Literal["val", "test", "train"]
ROWS = {"model": "this run", "identity": "the source, copied", "truth": "the truth against itself"}
"""The rows of a result, and what each of them scores."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Hold a source video and the path of its hidden truth, None where it is not known."""

    source: Source
    truth: Path | None


def evaluate_run(
    run: Path, data: Path, split: Split = "test", *, best: bool = False, device: str = "auto", progress: bool = True
) -> dict[str, Any]:
    """Return what `evaluate --json` writes, {run, data, split, rows}, for a run folder on one split of a dataset.

    Raises:
        UserError: no model in the run, no usable video in the split, or a truth that is missing or too short.
    """
    pairs = open_split(data, split)
    synthetic = is_synthetic(data)
    g, config = load_translator(run, "x2y", device=pick_device(device), best=best)
    rows: dict[str, list[Row]] = {name: [] for name in ROWS}
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
    """Yield (source, output, truth) of each clip of a video, uint8 (T,size,size,3), T <= config.data.frames."""
    state = None
    truths = clips(pair.truth, config, num=pair.source.num_frames) if pair.truth else None
    for source in clips(pair.source.path, config, num=pair.source.num_frames):
        truth = next(truths, None) if truths else None
        if truths and (truth is None or truth.shape != source.shape):
            raise UserError(
                f"{pair.truth}: shorter than its source {pair.source.path} ({len(source)} frames expected, "
                f"{0 if truth is None else len(truth)} left); the hidden truth must have every frame"
            )
        output, state = translate_chunk(g, config, source, state)
        yield source, output, truth


def clips(path: Path, config: Config, *, num: int) -> Iterator[np.ndarray]:
    """Yield the first `num` frames of a video as square clips of the config's length; the last may be shorter."""
    stream = read_frames(path, num=num)
    while chunk := list(islice(stream, config.data.frames)):
        yield centre_crop(fit(np.stack(chunk), config.data.size), config.data.size)


def open_split(data: Path, split: Split) -> list[Pair]:
    """Return the usable videos of <split>X (or CycleGAN's <split>A), each with its truth; log the others by name."""
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
    return [Pair(source, truth_of(source.path, folder, truths) if truths.is_dir() else None) for source in usable]


def truth_of(source: Path, folder: Path, truths: Path) -> Path:
    """Return the truth of the source's name, or of its stem; loose images in `folder` are one video."""
    if source == folder:
        return truths
    exact = truths / source.name
    candidates = [exact] if exact.exists() else sorted(path for path in truths.iterdir() if path.stem == source.stem)
    if not candidates:
        raise UserError(f"{truths}: no truth for {source.name}; expected one of that name")
    return candidates[0]


def is_synthetic(data: Path) -> bool:
    """Return whether dataset.json says that this is the synthetic set, whose background and objects are known."""
    about = data / "dataset.json"
    if not about.is_file():
        return False
    try:
        return bool(json.loads(about.read_text(encoding="utf-8")).get("kind") == "synthetic")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{about}: expected a JSON object with a 'kind', got {error}") from error
