"""The replay buffer as torch sees it: transitions of RL-V2V-GAN section 3.3, kept and drawn by the C++ core.

    P(i) = p_i^alpha / sum_j p_j^alpha;   weight_i = (N P(i))^-beta / max_j (N P(j))^-beta
Source: RL-V2V-GAN Algorithm 1 (the buffer B, alpha = 0); Schaul et al. 2016, arXiv:1511.05952, eq. 1 and section 3.4.
A frame is stored once however many states contain it. One process owns a buffer; any mix of its threads may call it.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rlv2v import _native
from rlv2v.errors import UserError

_FORMAT = 1
_ARRAYS = {
    "frames": np.uint8,
    "table": np.int32,
    "lengths": np.int64,
    "rewards": np.float32,
    "positions": np.int64,
    "terminals": np.uint8,
    "priorities": np.float32,
}
_INTS = ("oldest_id", "sampled", "stale", "seed")
_FLOATS = ("alpha", "beta", "max_priority")
_STATS = ("size", "frames", "clips", "added", "evicted", "sampled", "stale", "max_priority", "bytes_used")
_KINDS = {"i": "integers", "f": "real numbers", "b": "booleans"}
_NO_BOUND = 2**63 - 1


class ReplayBatch(NamedTuple):
    """n transitions on the CPU; F is the frame shape (H, W, C), L is max_len.

    A state's frames come first, zeros follow up to L; the next state is the state with the action appended, so that its
    length is `lengths + 1`. `weights` are the importance weights of the module's formula, in (0, 1].
    """

    states: torch.Tensor  # uint8 (n, L, *F)
    lengths: torch.Tensor  # int64 (n,)
    actions: torch.Tensor  # uint8 (n, *F)
    rewards: torch.Tensor  # float32 (n,)
    next_states: torch.Tensor  # uint8 (n, L + 1, *F)
    true_frames: torch.Tensor  # uint8 (n, *F)
    positions: torch.Tensor  # int64 (n,)
    terminals: torch.Tensor  # bool (n,)
    ids: torch.Tensor  # int64 (n,)
    weights: torch.Tensor  # float32 (n,)


class Clip:
    """Frames that the buffer holds, from `PrioritizedReplay.put_clip`; `len(clip)` is their number.

    They stay as long as this handle does (or until `release()`); those that transitions refer to stay with those.
    A handle is of no use after the buffer has loaded other contents.
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
        """Lets the frames go before the handle does."""
        self._finalizer()


Frame = npt.ArrayLike | torch.Tensor | tuple[Clip, int]
State = npt.ArrayLike | torch.Tensor | tuple[Clip, int, int]


class PrioritizedReplay:
    """Fixed-capacity replay, oldest out first, with prioritised or (alpha = 0) exactly uniform draws.

    capacity: most transitions kept. frame_shape: of one uint8 frame, (H, W, C). max_len: most frames of a state.
    alpha, beta: exponents in [0, 1], both settable at any time (alpha recomputes every leaf, O(size)).
    stratified: draw k of n comes from the k-th of n equal parts of the total; else all n are independent.
    seed: draw k ever made depends on (seed, k) alone.
    max_bytes: bound on the memory of frames, clips included; the oldest transitions go early to keep it. None: no bound
    but the capacity.

    A new transition gets the largest priority seen so far (at first 1). Mistakes raise ValueError, or IndexError for an
    id never given out or a frame outside its clip, and leave the buffer as it was.
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
        max_bytes: int | None = None,
    ) -> None:
        self.capacity = _integer("capacity", capacity, 1)
        self.frame_shape = tuple(_integer("frame_shape", size, 1) for size in frame_shape)
        self.max_len = _integer("max_len", max_len, 1)
        self._native = _native.ReplayBuffer(
            self.capacity,
            list(self.frame_shape),
            self.max_len,
            float(alpha),
            float(beta),
            bool(stratified),
            _integer("seed", seed, 0, 2**64 - 1),
            _NO_BOUND if max_bytes is None else _integer("max_bytes", max_bytes, 1),
        )

    def __len__(self) -> int:
        return self._native.stats().size

    @property
    def alpha(self) -> float:
        """Exponent of the priorities, in [0, 1]; 0 draws uniformly."""
        return self._native.alpha()

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._native.set_alpha(float(value))

    @property
    def beta(self) -> float:
        """Exponent of the importance weights, in [0, 1]; 0 makes them all 1."""
        return self._native.beta()

    @beta.setter
    def beta(self, value: float) -> None:
        self._native.set_beta(float(value))

    @property
    def bytes_used(self) -> int:
        """Bytes of frames, transitions and tree that the buffer has allocated."""
        return self._native.stats().bytes_used

    @property
    def stats(self) -> dict[str, int | float]:
        """size, frames, clips: kept now; added, evicted, sampled, stale: counts ever; max_priority; bytes_used."""
        stats = self._native.stats()
        return {name: getattr(stats, name) for name in _STATS}

    def put_clip(self, frames: npt.ArrayLike | torch.Tensor) -> Clip:
        """Stores frames uint8 (T, *F) once; states and frames may then refer to them through the handle."""
        array = _array(frames)
        return Clip(self._native, self._native.put_clip(array), len(array))

    def add(
        self,
        *,
        state: State | Sequence[State],
        action: Frame | Sequence[Frame],
        reward: float | Sequence[float] | npt.ArrayLike,
        true_frame: Frame | Sequence[Frame],
        position: int | Sequence[int] | npt.ArrayLike,
        terminal: bool | Sequence[bool] | npt.ArrayLike = False,
    ) -> int | torch.Tensor:
        """Adds one transition (reward a number) and returns its id, or a batch (n rewards): ids, int64 (n,).

        state: uint8 (p, *F), 1 <= p <= max_len, or (clip, start, p): frames start .. start + p - 1 of a clip.
        action, true_frame: uint8 F, or (clip, index).
        position, terminal: one for all, or n. In a batch, state, action and true_frame are sequences (or arrays) of n.
        All of a batch is added, or nothing. Ids count up by one.
        """
        one = np.ndim(_array(reward)) == 0
        rewards = _column("reward", reward, np.float32, 1 if one else None)
        states: list[Any] = [state] if one else _rows("state", state)
        actions: list[Any] = [action] if one else _rows("action", action)
        true_frames: list[Any] = [true_frame] if one else _rows("true_frame", true_frame)
        first = self._native.add(
            [self._reference(row, "state", 3) for row in states],
            [self._reference(row, "action", 2) for row in actions],
            rewards,
            [self._reference(row, "true_frame", 2) for row in true_frames],
            _column("position", position, np.int64, len(rewards)),
            _column("terminal", terminal, np.bool_, len(rewards)),
        )
        return first if one else torch.arange(first, first + len(rewards))

    def sample(self, n: int) -> ReplayBatch:
        """Draws n transitions, with replacement, into fresh tensors."""
        return ReplayBatch(*map(torch.from_numpy, self._native.sample(_integer("n", n, 1))))

    def update_priorities(self, ids: npt.ArrayLike | torch.Tensor, priorities: npt.ArrayLike | torch.Tensor) -> int:
        """Sets the priorities (finite, >= 0) of ids that add or sample returned, the last of a repeated id.

        Returns how many ids were stale (evicted since): those are ignored, and counted in `stats`.
        """
        wanted = _column("ids", ids, np.int64, None)
        return self._native.update_priorities(wanted, _column("priorities", priorities, np.float64, len(wanted)))

    def state_dict(self) -> dict[str, Any]:
        """Everything but clip handles, as tensors, numbers and lists: `torch.load(weights_only=True)` accepts it.

        A buffer that loads it draws the same samples next, and gives the same ids, bit for bit.
        """
        state = self._native.save()
        state.update({name: torch.from_numpy(state[name]) for name in _ARRAYS})
        state["format"] = _FORMAT
        state["capacity"], state["frame_shape"], state["max_len"] = self.capacity, list(self.frame_shape), self.max_len
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces contents and settings by those of `state_dict()`; a misfit raises UserError and changes nothing."""
        expected = {
            "format": _FORMAT,
            "capacity": self.capacity,
            "frame_shape": list(self.frame_shape),
            "max_len": self.max_len,
        }
        if not isinstance(state, dict):
            raise UserError(f"replay state must be a dict, got {type(state).__name__}")
        for name, value in expected.items():
            if state.get(name) != value:
                raise UserError(f"replay state: {name} must be {value}, as in this buffer, got {state.get(name)!r}")
        try:
            contents: dict[str, Any] = {name: state[name].numpy() for name in _ARRAYS}
            contents.update({name: _integer(name, state[name], 0, 2**64 - 1) for name in _INTS})
            contents.update({name: float(state[name]) for name in _FLOATS})
            contents["stratified"] = bool(state["stratified"])
            self._native.load(contents)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"replay state is not one that state_dict() made: {error}") from error

    def save(self, path: Path | str) -> None:
        """Writes `state_dict()` beside path and renames it: path is always the old file or the whole new one."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        state = self.state_dict()
        try:
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            raise UserError(f"replay: cannot write {path}; check its folder and the free space ({error})") from error
        finally:
            beside.unlink(missing_ok=True)

    def load(self, path: Path | str) -> None:
        """Loads what `save` wrote, running no code from it; a broken or foreign file raises UserError."""
        try:
            state = torch.load(Path(path), map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"replay: cannot read {path}: {error.strerror}") from error
        except Exception as error:  # bytes that are not ours make the restricted unpickler fail in any way
            raise UserError(f"replay: {path} must be a file that save() wrote, got a broken or foreign one") from error
        self.load_state_dict(state)

    def _reference(self, value: Any, name: str, parts: int) -> Any:
        """A frame or state as the core takes it: an array, or (clip key, start[, length])."""
        if not (isinstance(value, tuple) and value and isinstance(value[0], Clip)):
            return _array(value)
        clip = value[0]
        if len(value) != parts:
            wanted = "(clip, start, length)" if parts == 3 else "(clip, index)"
            raise ValueError(f"replay: {name} must be an array or {wanted}, got a tuple of {len(value)}")
        if clip._owner is not self._native:
            raise ValueError(f"replay: {name} must refer to a clip of this buffer, got one of another")
        return (clip._key, *(_integer(name, part, -(2**63)) for part in value[1:]))


def _integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"replay: {name} must be an integer, got {type(value).__name__}") from None
    if not least <= number <= most:
        raise ValueError(f"replay: {name} must be in {least}..{most}, got {number}")
    return number


def _array(value: Any) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _column(name: str, value: Any, dtype: Any, count: int | None) -> npt.NDArray[Any]:
    """value as dtype (n,), its kind checked: integers may stand for reals, nothing else is converted."""
    array = _array(value)
    kind = np.dtype(dtype).kind
    if array.size and array.dtype.kind not in {"i": "iu", "f": "fiu", "b": "b"}[kind]:
        raise ValueError(f"replay: {name} must be {_KINDS[kind]}, got {array.dtype}")
    if array.ndim == 0:
        array = np.full(1 if count is None else count, array)
    if array.ndim != 1 or count not in (None, len(array)):
        raise ValueError(f"replay: {name} must have shape ({'n' if count is None else count},), got {array.shape}")
    with np.errstate(over="ignore"):  # to infinity, which the core refuses by name
        return array.astype(dtype)


def _rows(name: str, value: Any) -> list[Any]:
    if isinstance(value, tuple) and value and isinstance(value[0], Clip):
        raise ValueError(f"replay: {name} must be a sequence with one entry for each reward, got one clip reference")
    return list(_array(value)) if isinstance(value, torch.Tensor) else list(value)
