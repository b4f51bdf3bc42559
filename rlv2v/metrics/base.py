"""The registry of metrics, and what a metric looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

FOREGROUND_LEVEL = 0.2
Needs = frozenset[Literal["truth", "synthetic"]]
TRUTH: Needs = frozenset({"truth"})
SYNTHETIC: Needs = frozenset({"truth", "synthetic"})  # whose background and objects are known


@dataclass(frozen=True)
class ClipTriple:
    """Hold a translated clip o, its source and its hidden truth y: float32 (T,H,W,3) in [0,1], all of one shape."""

    output: np.ndarray
    source: np.ndarray
    truth: np.ndarray

    @cached_property
    def foreground(self) -> np.ndarray:
        """The true objects F, bool (T,H,W): the synthetic set's X is black behind them."""
        return np.asarray(self.source.max(axis=-1) > FOREGROUND_LEVEL)


Compute = Callable[[ClipTriple], float | None]


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its key in a row of results, how to read it, and the function that computes it."""

    name: str
    better: Literal["higher", "lower"]
    meaning: str
    """What it measures, and when a copy of the source or a constant clip does well by it."""
    needs: Needs
    digits: int
    """Decimals in tables."""
    compute: Compute
    """Returns the value of one clip; None where the clip has none."""

    def format(self, value: float | None) -> str:
        """Return a value for people, "-" for None."""
        return "-" if value is None else f"{value:.{self.digits}f}"


METRICS: dict[str, Metric] = {}


def metric(
    better: Literal["higher", "lower"], meaning: str, *, needs: Needs = TRUTH, digits: int = 4
) -> Callable[[Compute], Compute]:
    """Enter the decorated function in METRICS under its own name."""

    def enter(compute: Compute) -> Compute:
        METRICS[compute.__name__] = Metric(compute.__name__, better, meaning, needs, digits, compute)
        return compute

    return enter
