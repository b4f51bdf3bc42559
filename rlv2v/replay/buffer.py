"""Prioritised replay of the transitions of RL-V2V-GAN section 3.3, stored and drawn by the C++ core.

    P(i) = p_i^alpha / sum_j p_j^alpha;   weight_i = (N P(i))^-beta / max_j (N P(j))^-beta
Source: RL-V2V-GAN Algorithm 1 (the buffer B, alpha = 0); Schaul et al. 2016, arXiv:1511.05952, eq. 1 and section 3.4.
A frame is stored once however many states contain it. One process owns a buffer; any of its threads may call it, and
samplers run side by side. Under torchrun each rank has a buffer of its own, with a seed of its own.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rlv2v import _native
from rlv2v.errors import UserError
from rlv2v.replay.arrays import BOOL, F32, F64, I64, as_array, as_column, as_flag, as_ids, as_number, as_output, integer
from rlv2v.replay.file import read_state, write_state

_FORMAT = 2
_UNBOUNDED = 2**63 - 1


class ReplayBatch(NamedTuple):
    """Hold n transitions on the CPU; F is the frame shape (H, W, C), L is max_len.

    A state's frames come first, zeros follow up to L. The next state is the state with the action appended, of length
    `lengths + 1`. `weights` are the importance weights of the module's formula, in (0, 1].

    With n-step returns, `rewards` are sums r_i + gamma r_{i+1} + ...; `next_states`, `next_lengths` and `terminals` are
    of the last step, and `discounts` are gamma^m for the m <= n steps taken: y = rewards + discounts * Q'(next).
    """

    states: torch.Tensor  # uint8 (n, L, *F)
    lengths: torch.Tensor  # int64 (n,)
    actions: torch.Tensor  # uint8 (n, *F)
    rewards: torch.Tensor  # float32 (n,)
    next_states: torch.Tensor  # uint8 (n, L + 1, *F)
    next_lengths: torch.Tensor  # int64 (n,)
    discounts: torch.Tensor  # float32 (n,)
    true_frames: torch.Tensor  # uint8 (n, *F)
    positions: torch.Tensor  # int64 (n,)
    terminals: torch.Tensor  # bool (n,)
    ids: torch.Tensor  # int64 (n,)
    weights: torch.Tensor  # float32 (n,)


class Clip:
    """Hold frames in the buffer, from `PrioritizedReplay.put_clip`; `len(clip)` is their number.

    The frames stay until `release()` or the end of this handle, and those of a transition as long as the transition.
    After the buffer has loaded other contents, a handle is refused.
    """

    def __init__(self, owner: _native.ReplayBuffer, key: int, num_frames: int) -> None:
        self._owner = owner
        self._key = key
        self._num_frames = num_frames
        self._finalizer = weakref.finalize(self, owner.release_clip, key)
        self._finalizer.atexit = False

    def __len__(self) -> int:
        return self._num_frames

    def release(self) -> None:
        """Release the frames before the handle ends."""
        self._finalizer()


Frame = npt.ArrayLike | torch.Tensor | tuple[Clip, int]
State = npt.ArrayLike | torch.Tensor | tuple[Clip, int, int]
Frames = Frame | Sequence[Frame] | tuple[Clip, npt.ArrayLike]
States = State | Sequence[State] | tuple[Clip, npt.ArrayLike, npt.ArrayLike]


class PrioritizedReplay:
    """Replay buffer of fixed capacity that evicts the oldest first and draws by priority, uniformly at alpha = 0.

    capacity: most transitions. frame_shape: of one uint8 frame, (H, W, C). max_len: most frames of a state.
    alpha, beta: exponents in [0, 1]; both can be set at any time (alpha recomputes every leaf, O(size)).
    stratified: draw k of n comes from the k-th of n equal parts of the total; otherwise all n are independent.
    seed: draw k depends on (seed, k) alone.
    max_bytes: bound on the memory of frames, clips included; older transitions are evicted early to keep it.
    storage: where frames live, "memory" or "mmap": a scratch file at `path`, which must not exist and is unlinked at
    once, so nothing stays behind. Its blocks are reserved as it grows: a full disk is an OSError from add.
    n_step, gamma: returns over n transitions added one after the other; see ReplayBatch.
    ring: how many batches `sample` keeps for reuse. pin_memory: page-locked batches; None: if this process uses CUDA.

    A new transition gets the largest priority so far (at first 1). A mistake raises ValueError, or IndexError for an
    unknown id or a frame outside its clip, and leaves the buffer unchanged.
    """

    def __init__(
        self,
        capacity: int,
        frame_shape: Sequence[int],
        max_len: int,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        stratified: bool = True,
        seed: int = 0,
        storage: Literal["memory", "mmap"] = "memory",
        path: Path | str | None = None,
        max_bytes: int | None = None,
        n_step: int = 1,
        gamma: float = 0.99,
        ring: int = 4,
        pin_memory: bool | None = None,
    ) -> None:
        self.capacity = integer("capacity", capacity, 1)
        self.frame_shape = tuple(integer("frame_shape", size, 1) for size in frame_shape)
        self.max_len = integer("max_len", max_len, 1)
        self.n_step, self.gamma = integer("n_step", n_step, 1), float(gamma)
        if storage not in ("memory", "mmap") or (storage == "mmap") != (path is not None):
            raise ValueError(f"replay: expected storage memory, or mmap with its path, got {storage!r}, path {path!r}")
        # torch's own count of the references to a storage is private. Without it no memory is reused.
        count_users = getattr(torch._C, "_storage_Use_Count", None)
        pinned = torch.cuda.is_initialized() if pin_memory is None else bool(pin_memory)
        self._native = _native.ReplayBuffer(
            self.capacity,
            list(self.frame_shape),
            self.max_len,
            float(alpha),
            float(beta),
            bool(stratified),
            integer("seed", seed, 0, 2**64 - 1),
            _UNBOUNDED if max_bytes is None else integer("max_bytes", max_bytes, 1),
            self.n_step,
            self.gamma,
            "" if path is None else str(path),
            integer("ring", ring, 0) if count_users else 0,
            functools.partial(_new_batch, self.frame_shape, self.max_len, pinned),
            count_users or (lambda storage: 0),
            as_ids,
        )

    def __len__(self) -> int:
        return int(self._native.stats()["size"])

    @property
    def alpha(self) -> float:
        """Return the exponent of the priorities, in [0, 1]; 0 draws uniformly."""
        return self._native.alpha()

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._native.set_alpha(float(value))

    @property
    def beta(self) -> float:
        """Return the exponent of the importance weights, in [0, 1]; 0 makes them all 1."""
        return self._native.beta()

    @beta.setter
    def beta(self, value: float) -> None:
        self._native.set_beta(float(value))

    @property
    def bytes_used(self) -> int:
        """Return the bytes of frames, transitions and tree that the buffer has allocated."""
        return int(self._native.stats()["bytes_used"])

    @property
    def stats(self) -> dict[str, int | float]:
        """Return size, frames, clips, max_priority and bytes_used now; added, evicted, sampled and stale so far."""
        return self._native.stats()

    def is_consistent(self) -> bool:
        """Return whether the tree equals its rebuild and each frame's count its references; O(size), for tests."""
        return self._native.consistent()

    def put_clip(self, frames: npt.ArrayLike | torch.Tensor) -> Clip:
        """Store frames uint8 (T, *F) once; states and frames may then refer to them through the handle."""
        array = as_array(frames)
        return Clip(self._native, self._native.put_clip(array), len(array))

    def add(
        self,
        *,
        state: States,
        action: Frames,
        reward: float | Sequence[float] | npt.ArrayLike,
        true_frame: Frames,
        position: int | Sequence[int] | npt.ArrayLike,
        terminal: bool | Sequence[bool] | npt.ArrayLike = False,
        end: bool | Sequence[bool] | npt.ArrayLike = False,
    ) -> int | npt.NDArray[np.int64]:
        """Add one transition (reward a number) and return its id, or a batch (n rewards) and its ids, int64 (n,).

        state: uint8 (p, *F), 1 <= p <= max_len, or (clip, start, p): frames start .. start + p - 1 of a clip.
        action, true_frame: uint8 F, or (clip, index).
        terminal: there is no next state to bootstrap from. end: the next transition added is of another episode (as
        after a terminal one, but with a next state that counts).
        position, terminal, end: one for all, or n. In a batch, state, action and true_frame are arrays or sequences of
        n, or (clip, starts, lengths) and (clip, indices) with n starts, lengths and indices, or one for all.
        The complete batch is added, or nothing. Ids count up by one.
        """
        if type(reward) is float or as_array(reward).ndim == 0:
            return self._native.add_one(
                self._reference(state, "state", 3),
                self._reference(action, "action", 2),
                as_number("reward", reward, F32),
                self._reference(true_frame, "true_frame", 2),
                as_number("position", position, I64),
                as_number("terminal", terminal, BOOL),
                as_number("end", end, BOOL),
            )
        rewards = as_column("reward", reward, F32, None)
        count = len(rewards)
        first = self._native.add(
            self._many(state, "state", 3, count),
            self._many(action, "action", 2, count),
            rewards,
            self._many(true_frame, "true_frame", 2, count),
            as_column("position", position, I64, count),
            as_flag("terminal", terminal, count),
            as_flag("end", end, count),
        )
        return np.arange(first, first + count)

    def sample(self, n: int, out: ReplayBatch | None = None) -> ReplayBatch:
        """Draw n transitions, with replacement, into memory that is reused, or into the arrays of `out`.

        A batch stays valid while you hold it, one of its tensors, or a view of one. After that its memory (with the
        same tensors) is reused, which saves the page faults of fresh memory.
        If every state in the buffer has max_len frames and n_step is 1, `states` and `actions` are views of the first
        max_len frames of `next_states` and of the one after them, which halves what is written.
        out: tensors or arrays of ReplayBatch's shapes and dtypes, on the CPU, C-contiguous.
        """
        if type(n) is not int or not 0 < n <= _UNBOUNDED:
            n = integer("n", n, 1)
        if out is None:
            return self._native.sample(n)
        if len(out) != len(ReplayBatch._fields):
            raise ValueError(f"replay: out must have the {len(ReplayBatch._fields)} parts of a batch, got {len(out)}")
        self._native.sample_into(n, dict(zip(ReplayBatch._fields, map(as_output, out), strict=True)))
        return out

    def update_priorities(self, ids: npt.ArrayLike | torch.Tensor, priorities: npt.ArrayLike | torch.Tensor) -> int:
        """Set the priorities (finite, >= 0) of ids that add or sample returned; the last of a repeated id counts.

        Return how many ids were stale (evicted since). Those are ignored, and counted in `stats`.
        """
        values = as_array(priorities)
        if values.dtype is not F32 or values.ndim != 1:
            ids = as_ids(ids)
            values = as_column("priorities", values, F64, len(ids))
        return self._native.update_priorities(ids, values)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but clip handles as tensors, numbers and lists, for `torch.load(weights_only=True)`.

        A buffer that loads it draws the same samples next, and assigns the same ids, bit for bit.
        """
        state = self._native.save()
        return {name: _converted(value, np.ndarray, torch.from_numpy) for name, value in state.items()} | self._shape()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace contents and settings by those of `state_dict()`; a misfit raises UserError and changes nothing."""
        if not isinstance(state, dict):
            raise UserError(f"replay state must be a dict, got {type(state).__name__}")
        for name, value in self._shape().items():
            if state.get(name) != value:
                raise UserError(f"replay state: {name} must be {value}, as in this buffer, got {state.get(name)!r}")
        try:
            self._native.load({name: _converted(value, torch.Tensor, as_array) for name, value in state.items()})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"replay state is not one that state_dict() made: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write `state_dict()` with its SHA-256; a kill leaves the old file or the new one at path."""
        write_state(Path(path), self.state_dict())

    def load(self, path: Path | str) -> None:
        """Load what `save` wrote, running no code from it; a broken or foreign file raises UserError."""
        self.load_state_dict(read_state(Path(path)))

    def _shape(self) -> dict[str, Any]:
        """Return what a loaded state must have in common with this buffer."""
        return {
            "format": _FORMAT,
            "capacity": self.capacity,
            "frame_shape": list(self.frame_shape),
            "max_len": self.max_len,
            "n_step": self.n_step,
            "gamma": self.gamma,
        }

    def _many(self, value: Any, name: str, parts: int, count: int) -> Any:
        """Return n frames or states as the core takes them: an array, a clip's key with columns, or a list."""
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return as_array(value)
        if isinstance(value, tuple) and value and isinstance(value[0], Clip):
            return (self._key(value, name, parts), *[as_column(name, part, I64, count) for part in value[1:]])
        return [self._reference(row, name, parts) for row in value]

    def _reference(self, value: Any, name: str, parts: int) -> Any:
        """Return a frame or state as the core takes it: an array, (clip key, index) or (clip key, start, length)."""
        if not (isinstance(value, tuple) and value and isinstance(value[0], Clip)):
            return as_array(value)
        return (self._key(value, name, parts), *[integer(name, part, -(2**63)) for part in value[1:]])

    def _key(self, value: tuple[Any, ...], name: str, parts: int) -> int:
        if len(value) != parts:
            wanted = "(clip, start, length)" if parts == 3 else "(clip, index)"
            raise ValueError(f"replay: {name} must be an array or {wanted}, got a tuple of {len(value)}")
        clip: Clip = value[0]
        if clip._owner is not self._native:
            raise ValueError(f"replay: {name} must refer to a clip of this buffer, got one of another")
        return clip._key


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    return convert(value) if isinstance(value, kind) else value


def _new_batch(frame: tuple[int, ...], max_len: int, pinned: bool, n: int) -> tuple[ReplayBatch, ReplayBatch, int]:
    """Return an empty batch, the same with states and actions as views of the next states, and their storage."""
    columns = {
        "states": (torch.uint8, (max_len, *frame)),
        "lengths": (torch.int64, ()),
        "actions": (torch.uint8, frame),
        "rewards": (torch.float32, ()),
        "next_states": (torch.uint8, (max_len + 1, *frame)),
        "next_lengths": (torch.int64, ()),
        "discounts": (torch.float32, ()),
        "true_frames": (torch.uint8, frame),
        "positions": (torch.int64, ()),
        "terminals": (torch.bool, ()),
        "ids": (torch.int64, ()),
        "weights": (torch.float32, ()),
    }
    sizes = {name: n * dtype.itemsize * math.prod(shape) for name, (dtype, shape) in columns.items()}
    line = 64  # each column begins on a cache line
    total = sum(size + line for size in sizes.values()) + line
    # numpy asks for large pages where memory is large.
    data = torch.empty(total, dtype=torch.uint8, pin_memory=True) if pinned else torch.from_numpy(np.empty(total, "u1"))
    offset, tensors = -data.data_ptr() % line, {}
    for name, (dtype, shape) in columns.items():
        tensors[name] = data[offset : offset + sizes[name]].view(dtype).view(n, *shape)
        offset += -(-sizes[name] // line) * line
    batch = ReplayBatch(**tensors)
    shared = batch._replace(states=batch.next_states[:, :max_len], actions=batch.next_states[:, max_len])
    return batch, shared, data.untyped_storage()._cdata
