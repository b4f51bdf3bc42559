"""The plumbing of a run: its folder, its data, its samples, and how it is interrupted."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np

from rlv2v.checkpoint import write_atomically
from rlv2v.config import Config
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.pipeline import evaluation_clips
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError
from rlv2v.lock import Lock, lock_folder
from rlv2v.model import Translator
from rlv2v.resume import resumed_config
from rlv2v.store import Checkpoints
from rlv2v.translate import translate_clip

Samples = list[tuple[np.ndarray, list[np.ndarray]]]
NUM_SAMPLES = 3  # clips in a strip
log = logging.getLogger(__name__)


def prepare_folder(config: Config) -> Config:
    """Make the run's folder, or check that it is one to resume; returns the config with its data folder settled.

    Nothing that exists is overwritten: a folder that holds a run needs --resume.
    """
    if config.resume:
        before = resumed_config(config)
        config = config if config.data else replace(config, data=before.data)
    elif config.out.is_dir():
        refuse_taken(config.out)
    elif config.out.exists():
        raise UserError(f"{config.out}: expected a folder for the run, got a file; choose another --out")
    if config.data is None:
        config = replace(config, data=Path("data") / f"synth-{config.size}x{config.frames}")
        assert config.data is not None
        if not (config.data / "dataset.json").exists():
            log.warning("no --data: writing the synthetic set to %s", config.data)
            write_dataset(config.data, size=config.size, frames=config.frames)
    return config


def claim_folder(config: Config) -> Lock:
    """Make the run's folder this process's own and write `config.json`; from then on it can be resumed.

    Returns the lock, to be held as long as the run.

    Raises:
        UserError: another run is at work in it, or has left a checkpoint there meanwhile; it cannot be written.
    """
    try:
        for folder in (config.out, config.out / "samples", config.out / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(config.out)
        if not config.resume:
            refuse_taken(config.out)
        write_atomically(config.out / "config.json", config.to_json().encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or config.out}: expected a folder that a run can be written to, got "
            f"{str(error.strerror).lower()}; choose another --out"
        ) from None
    return lock


def refuse_taken(out: Path) -> None:
    """Raise UserError if a folder holds a checkpoint: nothing that exists is overwritten."""
    if Checkpoints(out, keep=1, num_replicas=1).steps:
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")


def open_data(config: Config) -> Dataset:
    """The dataset of a config, with what could not be used warned about by name."""
    assert config.data is not None
    if not config.data.is_dir():
        raise UserError(f"{config.data}: expected a folder with trainX and trainY, found no such folder; see --data")
    return open_dataset(config.data, frames=config.frames)


def pick_samples(config: Config) -> Samples:
    """A few clips to look at while training: (source, [truth] or []), of valX, or of trainX where there is none."""
    assert config.data is not None

    def clips(name: str) -> list[tuple[str, np.ndarray]]:
        found = evaluation_clips(config.data / name, frames=config.frames, size=config.size)  # type: ignore[operator]
        return list(itertools.islice(found, NUM_SAMPLES))

    names = [name for name in ("valX", "trainX", "trainA") if (config.data / name).is_dir()]
    truths = dict(clips("valTruth")) if names[0] == "valX" and (config.data / "valTruth").is_dir() else {}
    return [(clip, [truths[name]] if name in truths else []) for name, clip in clips(names[0])]


def look(g: Translator, config: Config, samples: Samples) -> tuple[list[np.ndarray], float | None]:
    """The rows of a strip (each source, its translation, its truth), and the mean absolute error in 0..1.

    None: there is no truth to tell it by.
    """
    rows, errors = [], []
    g.eval()
    for source, truths in samples:
        translated = translate_clip(g, config, source)
        rows += [source, translated, *truths]
        errors += [np.abs(translated.astype(np.float32) - truth).mean() / 255 for truth in truths]
    g.train()
    return rows, float(np.mean(errors)) if errors else None


class Interrupt:
    """Ctrl-C or SIGTERM asks the run to end after its step (`by` names the signal); a second one ends it at once.

    At once is as safe as a kill: what is on the disk is whole at every moment.
    """

    def __init__(self) -> None:
        self.by = ""

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _: FrameType | None) -> None:
        if self.by:
            os._exit(128 + number)
        self.by = signal.Signals(number).name
