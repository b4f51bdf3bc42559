"""The time that each section of a training step takes."""

from __future__ import annotations

import time

import torch

SECTIONS = (
    "data", "replay", "critics", "generators", "discriminators", "all_reduce", "optimiser", "host", "checkpoint",
)  # fmt: skip


class StepTimer:
    """Split the time of steps: each `mark(section)` books the time since the last mark.

    On the CPU this is wall time. On a GPU it is the time between events in its stream, which only `read` waits for.
    The sections are: waiting for clips; the replay buffer and its new transitions; forward and backward of the three
    phases; the share of the all-reduce that they did not hide; clipping and optimiser; reading and logging a step's
    values; and the time that a checkpoint held the loop up.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._steps = 0
        self._last = time.perf_counter()
        self.mark("")

    def mark(self, section: str) -> None:
        """Book the time since the last mark to `section`; "" books it nowhere."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((section, event))
            return
        now = time.perf_counter()
        self._spent[section] = self._spent.get(section, 0.0) + now - self._last
        self._last = now

    def step(self) -> None:
        """Count a step that is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the seconds a step of each section since the last call, as `time_<section>`; waits for a GPU."""
        if self._cuda:
            self._events[-1][1].synchronize()
            for (_, start), (section, end) in zip(self._events, self._events[1:], strict=False):
                self._spent[section] = self._spent.get(section, 0.0) + start.elapsed_time(end) / 1e3
            self._events = self._events[-1:]
        steps = max(1, self._steps)
        spent, self._spent, self._steps = self._spent, {}, 0
        return {f"time_{section}": spent.get(section, 0.0) / steps for section in SECTIONS}
