"""The entry of a metric in the registry, and what a metric looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

FOREGROUND_LEVEL = 0.2
Needs = frozenset[Literal["truth", "synthetic"]]


@dataclass(frozen=True)
class ClipTriple:
    """Hold a translated clip, its source and its hidden truth: float32 (T,H,W,3) in [0,1], all of one shape."""

    output: np.ndarray
    source: np.ndarray
    truth: np.ndarray

    @cached_property
    def foreground(self) -> np.ndarray:
        """The true objects, bool (T,H,W): the synthetic set's X is black behind them."""
        return np.asarray(self.source.max(axis=-1) > FOREGROUND_LEVEL)


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its key in a row of results, how to read it, and the function that computes it."""

    name: str
    better: Literal["higher", "lower"]
    meaning: str
    """What it measures, and when a copy of the source or a constant clip does well by it."""
    compute: Callable[[ClipTriple], float | None]
    """Returns the value for one clip, or None where the clip has none."""
    needs: Needs = frozenset({"truth"})
    """Where it can be computed: with a truth, and perhaps on the synthetic set alone; the value is None elsewhere."""
    digits: int = 4
    """Decimals in tables."""

    def format(self, value: float | None) -> str:
        """Return a value for people, "-" for None."""
        return "-" if value is None else f"{value:.{self.digits}f}"
