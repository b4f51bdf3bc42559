"""`Algorithm` and its plain twin on the same clips and draws: step by step in one process, or each timed in its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from train_step_plain import Plain

from rlv2v.config import Config
from rlv2v.data import to_model
from rlv2v.data.synth import clip_of
from rlv2v.method.clips import Clips
from rlv2v.method.collector import Agent, ReplayRows
from rlv2v.method.rl import Transitions
from rlv2v.method.step import Algorithm


class Told(NamedTuple):
    """What one step of each said."""

    fast: dict[str, float]
    plain: dict[str, float]


class Timed(NamedTuple):
    """A step of ours: its seconds, and the stored transitions that it drew."""

    seconds: float
    ids: list[int]


def clips_at(config: Config, step: int, device: torch.device, dtype: torch.dtype) -> Clips:
    """The synthetic set's clips of a step, each seen once, as a loader gives them."""

    def clips(name: str, num: int) -> Tensor:
        drawn = [
            clip_of(name, step * num + n, seed=config.seed, frames=config.data.frames, size=config.data.size)[0]
            for n in range(num)
        ]
        return to_model(torch.from_numpy(np.stack(drawn))).to(device, dtype)

    sets = {
        "trainX": config.data.batch_x,
        "trainY": config.data.batch_y,
        "trainZ": config.data.batch_z,
        "trainS": config.data.batch_s,
    }
    return Clips(*(clips(name, num) for name, num in sets.items()))


def steps_of_round(config: Config) -> int:
    """In which each domain has a mini-batch."""
    return 2 * config.rl.every if config.rl.enabled else 1


class Pair:
    """`Algorithm` and `Plain`, one step of each in turn on the same clips and draws.

    dtype: of the networks and of all that they are given; float64 for tests.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.fast = Algorithm(config, device)
        for nets in (self.fast.nets, self.fast.targets, self.fast.average):
            nets.to(dtype)
        self.fast.start()
        self.ids: list[int] = []
        for agent in self.fast.agents.values():
            self.listen(agent)
        self.plain = Plain(self.fast)

    def listen(self, agent: Agent) -> None:
        """Hear which stored transitions an agent draws, for the twin; they and their rewards in the nets' dtype."""
        gather = agent.collect

        def heard(*given: Any) -> tuple[Transitions, ReplayRows]:
            batch, recall = gather(*given)
            self.ids = [number for _, ids in recall.drawn for number in ids.tolist()]
            return Transitions(*(f.to(self.dtype) if f.is_floating_point() else f for f in batch)), recall

        agent.collect = heard  # type: ignore[method-assign,assignment]

    def clips(self, step: int) -> Clips:
        return clips_at(self.config, step, self.device, self.dtype)

    def step(self) -> Told:
        """One step of each."""
        assert self.fast.schedule.step == self.plain.schedule.step
        clips = self.clips(self.fast.schedule.step)
        told = self.fast_step(clips)
        return Told({name: value.item() for name, value in told.items()}, self.plain_step(clips, self.ids))

    def fast_step(self, clips: Clips) -> dict[str, Tensor]:
        self.ids = []
        told = self.fast.step(clips)
        self.fast.advance(0.0, told["distance"])
        return told

    def plain_step(self, clips: Clips, ids: list[int]) -> dict[str, float]:
        told = self.plain.step(clips, ids)
        self.plain.advance(0.0, told["distance"])
        return told

    def timed(self, step: Callable[..., object], *given: object) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        step(*given)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


_held: list[Pair] = []


def hold(config: Config, device: torch.device, threads: int) -> None:
    """Of a process that times one form: make both, alike in every process; the other one is not used."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    _held[:] = [Pair(config, device)]


def time_fast(num: int) -> list[Timed]:
    """The next steps of ours."""
    (pair,) = _held
    found = []
    for _ in range(num):
        seconds = pair.timed(pair.fast_step, pair.clips(pair.fast.schedule.step))
        found.append(Timed(seconds, pair.ids))
    return found


def time_plain(ids: list[list[int]]) -> list[float]:
    """The next steps of the twin's, with what ours drew in each: their seconds."""
    (pair,) = _held
    return [pair.timed(pair.plain_step, pair.clips(pair.plain.schedule.step), drawn) for drawn in ids]
