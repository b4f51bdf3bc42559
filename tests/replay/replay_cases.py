"""Buffers and frames that the tests of the replay share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlv2v.replay import PrioritizedReplay

FRAME = (4, 6, 3)
MAX_LEN = 3


def frames(count: int, value: int) -> np.ndarray[Any, Any]:
    return np.full((count, *FRAME), value, np.uint8)


def row(value: int, length: int = 1, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `add` for a transition whose frames, reward and position all hold the value."""
    one = frames(1, value)[0]
    rest = {"action": one, "reward": value, "true_frame": one, "position": value}
    return {"state": frames(length, value), **rest, **changes}


def filled(capacity: int = 8, count: int = 12, **options: Any) -> PrioritizedReplay:
    """Return a buffer with rows 0 .. count - 1, whose states have 1 + k % 3 frames, and of which every second ends."""
    replay = PrioritizedReplay(capacity, FRAME, MAX_LEN, **options)
    for k in range(count):
        replay.add(**row(k, 1 + k % 3, terminal=k % 2 == 1))
    return replay


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
