"""What every method trains in the end: a network that translates frames, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from rlv2v.model.frames import State


class Details(NamedTuple):
    """What loss terms may look at beside a translation; None where a generator has no such thing."""

    mask: Tensor | None = None
    """The copy mask (B,T,1,H,W) of `Translator`."""
    whole: Tensor | None = None
    """The part of the grid that is the same everywhere, (B,T,12,bins,1,1), of `GridTranslator`."""
    local: Tensor | None = None
    """Deviations from it, (B,T,12,bins,h,w)."""

    def first(self, num: int) -> Details:
        """Return those of the first `num` clips."""
        return Details(*(None if part is None else part[:num] for part in self))


class Generator(nn.Module, ABC):
    """A network that translates: frames (B,T,3,H,W) in [-1,1] and a state -> as many frames, and the state after them.

    A state of None says that a video starts here. What a generator remembers from frame to frame is in its state alone,
    so a video may come in chunks.

    Attributes:
        multiple: the number of pixels that H and W must be multiples of.
        any_size: whether it translates a frame at the frame's own size as well as at the size that it was trained at.
    """

    multiple: int = 1
    any_size: bool = False

    @abstractmethod
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Translate frames from a state."""

    def limit_state(self, state: State, frames: int) -> State:
        """Return the state such that at most about the last `frames` frames weigh in it; by default as it is."""
        return state
