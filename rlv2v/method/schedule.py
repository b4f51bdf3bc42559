"""What changes during a run, by its progress: the learning rate falls, and the terms that hold to the source rise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config

START = 0.1  # share of the contrast and mask weights at the start
RAMP = 0.2  # progress over which the ramp goes from 0 to 1
NEAR = 0.3  # share of the first distance to the target domain, below which the ramp rises
SMOOTH = 0.9  # of the average of the distance
TENSORS = ("ramp", "first", "distance")


class Schedule:
    """The state of a run's schedule; a checkpoint holds it.

    Full contrast and mask weights from the first step on hold the translation at a copy of its source, and a ramp at a
    fixed step or time comes too early on one set or machine and too late on another. So the ramp rises while the
    translations are near the target: while the distance of their patches, smoothed, is below `NEAR` of what it was at
    the first step, of the earlier run with `--from`. Else it falls: terms that pull the clips back to the source loosen
    by themselves. The ramp opens the generators' copy mask as well: a mask that is open from the first step on copies
    everything, and what it copies gets no gradient.

    `TENSORS` are float32 () on the device, filled in place and never read by the host; a recording of a step reads
    `ramp`.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config, self.step, self.seconds = config, 0, 0.0
        self.ramp, self.first, self.distance = (torch.zeros((), device=device) for _ in TENSORS)

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

    def advance(self, seconds: float, distance: Tensor | None = None) -> None:
        """Count one step that ended `seconds` into the run, with the distance of its translations to the target, ().

        Without a distance the ramp rises always.
        """
        before = self.progress
        self.step, self.seconds = self.step + 1, seconds
        rise: float | Tensor = 1.0
        if distance is not None:
            if self.step == 1:
                self.first.copy_(torch.where(self.first > 0, self.first, distance))  # or that of an earlier run
                self.distance.copy_(distance)
            self.distance.lerp_(distance.detach().to(self.distance.dtype), 1.0 - SMOOTH)
            rise = 2.0 * (self.distance < NEAR * self.first).float() - 1.0
        self.ramp.add_((self.progress - before) / RAMP * rise).clamp_(0.0, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the config."""
        return {name: getattr(self, name) for name in ("step", "seconds", *TENSORS)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`. Raises ValueError for one of other parts, as another version writes."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"expected {', '.join(self.state_dict())}, got {', '.join(state)}")
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        for name in TENSORS:
            getattr(self, name).copy_(state[name])
