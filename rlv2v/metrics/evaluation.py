"""Evaluation of a run on one split of a dataset, with reference rows beside the model's.

A clip is a whole video of the split, at its own size. It streams by: the source is translated with the recurrent state
carried along, as `rlv2v.translate` does, and each row is measured frame by frame.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from tqdm import tqdm

from rlv2v.checkpoint.export import load_translator
from rlv2v.data.index import Source, index_folder
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError, one_line
from rlv2v.method.translation import Stream
from rlv2v.metrics import METRICS, Row, mean_metrics, pooled_metrics, scenes, spread_metrics
from rlv2v.metrics.base import ClipMeter, Kind, Need, Scene, Values, reduce_values
from rlv2v.metrics.images import References
from rlv2v.metrics.sets import SEED, random_network
from rlv2v.runtime.device import pick_device

Split = Literal["val", "test", "train"]
ROWS = {
    "model": "this run",
    "identity": "the source, copied",
    "constant": "the target set's mean frame",
    "truth": "the truth against itself",
    "target": "one half of the target set against the other",
}
"""The rows of a result, and what each of them scores."""
Rows = dict[str, Row]
Record = Callable[[str, Scene, np.ndarray], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Hold a source video and the path of its hidden truth, None where it is not known."""

    source: Source
    truth: Path | None

    @property
    def name(self) -> str:
        """The name of the source's file."""
        return self.source.path.name


@dataclass(frozen=True)
class ClipResult:
    """Hold what was measured of one clip: its rows, and its curves by row and metric, a value a frame."""

    name: str
    num_frames: int
    height: int
    width: int
    rows: Rows
    curves: dict[str, dict[str, list[float | None]]]
    values: dict[str, Values] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """Hold what was measured of a run: each clip's result, and the means and standard deviations over clips."""

    run: Path
    data: Path
    split: Split
    rows: Rows
    spread: Rows
    clips: list[ClipResult]

    def to_json(self) -> dict[str, Any]:
        """Return what `evaluate --json` writes."""
        _, digest = random_network()
        return {
            "run": str(self.run),
            "data": str(self.data),
            "split": self.split,
            "rows": self.rows,
            "spread": self.spread,
            "clips": [{"name": c.name, "num_frames": c.num_frames, "rows": c.rows} for c in self.clips],
            "random_features": {"seed": SEED, "sha256": digest},
        }


def evaluate_run(
    run: Path,
    data: Path,
    split: Split = "test",
    *,
    newest: bool = False,
    device: str = "auto",
    networks: Mapping[str, Any] | None = None,
    progress: bool = True,
    record: Record | None = None,
) -> Evaluation:
    """Return what was measured of a run folder on one split of a dataset.

    Args:
        networks: of the metrics that need one, see `rlv2v.metrics.learned`.
        record: called with (clip's name, scene, translation) for each frame, for who wants the pictures too.

    Raises:
        UserError: no model in the run, no usable video in the split, or a truth that is missing or too short.
    """
    pairs = open_split(data, split)
    references = open_references(data, split, networks)
    known: set[Need] = {*references.kinds, *references.networks}  # type: ignore[arg-type]
    known |= {"synthetic"} if is_synthetic(data) else set()
    picked = pick_device(device)
    (forward, config), (backward, _) = (load_translator(run, d, device=picked, newest=newest) for d in ("x2y", "y2x"))
    clips = []
    threads = cv2.getNumThreads()
    cv2.setNumThreads(torch.get_num_threads())  # OpenCV takes every core by itself
    try:
        for pair in tqdm(pairs, desc=f"evaluate {split}", unit="video", disable=not progress):
            there, back = Stream(forward, config), Stream(backward, config)
            clips.append(measure_pair(pair, there, back, references, known, record))
        target = target_rows(references, clips)
    finally:
        cv2.setNumThreads(threads)
    by_row = {name: [clip.rows[name] for clip in clips] for name in ROWS if name != "target"}
    means, spread = ({name: f(rows) for name, rows in by_row.items()} for f in (mean_metrics, spread_metrics))
    sets = references.values(min(clips[0].height, clips[0].width))
    for name in means:
        means[name] |= pooled_metrics([clip.values[name] for clip in clips if name in clip.values], sets)
    if target:
        means["target"], spread["target"] = mean_metrics(target), spread_metrics(target)
    return Evaluation(run, data, split, means, spread, clips)


def open_references(data: Path, split: Split, networks: Mapping[str, Any] | None = None) -> References:
    """Return what clips of a dataset are compared with: the target set is all of Y and Z, and the split's own Y.

    Where Y's folder holds nothing, S is of the target set.
    """
    both: frozenset[Kind] = frozenset({"target", "training"})
    folders = {data / name: both for name in ("trainY", "trainB", "trainZ")}
    has_y = any(any((data / name).glob("*")) for name in ("trainY", "trainB"))
    style: frozenset[Kind] = frozenset({"training"}) if has_y else both
    held_out: frozenset[Kind] = frozenset({"target"})
    folders |= {data / "trainS": style}
    folders |= {data / f"{split}{letter}": held_out for letter in "YB" if split != "train"}
    return References.open(folders, networks)


def measure_pair(
    pair: Pair, there: Stream, back: Stream, references: References, known: set[Need], record: Record | None = None
) -> ClipResult:
    """Translate a source, and measure the rows of its clip."""
    source = pair.source
    constant = references.mean_image(source.width, source.height)
    known = known | ({"truth"} if pair.truth else set())
    meters = {"model": ClipMeter({*known, "cycle"}, references.networks)}
    meters |= {name: ClipMeter(known, references.networks) for name in ("identity", "constant", "truth")}
    for scene in scenes(read_frames(source.path, num=source.num_frames), truth_frames(pair)):
        output = there(scene.source)
        meters["model"].add(output, scene, back(output))
        meters["identity"].add(scene.source, scene)
        if constant is not None:
            meters["constant"].add(constant, scene)
        if scene.truth is not None:
            meters["truth"].add(scene.truth, scene)
        if record:
            record(pair.name, scene, output)
    sets = references.values(min(source.width, source.height))
    values = {name: meter.values for name, meter in meters.items()}
    rows = {name: reduce_values(column, sets) for name, column in values.items()}
    curves = {name: meter.curves() for name, meter in meters.items() if meter.num_frames}
    pooled = {
        name: {key: value for key, value in column.items() if METRICS[key].pooled} for name, column in values.items()
    }
    return ClipResult(pair.name, meters["model"].num_frames, source.height, source.width, rows, curves, pooled)


def truth_frames(pair: Pair) -> Iterator[np.ndarray] | None:
    """Yield the truth's frames, one for each of the source's; None where it is not known."""
    if pair.truth is None:
        return None
    return checked(read_frames(pair.truth, num=pair.source.num_frames), pair)


def checked(frames: Iterator[np.ndarray], pair: Pair) -> Iterator[np.ndarray]:
    """Yield the frames of a truth. Raises UserError where it is shorter than its source, or of another size."""
    expected, count = (pair.source.height, pair.source.width, 3), 0
    for frame in frames:
        if frame.shape != expected:
            size = f"{expected[1]}x{expected[0]}, got {frame.shape[1]}x{frame.shape[0]}"
            raise UserError(f"{pair.truth}: expected its source's size {size}")
        yield frame
        count += 1
    raise UserError(
        f"{pair.truth}: shorter than its source {pair.source.path} ({pair.source.num_frames} frames expected, {count} "
        "found); the hidden truth must have every frame"
    )


def target_rows(references: References, clips: list[ClipResult]) -> list[Row]:
    """Return the rows of the target set's first half against its second, one for each size of the split's clips."""
    if "target" not in references.kinds:
        return []
    halves = [references.halves(short) for short in sorted({min(clip.height, clip.width) for clip in clips})]
    return [reduce_values(a, {"target": b}) | pooled_metrics([a], {"target": b}) for a, b in halves]


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
    """Return the truth at the source's place in `folder`, with any suffix; loose images in `folder` are one video."""
    exact = truths / source.relative_to(folder)
    if exact.exists():
        return exact
    beside = exact.parent.iterdir() if exact.parent.is_dir() else ()
    candidates = sorted(path for path in beside if path.stem == source.stem)
    if not candidates:
        raise UserError(f"{truths}: no truth for {source.relative_to(folder)}; expected one of that name")
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
