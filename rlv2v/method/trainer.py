"""What training needs of a method, whichever it is: a `Trainer`, its two generators, and what its memory is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from rlv2v.method.optim import BookTime
from rlv2v.model.generator import Generator

if TYPE_CHECKING:  # the config reads the registry of methods, whose modules import this one
    from rlv2v.config import Config
    from rlv2v.data.index import Dataset
    from rlv2v.method.clips import Clips
    from rlv2v.method.schedule import Schedule
    from rlv2v.runtime.distributed import World

Logs = dict[str, Tensor]  # a number () each


class Generators(Protocol):
    """The two generators of a run: `g_y` translates X to Y, `g_x` back."""

    @property
    def g_x(self) -> Generator: ...

    @property
    def g_y(self) -> Generator: ...


class Trainer(Protocol):
    """What trains the networks of a run; `rlv2v.train` calls it, and knows no method.

    A step is a function of the state and the clips: its draws come from (seed, step) or (seed, step, replica), so that
    a resumed run goes on to the bit.
    """

    config: Config
    schedule: Schedule
    replicas: range
    """Which replicas of the batch are this rank's."""

    @property
    def nets(self) -> nn.Module:
        """All networks, each a child with a name; none may hold a NaN or an infinity."""

    @property
    def generators(self) -> Generators:
        """The networks that translate: what a checkpoint exports, and what its samples are made with."""

    @property
    def state_parts(self) -> Mapping[str, Any]:
        """The parts of the state that are the same on every rank, by name; each has a `state_dict`."""

    def replays(self) -> Mapping[int, Mapping[str, Any]]:
        """Return the parts of the state of each of this rank's replicas, by name; each has a `state_dict`."""

    def flush(self) -> None:
        """Bring the state up to date, before it is saved."""

    def pretrain(self, dataset: Dataset, world: World, stop: Callable[[], bool]) -> bool:
        """Do what comes before the first step of a new run; return False if `stop` asked for the end."""

    def step(self, clips: Clips, book_time: BookTime) -> Logs:
        """Run one step on this rank's clips; return its losses."""

    def advance(self, seconds: float) -> Logs:
        """End a step, `seconds` into the run; return more for the log."""


class Phase(NamedTuple):
    """One backward pass of a step, for the count of its memory.

    trained: the networks whose gradients it makes.  prepare: makes inputs of noise for `num_replicas` replicas, and
    returns what computes the loss, prepare(nets, config, num_replicas)() -> ().
    """

    trained: tuple[str, ...]
    prepare: Callable[[Any, Config, int], Callable[[], Tensor]]


class Footprint(NamedTuple):
    """What a run holds in memory: its networks, its phases, and the networks of which it holds copies, one a name."""

    nets: Callable[[], nn.Module]
    phases: Mapping[str, Phase]
    copies: tuple[str, ...] = ()
