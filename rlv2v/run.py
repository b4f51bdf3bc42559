"""The plumbing of a run: its folder, its data, what is restored on --resume, and how it is interrupted."""

from __future__ import annotations

import itertools
import logging
import math
import signal
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rlv2v.checkpoint import checkpoints, load_checkpoint, write_atomically
from rlv2v.config import FREE_ON_RESUME, Config
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.pipeline import evaluation_clips
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError

NUM_SAMPLES = 3  # clips in a strip
log = logging.getLogger(__name__)


def resumed_config(given: Config) -> Config:
    """Check the flags of a resumed run against its `config.json`: what shapes the run may not change."""
    path = given.out / "config.json"
    if not path.is_file():
        raise UserError(
            f"{given.out}: expected the folder of a run to resume, found no config.json; leave out --resume"
        )
    before = Config.from_json(path.read_text(), str(path))
    for field in fields(Config):
        was, now = getattr(before, field.name), getattr(given, field.name)
        if field.name not in FREE_ON_RESUME and was != now:
            flag = field.name.replace("_", "-")
            raise UserError(
                f"--{flag}: the run in {given.out} has {was!r}, got {now!r}; leave it out or start a new run"
            )
    return before


def prepare_folder(config: Config) -> Config:
    """Make the run's folder, or check that it is one to resume; returns the config with its data folder settled.

    Nothing that exists is overwritten: a folder that holds a run needs --resume.
    """
    if config.resume:
        before = resumed_config(config)
        config = config if config.data else replace(config, data=before.data)
    elif checkpoints(config.out):
        raise UserError(f"{config.out}: holds a run already; go on with it by --resume, or choose another --out")
    elif config.out.exists() and not config.out.is_dir():
        raise UserError(f"{config.out}: expected a folder for the run, got a file; choose another --out")
    if config.data is None:
        config = replace(config, data=Path("data") / f"synth-{config.size}x{config.frames}")
        assert config.data is not None
        if not (config.data / "dataset.json").exists():
            log.warning("no --data: writing the synthetic set to %s", config.data)
            write_dataset(config.data, size=config.size, frames=config.frames)
    return config


def claim_folder(config: Config) -> None:
    """Write `config.json` and make the folders of a run; it becomes one to resume with its first checkpoint."""
    for folder in (config.out, config.out / "samples", config.out / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / "config.json", config.to_json().encode())


def open_data(config: Config) -> Dataset:
    """The dataset of a config, with what could not be used warned about by name."""
    assert config.data is not None
    if not config.data.is_dir():
        raise UserError(f"{config.data}: expected a folder with trainX and trainY, found no such folder; see --data")
    return open_dataset(config.data, frames=config.frames)


def restore(state: Mapping[str, Any], config: Config, device: torch.device) -> None:
    """Load every part of a run from its newest checkpoint."""
    saved = load_checkpoint(config.out, device)
    if missing := state.keys() - saved.keys():
        raise UserError(
            f"{config.out}: the checkpoint lacks {sorted(missing)[0]!r}; it is of another set-up of the run"
        )
    for name, part in state.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{config.out}: the checkpoint's {name!r} does not fit this run: {first}") from None


def pick_samples(config: Config) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """A few clips to look at while training: (source, [truth] or []), of valX, or of trainX where there is none."""
    assert config.data is not None

    def clips(name: str) -> list[tuple[str, np.ndarray]]:
        found = evaluation_clips(config.data / name, frames=config.frames, size=config.size)  # type: ignore[operator]
        return list(itertools.islice(found, NUM_SAMPLES))

    names = [name for name in ("valX", "trainX", "trainA") if (config.data / name).is_dir()]
    truths = dict(clips("valTruth")) if names[0] == "valX" and (config.data / "valTruth").is_dir() else {}
    return [(clip, [truths[name]] if name in truths else []) for name, clip in clips(names[0])]


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, weights: list[Tensor], limit: float) -> Tensor:
    """One step down a loss; returns the norm of its gradient, which is clipped to `limit` (0: not)."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_grad_norm_([w for w in weights if w.grad is not None], limit or math.inf)
    optimiser.step()
    return norm


def finite(values: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The numbers of a step; a loss that is none stops the run by its name."""
    numbers = {name: value.item() for name, value in values.items()}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(
                f"loss {name!r} is {value} at step {step}: the run stops; the last checkpoint is whole. "
                f"Try a smaller --lr or --judge-lr"
            )
    return numbers


class Interrupt:
    """Ctrl-C or SIGTERM asks the loop to end after its step (`by` names the signal); a second one ends at once."""

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
            raise KeyboardInterrupt
        self.by = signal.Signals(number).name


def parameters(nets: torch.nn.Module, names: Iterable[str]) -> list[Tensor]:
    """The weights of the named networks."""
    return [p for name in names for p in getattr(nets, name).parameters()]
