"""What changes during a run: the learning rate follows progress, the content terms follow what has been learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlv2v.method.clips import Gains

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config

START = 0.1  # share of the contrast and mask weights before the ramp
RAMP = 0.2  # progress over which the ramp goes from 0 to 1
SMOOTH = 0.9  # of the average of the gap
COUNTS, TENSORS = ("step", "seconds", "num_measured"), ("gap", "whole_gap", "floor", "ramp")


class Schedule:
    """The state of a run's schedule; a checkpoint holds it.

    Full contrast and mask weights from the first step on hold the translation at a copy of its source, and a ramp at a
    fixed step comes too early or too late on another set or size. So the ramp rises while the translated clips are
    near the target domain: their distance to it (`domain_gap`, less `gap_floor`) is below `config.loss.ramp_at` of the
    distance between the domains. Else it falls: content terms that pull the clips back to the source loosen by
    themselves. The same ramp opens the generators' copy mask: a mask that is open from the first step on copies
    everything, and what it copies gets no gradient.

    Measurements are float32 () on the device, never read by the host: `gap` of the translations, `whole_gap` of the
    two domains, `floor` within the target domain, and `ramp`.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config, self.step, self.seconds, self.num_measured = config, 0, 0.0, 0
        self.gap, self.whole_gap, self.floor, self.ramp = (torch.zeros((), device=device) for _ in TENSORS)

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
    def gains(self) -> Gains:
        """Factors along the ramp: adversarial terms fall to `adversarial_end`, content terms rise to 1."""
        return Gains(1.0 + (self.config.loss.adversarial_end - 1.0) * self.ramp, START + (1.0 - START) * self.ramp)

    @property
    def remaining_gap(self) -> Tensor:
        """Distance of the translations to the target domain: 1 as far as the source, 0 when they have arrived."""
        return (self.gap - self.floor) / (self.whole_gap - self.floor).clamp(min=1e-9)

    def measure(self, whole_gap: Tensor, floor: Tensor) -> None:
        """Average in one batch's distance between the domains, and within the target domain (`gap_floor`)."""
        self.num_measured += 1
        self.whole_gap += (whole_gap - self.whole_gap) / self.num_measured
        self.floor += (floor - self.floor) / self.num_measured

    def advance(self, seconds: float, gap: Tensor) -> None:
        """Count one step that ended `seconds` into the run, with the translations' distance to the target domain."""
        self.gap += (1.0 - SMOOTH if self.step else 1.0) * (gap - self.gap)
        old_progress = self.progress
        self.step, self.seconds = self.step + 1, seconds
        change = (self.progress - old_progress) / RAMP
        is_near = (self.remaining_gap < self.config.loss.ramp_at).float()
        self.ramp.copy_((self.ramp + change * (2.0 * is_near - 1.0)).clamp(0.0, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the config."""
        return {name: getattr(self, name) for name in (*COUNTS, *TENSORS)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.num_measured = int(state["num_measured"])
        for name in TENSORS:
            getattr(self, name).copy_(state[name])
