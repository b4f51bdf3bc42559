"""What every method trains in the end: a network that translates frames, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlv2v.model.frames import State
from rlv2v.runtime.constants import constant


class Grids(NamedTuple):
    """What a `GridTranslator` decides for each frame: the parts of its grid, beside the identity."""

    whole: Tensor
    """The same at every place, (B,T,12,bins,1,1)."""
    local: Tensor
    """Deviations from it, (B,T,12,bins,h,w)."""
    around: Tensor
    """The luma around each place of the frame, for the guide, (B,T,K,h',w') in [-1,1]."""

    @property
    def grid(self) -> Tensor:
        """The coefficients (B,T,12,bins,h,w)."""
        return constant(identity, like=self.local) + self.whole + self.local


def identity(like: Tensor) -> Tensor:
    """Return the coefficients that change nothing, (12,1,1,1)."""
    return torch.eye(3, 4, dtype=like.dtype, device=like.device).reshape(12, 1, 1, 1)


class Details(NamedTuple):
    """What loss terms may look at beside a translation; None where a generator has no such thing."""

    mask: Tensor | None = None
    """The copy mask (B,T,1,H,W) of `Translator`."""
    grids: Grids | None = None
    """The grids of `GridTranslator`."""

    def first(self, num: int) -> Details:
        """Return those of the first `num` clips."""
        mask, grids = self
        return Details(None if mask is None else mask[:num], grids and Grids(*(part[:num] for part in grids)))


class Generator(nn.Module, ABC):
    """A network that translates: frames (B,T,3,H,W) in [-1,1] and a state -> as many frames, and the state after them.

    A state of None says that a video starts here. What a generator remembers from frame to frame is in its state alone,
    so a video may come in chunks.

    Attributes:
        multiple: the number of pixels that H and W must be multiples of.
        starts_as_copy: whether an untrained one returns its input, so that it needs no warm-up.
        any_size: whether it translates a frame at the frame's own size as well as at the size that it was trained at.
    """

    multiple: int = 1
    starts_as_copy: bool = False
    any_size: bool = False

    @abstractmethod
    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Translate frames from a state."""

    def limit_copying(self, gain: Tensor) -> None:
        """Scale by gain () in [0,1] how much of its input a generator may copy, if it has a part that does."""

    def limit_state(self, state: State, frames: int) -> State:
        """Return the state such that at most about the last `frames` frames weigh in it; by default as it is."""
        return state
