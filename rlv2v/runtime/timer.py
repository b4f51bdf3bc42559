"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "replay", "critics", "generators", "discriminators", "all_reduce", "optimiser", "host", "checkpoint")


class StepTimer:
    """Splits the time of steps: each `mark(part)` books what has passed since the last mark.

    On the CPU by the wall clock. On a GPU by events in its stream, read only by `read`, so that nothing waits for it:
    a part is then the time until the GPU had done it. Parts: waiting for clips, the replay buffer with its new
    transitions, forward and backward of the three phases, what of the all-reduce was not hidden behind them, clipping
    and optimiser, the host's reading of what a step said and its log, and what a checkpoint held the loop up.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._steps = 0
        self._last = time.perf_counter()
        self.mark("")

    def mark(self, part: str) -> None:
        """Book the time since the last mark as `part`; "" books it nowhere."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
            return
        now = time.perf_counter()
        self._spent[part] = self._spent.get(part, 0.0) + now - self._last
        self._last = now

    def step(self) -> None:
        """One more step is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Seconds a step of each part since the last call, as `time_<part>`; waits for a GPU."""
        if self._cuda:
            self._marks[-1][1].synchronize()
            for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
                self._spent[part] = self._spent.get(part, 0.0) + before.elapsed_time(after) / 1e3
            self._marks = self._marks[-1:]
        steps = max(1, self._steps)
        spent, self._spent, self._steps = self._spent, {}, 0
        return {f"time_{part}": spent.get(part, 0.0) / steps for part in PARTS}
