"""A batch of clips as the networks see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlv2v.data import to_model
from rlv2v.data.loader import Batch
from rlv2v.runtime.device import on_device


@dataclass(frozen=True)
class Clips:
    """A batch as the networks see it: x, y, z (B,T,3,H,W) and stills s (B,1,3,H,W) in [-1,1]; None: no such set."""

    x: Tensor
    y: Tensor
    z: Tensor | None
    s: Tensor | None

    @property
    def yz(self) -> Tensor:
        return self.y if self.z is None else torch.cat((self.y, self.z))

    @classmethod
    def of(cls, batch: Batch, device: torch.device, per_frame: bool) -> Clips:
        """Move a loader's batch to the device; `per_frame` makes every frame a video of its own."""

        def move(frames: Tensor | None) -> Tensor | None:
            if frames is None:
                return None
            video = to_model(on_device(frames, device))
            return video.flatten(0, 1).unsqueeze(1) if per_frame else video

        x, y, z = move(batch.x), move(batch.y), move(batch.z)
        assert x is not None and y is not None
        return cls(x, y, z, None if batch.s is None else to_model(on_device(batch.s, device)[:, None]))


class Gains(NamedTuple):
    """What the schedule scales: the adversarial terms, and the contrast and mask terms."""

    adversarial: float | Tensor
    content: float | Tensor
