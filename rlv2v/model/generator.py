"""What every method trains in the end: a network that translates frames, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from rlv2v.model.frames import State


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
