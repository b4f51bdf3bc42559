"""The entry of a method in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # the config reads the registry
    from rlv2v.config import Config
    from rlv2v.method.trainer import Footprint, Generators, Trainer


class Method(NamedTuple):
    """A method: what trains it, what it exports, what it holds in memory, and the settings that it brings.

    trainer: (config, device, rank, num_ranks) -> `rlv2v.method.trainer.Trainer`.
    generators: config -> the two generators of a run, untrained; a `model.safetensors` holds their state.
    footprint: config -> what a run holds in memory.
    settings: the ones that it changes in a preset, by their flags' names.
    min_frames: the least clip length that it can train on.
    """

    name: str
    meaning: str
    trainer: Callable[[Config, torch.device, int, int], Trainer]
    generators: Callable[[Config], Generators]
    footprint: Callable[[Config], Footprint]
    settings: Mapping[str, Any] = {}
    min_frames: int = 2
