"""What changes during a run, by its progress: the learning rate falls, and the terms that hold to the source rise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config

START = 0.1  # share of the contrast and mask weights at the start
RAMP = 0.2  # progress over which the ramp goes from 0 to 1


class Schedule:
    """The state of a run's schedule; a checkpoint holds it.

    Full contrast and mask weights from the first step on hold the translation at a copy of its source, so they rise
    along a ramp. It opens the generators' copy mask as well: a mask that is open from the first step on copies
    everything, and what it copies gets no gradient. `ramp` is float32 () on the device, filled in place: a recording of
    a step reads it.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config, self.step, self.seconds = config, 0, 0.0
        self.ramp = torch.zeros((), device=device)

    @property
    def length(self) -> tuple[str, float]:
        """The length of the run: ("step", number) or ("s", seconds)."""
        return self.config.length

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1."""
        unit, length = self.length
        done = self.step if unit == "step" else self.seconds
        return min(1.0, done / length) if length else 1.0

    @property
    def lr_factor(self) -> float:
        """Factor on every learning rate: 1 in the first half of the run, then linearly to 0."""
        return min(1.0, 2.0 * (1.0 - self.progress))

    @property
    def gain(self) -> Tensor:
        """Factor on the terms that are ramped: from `START` to 1."""
        return START + (1.0 - START) * self.ramp

    def advance(self, seconds: float) -> None:
        """Count one step that ended `seconds` into the run."""
        self.step, self.seconds = self.step + 1, seconds
        self.ramp.fill_(min(1.0, self.progress / RAMP))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the config."""
        return {"step": self.step, "seconds": self.seconds, "ramp": self.ramp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`. Raises ValueError for one of other parts, as another version writes."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"expected {', '.join(self.state_dict())}, got {', '.join(state)}")
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.ramp.copy_(state["ramp"])
