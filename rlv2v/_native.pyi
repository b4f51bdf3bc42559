from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Frame = Bytes | tuple[int, int]
State = Bytes | tuple[int, int, int]

class ReplayStats:
    size: int
    frames: int
    clips: int
    added: int
    evicted: int
    sampled: int
    stale: int
    max_priority: float
    bytes_used: int

class ReplayBuffer:
    def __init__(
        self,
        capacity: int,
        frame_shape: list[int],
        max_len: int,
        alpha: float,
        beta: float,
        stratified: bool,
        seed: int,
        max_bytes: int,
    ) -> None: ...
    def put_clip(self, frames: Bytes) -> int: ...
    def release_clip(self, clip: int) -> None: ...
    def add(
        self,
        states: list[State],
        actions: list[Frame],
        rewards: Floats,
        true_frames: list[Frame],
        positions: Ints,
        terminals: Bools,
    ) -> int: ...
    def sample(self, n: int) -> tuple[Bytes, Ints, Bytes, Floats, Bytes, Bytes, Ints, Bools, Ints, Floats]: ...
    def update_priorities(self, ids: Ints, priorities: npt.NDArray[np.float64]) -> int: ...
    def alpha(self) -> float: ...
    def set_alpha(self, alpha: float) -> None: ...
    def beta(self) -> float: ...
    def set_beta(self, beta: float) -> None: ...
    def stats(self) -> ReplayStats: ...
    def consistent(self) -> bool: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
