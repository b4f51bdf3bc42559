"""What changes while a run goes on: the learning rate by progress, the content terms by what has been learned."""

from __future__ import annotations

from dataclasses import dataclass

from rlv2v.config import Config
from rlv2v.objective import Gains

START = 0.1  # share of the contrast and mask weights before the ramp
RAMP = 0.2  # progress over which the ramp goes from 0 to 1
LATEST = 0.6  # progress at which it starts at the latest
SMOOTH = 0.9  # of the average of the gap


@dataclass
class Schedule:
    """The state of a run's schedule; a checkpoint holds it.

    Full contrast and mask weights from the first step hold the translation at a copy of its source, and a ramp at a
    fixed step comes too early or too late on another set or size. So the ramp starts when the translated clips have
    come near the target domain: their distance to it (`domain_gap`) has fallen below `config.ramp_at` of the
    distance between the two domains. The same ramp opens the generators' copy mask: open from the first step on, it
    copies all, and what it copies takes no gradient.
    """

    config: Config
    step: int = 0
    seconds: float = 0.0
    gap: float = 0.0
    whole_gap: float = 1.0
    ramp: float = 0.0

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
        return Gains(1.0 + (self.config.adversarial_end - 1.0) * self.ramp, START + (1.0 - START) * self.ramp)

    @property
    def share(self) -> float:
        """How far the translations still are from the target domain: 1 where the source is, 0 when they are there."""
        return self.gap / max(self.whole_gap, 1e-9)

    def advance(self, seconds: float, gap: float) -> None:
        """Count one step that ended `seconds` into the run, with the translations' distance to the target domain.

        `whole_gap`, the distance between the domains, is set by the caller now and then: it does not change.
        """
        self.gap += (1.0 - SMOOTH if self.step else 1.0) * (gap - self.gap)
        before = self.progress
        self.step, self.seconds = self.step + 1, seconds
        if self.share < self.config.ramp_at or self.progress >= LATEST or self.ramp > 0:
            self.ramp = min(1.0, self.ramp + (self.progress - before) / RAMP)

    def state_dict(self) -> dict[str, float]:
        """Everything but the config."""
        return {name: getattr(self, name) for name in ("step", "seconds", "gap", "whole_gap", "ramp")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.step = int(self.step)
