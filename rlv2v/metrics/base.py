"""The registry of metrics, and what a metric looks at.

A metric is two functions: `measure` looks at one frame, `reduce` makes one number of all frames of a clip. So a clip of
any length is measured while it streams by, and the values of the frames are the metric's curve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np

from rlv2v.metrics.flow import Flow, backward_flow

Need = Literal["truth", "synthetic", "target", "training", "cycle", "fid", "fvd", "lpips"]
Kind = Literal["target", "training"]
Better = Literal["higher", "lower", "one"]
Value = float | np.ndarray
FOREGROUND_LEVEL = 0.2
FVD_FRAMES = 16  # that are measured together
MAX_SAMPLED = 64  # frames of a clip, about, that are compared with sets of images


@dataclass
class Scene:
    """Hold what all rows share of one frame: the source x, its hidden truth y where there is one, and its flow.

    source, truth: uint8 (H,W,3).  previous: the scene of the frame before, None for a clip's first frame.
    """

    source: np.ndarray
    truth: np.ndarray | None = None
    previous: Scene | None = field(default=None, repr=False)
    _memory: dict[str, Any] = field(default_factory=dict, repr=False)

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gives, computed once a scene: what a metric needs of the truth for every row."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    @cached_property
    def edges(self) -> np.ndarray:
        """Magnitude of the source's gradient, see `gradient`."""
        return gradient(self.source)

    @cached_property
    def small(self) -> np.ndarray:
        """The source at about a quarter of its size, area-averaged."""
        return quarter(self.source)

    @cached_property
    def flow(self) -> Flow | None:
        """Flow of the source to the frame before; None for the first frame."""
        return None if self.previous is None else backward_flow(self.source, self.previous.source)

    @cached_property
    def true_change(self) -> np.ndarray | None:
        """The change y[t] - y[t-1] of the truth, int16 (H,W,3); None for the first frame, or without a truth."""
        if self.previous is None or self.truth is None or self.previous.truth is None:
            return None
        change: np.ndarray = cv2.subtract(self.truth, self.previous.truth, dtype=cv2.CV_16S)
        return change

    @cached_property
    def warping_error(self) -> float | None:
        """The source's own warping error, see `warping_error`."""
        return None if self.previous is None else warping_error(self.source, self.previous.source, self.flow)

    @cached_property
    def foreground(self) -> np.ndarray:
        """The true objects F, bool (H,W): the synthetic set's X is black behind them."""
        return np.asarray(self.source.max(axis=-1) > FOREGROUND_LEVEL * 255)


@dataclass
class Frame:
    """Hold one frame of a row: the output o, uint8 (H,W,3), in its scene.

    index: number in its clip; it addresses the random draws.  previous: the frame before, None for a clip's first.
    cycled: the output translated back to the source's domain, None where nothing does that.  recent: the last frames
    up to this one, for metrics that look at several at once.  networks: those that the user gave, by metric.
    """

    image: np.ndarray
    scene: Scene
    index: int = 0
    previous: Frame | None = field(default=None, repr=False)
    cycled: np.ndarray | None = None
    recent: Sequence[np.ndarray] = ()
    networks: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def edges(self) -> np.ndarray:
        """Magnitude of the output's gradient, see `gradient`."""
        return self.scene.edges if self.image is self.scene.source else gradient(self.image)

    @cached_property
    def small(self) -> np.ndarray:
        """The output at about a quarter of its size, area-averaged."""
        return self.scene.small if self.image is self.scene.source else quarter(self.image)

    @property
    def detail(self) -> float | None:
        """Fine over coarse detail, mean |grad o| / mean |grad o4|, o4 at a quarter of the size; None if it is flat."""
        return relative_detail(self.edges, self.small)

    @cached_property
    def change(self) -> float | None:
        """Mean |o[t] - o[t-1]| in [0,1]; None for the first frame."""
        return None if self.previous is None else distance(self.image, self.previous.image)

    @cached_property
    def warping_error(self) -> float | None:
        """The output's warping error along the source's flow, see `warping_error`; None for the first frame."""
        if self.previous is None:
            return None
        if self.image is self.scene.source:
            return self.scene.warping_error
        return warping_error(self.image, self.previous.image, self.scene.flow)


Measure = Callable[[Frame], Value | None]
Reduce = Callable[[np.ndarray, np.ndarray], float | None]


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its key in a row of results, how to read it, and the functions that compute it."""

    name: str
    better: Better
    """one: 1 is best, and a value is the worse the farther it is from 1, as a ratio."""
    meaning: str
    """What it measures, and when a copy of the source or a constant clip does well by it."""
    formula: str
    source: str
    """Where it is from; "ours" where nobody else defined it."""
    needs: frozenset[Need]
    digits: int
    """Decimals in tables."""
    measure: Measure
    """Return the value of one frame; None where the frame has none."""
    reduce: Reduce
    """Return the value of a clip, from its frames' values (N,...) and the reference set's, empty where none is used."""
    pooled: bool = False
    """Whether all clips together give one number, as clips are too few samples alone."""

    def format(self, value: float | None) -> str:
        """Return a value for people, "-" for None."""
        return "-" if value is None else f"{value:.{self.digits}f}"

    @property
    def reference(self) -> Kind | None:
        """The set of images that clips are compared with."""
        return "training" if "training" in self.needs else "target" if "target" in self.needs else None

    @property
    def sampled(self) -> bool:
        """Whether some frames of a long clip are enough, as every one says much; the networks of users see them all."""
        return self.reference is not None and self.needs.isdisjoint({"fid", "fvd"})

    def badness(self, value: float) -> float:
        """Return a number that orders values: the lower, the better."""
        if self.better == "one":
            return abs(float(np.log(max(value, 1e-9))))
        return value if self.better == "lower" else -value


METRICS: dict[str, Metric] = {}


def mean(values: np.ndarray, _reference: np.ndarray) -> float | None:
    """Return the mean over the frames that have a value."""
    return float(values.mean()) if len(values) else None


def metric(
    better: Better,
    meaning: str,
    *,
    formula: str,
    source: str = "ours",
    needs: Sequence[Need] = (),
    digits: int = 4,
    reduce: Reduce = mean,
    pooled: bool = False,
) -> Callable[[Measure], Measure]:
    """Enter the decorated function, which measures a frame, in METRICS under its own name."""

    def enter(measure: Measure) -> Measure:
        name = measure.__name__
        METRICS[name] = Metric(
            name, better, meaning, formula, source, frozenset(needs), digits, measure, reduce, pooled
        )
        return measure

    return enter


Values = dict[str, np.ndarray]
"""Of each metric the values of a clip's frames, (N,...); frames without a value are left out."""


class ClipMeter:
    """Measure a clip of one row, frame by frame, with one earlier frame in memory.

    Args:
        known: what a metric may need and this clip has.
        networks: by metric, see `rlv2v.metrics.learned`.
    """

    def __init__(self, known: set[Need], networks: Mapping[str, Any] | None = None) -> None:
        self.networks = networks or {}
        self._recent: deque[np.ndarray] = deque(maxlen=FVD_FRAMES if "fvd" in self.networks else 1)
        self.metrics = [metric for metric in METRICS.values() if metric.needs <= known]
        self._values: dict[str, list[Value]] = {metric.name: [] for metric in self.metrics}
        self._indices: dict[str, list[int]] = {metric.name: [] for metric in self.metrics}
        self._frame: Frame | None = None
        self._stride = 1
        self.num_frames = 0

    def add(self, image: np.ndarray, scene: Scene, cycled: np.ndarray | None = None) -> None:
        """Measure the next frame, uint8 (H,W,3) of the scene's size.

        Raises:
            ValueError: another shape or type.
        """
        for name, picture in {"output": image, "truth": scene.truth, "cycled": cycled}.items():
            if picture is not None and (picture.shape != scene.source.shape or picture.dtype != np.uint8):
                raise ValueError(
                    f"metrics: {name} must be uint8 {scene.source.shape}, got {picture.dtype} {picture.shape}"
                )
        self._recent.append(image)
        recent = tuple(self._recent)
        frame = Frame(image, scene, self.num_frames, self._frame, cycled, recent, self.networks)
        sampled = frame.index % self._stride == 0
        for metric in self.metrics:
            if sampled or not metric.sampled:
                value = metric.measure(frame)
                if value is not None:
                    self._values[metric.name].append(value)
                    self._indices[metric.name].append(frame.index)
        frame.previous = None
        self._frame = frame
        self.num_frames += 1
        if self.num_frames == 2 * MAX_SAMPLED * self._stride:  # twice as many as wanted: every other one goes
            self._stride *= 2
            for metric in self.metrics:
                if metric.sampled:
                    del self._values[metric.name][1::2], self._indices[metric.name][1::2]

    @property
    def values(self) -> Values:
        """The values so far."""
        return {name: np.asarray(values) for name, values in self._values.items()}

    def curves(self) -> dict[str, list[float | None]]:
        """Return the values of every metric that has a number a frame, None for the frames without."""
        curves = {}
        for name, values in self._values.items():
            if values and np.ndim(values[0]) == 0:
                curve: list[float | None] = [None] * self.num_frames
                for index, value in zip(self._indices[name], values, strict=True):
                    curve[index] = float(value)
                curves[name] = curve
        return curves


def reduce_values(values: Values, references: Mapping[Kind, Values]) -> dict[str, float | None]:
    """Return a clip's value of every metric in the registry, None for those that it lacks something for.

    A pooled metric is None, since one clip is too few samples of it.

    references: the values of the target set and of the training set, by the names in `Metric.reference`.
    """
    row: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        own = values.get(name, np.empty(0))
        other = references.get(metric.reference, {}).get(name, np.empty(0)) if metric.reference else np.empty(0)
        enough = not metric.pooled and len(own) and (metric.reference is None or len(other))
        row[name] = metric.reduce(own, other) if enough else None
    return row


def gradient(image: np.ndarray) -> np.ndarray:
    """Return the magnitude of the luma's gradient by the Sobel operator, float32 (H,W)."""
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    edges: np.ndarray = cv2.magnitude(cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1))
    return edges


def relative_detail(edges: np.ndarray, small: np.ndarray) -> float | None:
    """Return the mean gradient of a picture over that of its `quarter`; None where either is flat."""
    fine, coarse = cv2.mean(edges)[0], cv2.mean(gradient(small))[0]
    return fine / coarse if fine and coarse else None


def quarter(image: np.ndarray) -> np.ndarray:
    """Return an image at a quarter of its size; at a third or half where less than 14 pixels would be left."""
    factor = max(2, min(4, min(image.shape[:2]) // 14))
    height, width = (max(1, round(side / factor)) for side in image.shape[:2])
    small: np.ndarray = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return small


def warping_error(image: np.ndarray, previous: np.ndarray, flow: Flow | None) -> float | None:
    """Return mean (o[t] - warp(o[t-1]))^2 in [0,1] where the flow can be trusted; None where it nowhere can."""
    if flow is None or not flow.num_visible:
        return None
    error = cv2.norm(image, flow.warp(previous), cv2.NORM_L2SQR, flow.visible)
    return float(error) / (flow.num_visible * 3 * 255**2)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return mean |a - b| of two uint8 images, in units of [0,1]."""
    return float(cv2.norm(a, b, cv2.NORM_L1)) / (a.size * 255)
