"""The datasets of bench/quality.py: named tasks that it makes, any folder of the user's, and few-shot subsets of them.

synth<N>    the synthetic set at NxN; `--reading paper` takes the paper's own words
cue<N>      the same, but the background turns red when the object crosses the middle (`--switch crossing`)
graded<N>, region<N>, texture<N>, colourise<N>   real footage with a hidden truth (bench/tasks.py), trained at NxN
PATH        a dataset folder: trainX, trainY, perhaps trainZ and trainS; testX or valX, with or without a truth

The synthetic ones are drawn anew for each seed of a run: one dataset for each seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tasks

from rlv2v.data.index import LAYOUT, index_folder, open_dataset, source_paths
from rlv2v.data.synth import Reading, write_dataset
from rlv2v.errors import UserError, one_line
from rlv2v.files import PARTIAL
from rlv2v.metrics.evaluation import Split

Synthetic = Literal["synth", "cue"]
KINDS = (*get_args(Synthetic), *tasks.TASKS)
NAMED = re.compile(rf"({'|'.join(KINDS)})(\d+)")
FEW_SEED = 20241028
"""Of the order in which target clips are taken; the same for every run, so that subsets are nested."""


@dataclass(frozen=True)
class Case:
    """Hold what is trained and measured on: a kind of dataset, or a folder of the user's."""

    name: str
    """In rows and folders."""
    kind: str
    """A name above without its N, or `folder`."""
    size: int
    """Side of the training crops, pixels."""
    frames: int
    reading: Reading = "ours"
    stored: int = 0
    """Short side of the real footage as it is stored; 0: `size`."""
    folder: Path = Path()

    @property
    def is_synthetic(self) -> bool:
        """Whether every seed has a dataset of its own."""
        return self.kind in get_args(Synthetic)

    @property
    def augment(self) -> str:
        """The augmentation of every method on it."""
        return "dihedral" if self.kind == "synth" else "flip"  # the shapes of synth have no up and down

    @property
    def starts_together(self) -> bool:
        """Whether a user would say of its clips that time in the clip matters (`--chrono`)."""
        return self.kind in ("synth", "graded")

    def data(self, out: Path, seed: int) -> Path:
        """Return the dataset folder for a run's seed, made in `out` if it is not there."""
        if self.kind == "folder":
            return self.folder
        data = out / "-".join(["data", self.name, str(self.frames), *([f"seed{seed}"] if self.is_synthetic else [])])
        if self.stored:
            data = data.with_name(f"{data.name}-stored{self.stored}")
        if not data.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            if self.is_synthetic:
                switch: Literal["half", "crossing"] = "crossing" if self.kind == "cue" else "half"
                reading, size, frames = self.reading, self.size, self.frames
                write_dataset(data, size=size, frames=frames, seed=seed, reading=reading, switch=switch)
            else:
                task = next(name for name in tasks.TASKS if name == self.kind)
                tasks.main(tasks.Args(task, data, frames=self.frames, size=self.stored or self.size))
        return data


def make_case(
    case: str, *, frames: int, reading: Reading = "ours", size: int | None = None, stored: int | None = None
) -> Case:
    """Return the case that a flag names.

    Raises:
        UserError: no such case; a flag that it has no use for.
    """
    named = NAMED.fullmatch(case)
    if named and size is not None:
        raise UserError(f"--size: expected none, as {case} has it in its name, got {size}")
    if not named and not Path(case).is_dir():
        expected = ", ".join(f"{kind}<N>" for kind in KINDS)
        raise UserError(f"--case: expected {expected} or a dataset folder, got {one_line(case)}")
    kind = named[1] if named else "folder"
    if reading != "ours" and kind not in get_args(Synthetic):
        raise UserError(f"--reading {reading}: expected a synthetic case, got --case {one_line(case)}")
    if stored is not None and kind not in tasks.TASKS:
        raise UserError(f"--stored: expected a case of real footage, got --case {one_line(case)}")
    if named:
        name = case if reading == "ours" else f"{case}-{reading}"
        return Case(name, kind, int(named[2]), frames, reading, stored or 0)
    folder = Path(case).resolve()
    return Case(folder.name, kind, 64 if size is None else size, frames, folder=folder)


def pick_split(data: Path, split: Split) -> Split:
    """Return the split to measure on: `val` where the dataset has no test set.

    Raises:
        UserError: it has neither.
    """

    def has(name: str) -> bool:
        return any((data / f"{name}{letter}").is_dir() for letter in "XA")

    if has(split):
        return split
    if split == "test" and has("val"):
        return "val"
    raise UserError(
        f"{data}: expected a folder {split}X{' or valX' * (split == 'test')} with source videos, found none"
    )


def has_truth(data: Path, split: Split) -> bool:
    """Return whether the truth of a split is known."""
    return (data / f"{split}Truth").is_dir()


def digest(data: Path, frames: int) -> str:
    """Return a hash of the content of every set, held-out ones included; see `rlv2v.data.index` for the errors."""
    rows = [open_dataset(data, frames=frames).fingerprint]
    for folder in sorted(
        data / f"{split}{name}" for split in ("val", "test") for name in ("X", "A", "Truth", "Y", "B")
    ):
        if folder.is_dir():
            rows.append(folder.name)
            rows += [f"{source.path.name} {source.hash}" for source in index_folder(folder, frames=1)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def target_order(data: Path) -> list[Path]:
    """Return the clips of Y and Z in the order in which few-shot subsets take them; the first is one of Y.

    The order depends on the clips' number alone, so each subset holds the smaller ones, whatever the run's seed is.
    """
    folders = [next((data / name for name in LAYOUT[key] if (data / name).is_dir()), None) for key in "yz"]
    y, z = (source_paths(folder) if folder else [] for folder in folders)
    clips = y + z
    order = [int(index) for index in np.random.default_rng(FEW_SEED).permutation(len(clips))]
    first = next((index for index in order if index < len(y)), None)
    if first is None:
        raise UserError(f"{data}: expected target videos in trainY, found none")
    return [clips[index] for index in [first, *(index for index in order if index != first)]]


def few_shot(data: Path, num: int, out: Path) -> Path:
    """Return a dataset folder with `num` clips of Y and Z together, made of links beside `out`'s datasets.

    Everything else is the dataset's own: X, S and what is held out.

    Raises:
        UserError: there are fewer clips, or the folder is there and of other clips.
    """
    order = target_order(data)
    if not 1 <= num <= len(order):
        raise UserError(f"--few: expected 1 to {len(order)} target clips of {one_line(data.name)}, got {num}")
    subset = out / f"{data.name if data.parent == out else f'data-{data.name}'}-few{num}"
    if subset.exists():
        links = {path.resolve() for path in subset.glob("train[YBZ]/*") if path.is_symlink()}
        if links != {clip.resolve() for clip in order[:num]}:
            raise UserError(f"{one_line(subset)}: of other clips than {one_line(data)} has; choose another --out")
        return subset
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{PARTIAL}{subset.name}-") as folder:
        partial = Path(folder) / "set"
        partial.mkdir()
        targets = {name for key in "yz" for name in LAYOUT[key]}
        for path in data.iterdir():
            if path.name not in targets and not path.name.startswith("."):
                (partial / path.name).symlink_to(path.resolve())
        for clip in order[:num]:
            loose = clip.parent == data  # images that are one clip together
            name = clip.name if loose else clip.parent.name
            (partial / name).mkdir(exist_ok=True)
            (partial / name / clip.name).symlink_to(clip.resolve())
        about = {"source": os.path.relpath(data, out), "few": num, "seed": FEW_SEED}
        (partial / "few.json").write_text(json.dumps(about, indent=2) + "\n")
        partial.rename(subset)
    return subset
