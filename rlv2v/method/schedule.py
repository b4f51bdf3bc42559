"""What changes while a run goes on: the learning rate by progress, the content terms by what has been learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method.clips import Gains

START = 0.1  # share of the contrast and mask weights before the ramp
RAMP = 0.2  # progress over which the ramp goes from 0 to 1
SMOOTH = 0.9  # of the average of the gap
MEASURED = ("gap", "whole_gap", "floor", "ramp")


class Schedule:
    """The state of a run's schedule; a checkpoint holds it.

    Full contrast and mask weights from the first step hold the translation at a copy of its source, and a ramp at a
    fixed step comes too early or too late on another set or size. So the ramp rises while the translated clips are
    near the target domain: their distance to it (`domain_gap`, less what two samples of one domain differ by) below
    `config.loss.ramp_at` of the distance between the two domains. It falls while they are not: content terms that
    pull them
    back to the source loosen by themselves. The same ramp opens the generators' copy mask: open from the first step
    on, it copies all, and what it copies takes no gradient.

    What is measured lives on the device and is never read by the host: `gap`, `whole_gap`, `floor`, `ramp`, float32 ().
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        self.config, self.step, self.seconds, self.num_measured = config, 0, 0.0, 0
        self.gap, self.whole_gap, self.floor, self.ramp = (torch.zeros((), device=device) for _ in MEASURED)

    @property
    def progress(self) -> float:
        """Share of the run that is behind, 0..1."""
        unit, whole = self.config.length
        done = self.step if unit == "step" else self.seconds
        return min(1.0, done / whole) if whole else 1.0

    @property
    def learning(self) -> float:
        """Factor on every learning rate: 1 in the first half, then linearly to 0."""
        return min(1.0, 2.0 * (1.0 - self.progress))

    @property
    def gains(self) -> Gains:
        """Adversarial terms fall to `adversarial_end` and content terms rise to 1 along the ramp."""
        return Gains(1.0 + (self.config.loss.adversarial_end - 1.0) * self.ramp, START + (1.0 - START) * self.ramp)

    @property
    def remaining_gap(self) -> Tensor:
        """How far the translations still are from the target domain: 1 where the source is, 0 when they are there."""
        return (self.gap - self.floor) / (self.whole_gap - self.floor).clamp(min=1e-9)

    def measure(self, whole_gap: Tensor, floor: Tensor) -> None:
        """One batch's distance between the domains, and within the target domain (`gap_floor`); they are averaged."""
        self.num_measured += 1
        self.whole_gap += (whole_gap - self.whole_gap) / self.num_measured
        self.floor += (floor - self.floor) / self.num_measured

    def advance(self, seconds: float, gap: Tensor) -> None:
        """Count one step that ended `seconds` into the run, with the translations' distance to the target domain."""
        self.gap += (1.0 - SMOOTH if self.step else 1.0) * (gap - self.gap)
        before = self.progress
        self.step, self.seconds = self.step + 1, seconds
        change = (self.progress - before) / RAMP
        near = (self.remaining_gap < self.config.loss.ramp_at).float()
        self.ramp.copy_((self.ramp + change * (2.0 * near - 1.0)).clamp(0.0, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the config."""
        counted = {name: getattr(self, name) for name in ("step", "seconds", "num_measured")}
        return counted | {name: getattr(self, name) for name in MEASURED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.num_measured = int(state["num_measured"])
        for name in MEASURED:
            getattr(self, name).copy_(state[name])
