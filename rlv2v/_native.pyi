from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
One = Bytes | tuple[int, int] | tuple[int, int, int]
Frames = Bytes | list[One] | tuple[int, Ints]
States = Bytes | list[One] | tuple[int, Ints, Ints]

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
        n_step: int,
        gamma: float,
        path: str,
        ring: int,
        make_batch: Callable[[int], tuple[tuple[Any, ...], tuple[Any, ...], int]],
        count_users: Callable[[int], int],
        to_ids: Callable[[Any], Ints],
    ) -> None: ...
    def put_clip(self, frames: Bytes) -> int: ...
    def release_clip(self, clip: int) -> None: ...
    def add(
        self,
        states: States,
        actions: Frames,
        rewards: Floats,
        true_frames: Frames,
        positions: Ints,
        terminals: Bools | None,
        ends: Bools | None,
    ) -> int: ...
    def add_one(
        self, state: One, action: One, reward: float, true_frame: One, position: int, terminal: bool, end: bool
    ) -> int: ...
    def sample(self, n: int) -> Any: ...
    def sample_into(self, n: int, arrays: dict[str, npt.NDArray[Any]]) -> None: ...
    def update_priorities(self, ids: Any, priorities: npt.NDArray[np.float64] | Floats) -> int: ...
    def alpha(self) -> float: ...
    def set_alpha(self, alpha: float) -> None: ...
    def beta(self) -> float: ...
    def set_beta(self, beta: float) -> None: ...
    def stats(self) -> dict[str, int | float]: ...
    def consistent(self) -> bool: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...

# Addresses of dense arrays, 0 for null; csrc/convlstm/gates.h names the shapes and which may be 0.
# dtype: 0 f32, 1 bf16, 2 f16.
def gates_forward(
    dtype: int,
    rows: int,
    length: int,
    a: int,
    a_h: int,
    c_prev: int,
    h: int,
    c: int,
    gates: int,
    num_threads: int,
    /,
) -> None: ...
def gates_backward(
    dtype: int,
    activated: bool,
    rows: int,
    length: int,
    dh1: int,
    dh2: int,
    dc_out: int,
    carry_in: int,
    gates: int,
    c: int,
    c_prev: int,
    da: int,
    carry_out: int,
    num_threads: int,
    /,
) -> None: ...

# A writable, uninitialised buffer of bytes from the pool, which it returns to when nothing refers to it.
class Block:
    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def pool_bytes() -> tuple[int, int]: ...  # used, idle

max_bins: int
max_around: int

# sizes: batch, bins, grid height and width, height and width. Then addresses of dense arrays, 0 for a gradient that is
# not wanted, and last the number of threads:
#   forward: grid, guide, frames, out.  backward: grid, guide, frames, d_out, d_grid, d_guide, d_frames.
#   frame: grid, curve, number of curves, around, its three sizes as a tuple, frame, out.
def slice_forward(sizes: Sequence[int], /, *addresses: int) -> None: ...
def slice_backward(sizes: Sequence[int], /, *addresses: int) -> None: ...
def slice_frame(sizes: Sequence[int], /, *addresses: int | Sequence[int]) -> None: ...

# sizes: steps, batch, channels, height, width, pool height, pool width. Addresses by the names of csrc/norm.
def norm_forward(
    dtype: int, sizes: Sequence[int], slope: float, eps: float, num_threads: int, **addresses: int
) -> None: ...
def norm_backward(
    dtype: int, sizes: Sequence[int], slope: float, eps: float, given: bool, num_threads: int, **addresses: int
) -> None: ...
def isa() -> str: ...  # instruction set of the gates, slices and norms; the best of `isas` until it is set
def isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...

has_cuda: bool
persistent_counters: int

class ConvLstmShape:
    def __init__(
        self, groups: int, steps: int, batch: int, channels: int, height: int, width: int, kernel: int
    ) -> None: ...

def persistent_plan(shape: ConvLstmShape, backward: bool, sms: int, shared_bytes: int) -> dict[str, Any] | str: ...
def persistent_forward(
    shape: ConvLstmShape,
    dtype: str,
    device: int,
    stream: int,
    a: int,
    w_h: int,
    h0: int,
    c0: int,
    hs: int,
    cs: int,
    gates: int,
    counters: int,
) -> None: ...
def persistent_backward(
    shape: ConvLstmShape,
    dtype: str,
    device: int,
    stream: int,
    dhs: int,
    dcs: int,
    gates: int,
    activated: bool,
    cs: int,
    c0: int,
    w_h: int,
    da: int,
    dh0: int,
    dc0: int,
    counters: int,
) -> None: ...
