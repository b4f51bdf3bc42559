"""Memory counted without being used: tensors that have a shape, a dtype and a place, but no values.

`Ghost` tensors pass for CPU tensors: autograd, autocast and checkpointing do with them what they do with real ones, and
torch's shape functions stand for the arithmetic. `Ledger` knows which bytes are alive, of ghosts or of real tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlv2v.kernels.ops import backward_by, forward_by
from rlv2v.kernels.triton.recurrence import TritonRecurrence

CPU, META = torch.device("cpu"), torch.device("meta")
CAPABILITY = (8, 6)  # whose tiles round the packed weights up


class Ghost(torch.Tensor):
    """A tensor on the CPU, to all appearances; `meta` has its shape, strides and storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Ghost:
        ghost = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        ghost.meta = meta
        return ghost

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{op} of a ghost outside of `Ghosts`")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Ledger:
    """Bytes of storages that were seen and are alive; `peak`, the most there were at once; those `saved` by autograd.

    A storage counts once, however many tensors look into it.
    """

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.saved: set[int] = set()
        self._alive: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> int:
        """Count a tensor's storage, if it is not counted yet; returns what it is called in `sizes`."""
        storage = (tensor.meta if isinstance(tensor, Ghost) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:

            def gone(_: Any) -> None:
                del self.sizes[key], self._alive[key]
                self.saved.discard(key)
                self.bytes -= size

            self.sizes[key], self._alive[key] = size, weakref.ref(storage, gone)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        return key

    def passing(self, size: int) -> None:
        """So many bytes more were alive for a moment."""
        self.peak = max(self.peak, self.bytes + size)

    def save(self, tensor: Tensor) -> Tensor:
        """For `saved_tensors_hooks`."""
        self.saved.add(self.see(tensor))
        return tensor

    def saved_bytes(self, but: set[int]) -> int:
        """Of what is saved and alive, without the storages `but`."""
        return sum(self.sizes[key] for key in self.saved - but)


def each_tensor(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """An operator's arguments or results with `fn` of every tensor in its place; torch's own is five times as slow."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return type(value)([each_tensor(fn, part) for part in value])
    return {name: each_tensor(fn, part) for name, part in value.items()} if isinstance(value, dict) else value


class Live(TorchDispatchMode):
    """Enters into a ledger what operators return."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(op, args, kwargs or {})
        each_tensor(self.ledger.see, result)
        return result

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        return op(*args, **kwargs)


class Outcome(NamedTuple):
    """Of an operator on tensors of some shapes: its results, and the most bytes that were alive in it."""

    result: Any  # of (shape, strides, dtype)
    bytes: int


class Ghosts(Live):
    """Within it operators run on ghosts, and make ghosts; the ConvLSTM's do what its driver and GPU backend do."""

    layers: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.ops.rlv2v.convlstm.default: forward_by,
        torch.ops.rlv2v.convlstm_backward.default: backward_by,
    }
    recurrence = TritonRecurrence(launch=lambda *_: None, capability=CAPABILITY)
    known: ClassVar[dict[Hashable, Outcome]] = {}
    """What was found once; torch's shape functions are slow, and twin networks ask them the same."""

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        if not makes_new(op):
            return self.on_meta(op, args, kwargs)
        key = (op, described(args), described(kwargs))
        if key not in self.known:
            with Live(Ledger()) as inner:
                result = self.on_meta(op, args, kwargs)
            self.known[key] = Outcome(each_tensor(form, result), inner.ledger.peak)
            self.ledger.passing(inner.ledger.peak)
            return result
        found = self.known[key]
        self.ledger.passing(found.bytes)
        return made(found.result)

    def on_meta(self, op: Any, args: Any, kwargs: Any) -> Any:
        ghosts: dict[int, Ghost] = {}

        def unwrap(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, Ghost):
                return tensor.to(META)
            ghosts[id(tensor.meta)] = tensor
            return tensor.meta

        args, kwargs = each_tensor(unwrap, args), each_tensor(unwrap, kwargs)
        if "device" in kwargs:
            kwargs = kwargs | {"device": META}
        if op in self.layers:
            *tensors, _, last = args
            result: Any = self.layers[op](self.recurrence, *tensors, last)
        else:
            result = op(*args, **kwargs)
        # What an operator changes in place, it returns.
        return each_tensor(lambda meta: ghosts[id(meta)] if id(meta) in ghosts else Ghost(meta), result)


@cache
def makes_new(op: Any) -> bool:
    """Whether an operator's results are new tensors, and its arguments stay as they are."""
    return not any(value.alias_info for value in (*op._schema.arguments, *op._schema.returns))


class Form(NamedTuple):
    """What there is to know of a ghost beside its storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def described(value: Any) -> Hashable:
    """Arguments of an operator as a key: forms for tensors."""
    if isinstance(value, Tensor):
        return form(value)
    if isinstance(value, (tuple, list)):
        return tuple([described(part) for part in value])
    return tuple((name, described(part)) for name, part in value.items()) if isinstance(value, dict) else value


def made(value: Any) -> Any:
    """New ghosts of these forms."""
    if isinstance(value, Form):
        return Ghost(torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=META))
    return type(value)([made(part) for part in value]) if isinstance(value, (tuple, list)) else value
